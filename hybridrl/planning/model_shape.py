"""The sizes of a model, from its config.json alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from hybridrl.models.loading import (
    is_on_hub,
    is_quantised,
    load_layout,
    model_config,
    resolve,
)
from hybridrl.models.weight_files import tensor_files
from hybridrl.settings.lora import LoraConfig
from hybridrl.settings.models import ModelConfig
from hybridrl.settings.run import RunSettings
from hybridrl.weights.parameters import LowRankAdapters

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Counts of numbers, not of bytes.

    Example: Qwen2.5-7B has parameters=7_615_616_512, largest=544_997_376, its embedding,
    layers=28, hidden=3584, vocabulary=152_064, kv_numbers=28_672, tied=False.
    """

    parameters: int  # tied embeddings count once
    largest: int  # numbers of the largest parameter
    layers: int
    hidden: int  # H
    vocabulary: int  # V, rows of the output embedding
    intermediate: int  # of the feed-forward part of a layer
    kv_numbers: int  # keys and values of one token, in all layers
    tied: bool  # the input and the output embedding are one matrix

    @property
    def head(self) -> int:
        """Numbers of the output embedding."""
        return self.vocabulary * self.hidden

    @property
    def multiplied(self) -> int:
        """Parameters of the body, without the embeddings; a token is multiplied by all of them."""
        return self.parameters - (1 if self.tied else 2) * self.head


@lru_cache
def shape_of(path: str, revision: str | None, setting: str) -> ModelShape:
    """The shape of the model at `path`. Of a model on the hub only text files are downloaded.

    Args:
        setting: how an error names the model, e.g. "teachers.main.path".

    Raises:
        ConfigError: there is no such model, or transformers cannot build it from its config.
    """
    config = model_config(path, revision, setting=setting).get_text_config()
    model = load_layout(path, revision, setting=setting)
    sizes = [parameter.numel() for parameter in model.parameters()]
    heads = getattr(config, "num_attention_heads", 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelShape(
        parameters=sum(sizes),
        largest=max(sizes),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        kv_numbers=2 * config.num_hidden_layers * kv_heads * width,
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    )


def model_shape(model: ModelConfig, setting: str = "model.path") -> ModelShape:
    """As shape_of, for a model in the settings."""
    return shape_of(model.path, model.revision, setting)


def engine_weights(model: ModelConfig, setting: str, arguments: Mapping[str, Any]) -> int:
    """Bytes of a model's weights in an engine with these arguments of vLLM.

    Quantised weights in a folder have the size of its files. Weights that the engine quantises when
    it loads them, and quantised ones on the hub, count a byte for each number.

    Example: Qwen2.5-7B in bfloat16 has 15.2 GB, quantised to 8 bits 7.6 GB.
    """
    quantised = is_quantised(model_config(model.path, model.revision, setting=setting))
    if quantised and not is_on_hub(model.path):
        files = tensor_files(resolve(model.path, model.revision), f"{setting}={model.path}")
        return sum(file.stat().st_size for file in set(files.values()))
    width = 1 if quantised or arguments.get("quantization") else DTYPE_BYTES[model.dtype]
    return model_shape(model, setting).parameters * width


class TrainedNumbers(NamedTuple):
    """How many numbers of the student train, without a value head."""

    total: int
    largest: int  # of one parameter


def trained_numbers(settings: RunSettings) -> TrainedNumbers:
    """How many numbers of the student train: all of them, or those of its adapters.

    Raises:
        ConfigError: as shape_of, or as models.adapters.add_adapters.
    """
    lora = settings.lora
    if lora.rank is None:
        shape = model_shape(settings.model)
        return TrainedNumbers(total=shape.parameters, largest=shape.largest)
    return _adapter_numbers(
        settings.model.path, settings.model.revision, lora.rank, tuple(lora.targets)
    )


@lru_cache
def _adapter_numbers(
    path: str, revision: str | None, rank: int, targets: tuple[str, ...]
) -> TrainedNumbers:
    model = load_layout(path, revision, setting="model.path")
    lora = LoraConfig(rank=rank, targets=list(targets))
    adapters = LowRankAdapters(model, lora=lora, seed=0).adapters()
    sizes = [parameter.numel() for parameter in adapters.values()]
    return TrainedNumbers(total=sum(sizes), largest=max(sizes))


def dtype_of(model: ModelConfig) -> torch.dtype:
    return getattr(torch, model.dtype)
