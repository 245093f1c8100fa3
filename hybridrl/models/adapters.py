"""Low-rank adapters in a model's linear layers (LoRA, arXiv 2106.09685), by the library peft.

A linear layer `x -> W x` becomes `x -> W x + s B (A x)` with s = alpha / rank, A [rank, in] and
B [out, rank]. B begins as zero, so that the model first computes the same as without adapters. Only
A and B are trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from hybridrl.core.errors import ConfigError
from hybridrl.settings.lora import LoraConfig

if TYPE_CHECKING:
    from peft import LoraConfig as PeftConfig

ADAPTER = "default"
"""peft's name of the only adapter of a layer, a part of the names of the adapter's parameters."""

BASE = ".base_layer"
"""The part that peft adds to the names of the parameters of a layer with an adapter."""

SHOWN = 8  # largest number of layers that an error lists


class AdaptedLayer(NamedTuple):
    """A linear layer with an adapter; its parameters may be sharded."""

    name: str  # of the layer in the model without adapters, e.g. model.layers.0.mlp.up_proj
    weight: nn.Parameter  # W, [out, in]
    down: nn.Parameter  # A, [rank, in]
    up: nn.Parameter  # B, [out, rank]


def check_peft() -> None:
    """Refuse lora.rank without the library.

    Raises:
        ConfigError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise ConfigError(
            "lora.rank: adapters need the package peft, which is not installed; pip install "
            "'hybridrl[lora]', or set lora.rank=null"
        )


def target_names(model: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """The last parts of the names of the layers that get an adapter, in alphabetical order.

    Example: ["k_proj", "q_proj"].

    Raises:
        ConfigError: a name of lora.targets belongs to no linear layer of the decoder, or the
            decoder has no linear layers.
    """
    kind = type(model).__name__
    linear = {
        name.rpartition(".")[2]
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.Linear)
    }
    if not linear:
        raise ConfigError(
            f"lora.rank={lora.rank}: the decoder of {kind} has no linear layers that could get an "
            "adapter; set lora.rank=null to train all weights"
        )
    unknown = [name for name in lora.targets if name not in linear]
    if unknown:
        raise ConfigError(
            f"lora.targets={lora.targets}: {unknown[0]!r} is not a linear layer in the decoder of "
            f"{kind}; it has {', '.join(sorted(linear)[:SHOWN])}"
        )
    return sorted(lora.targets or linear)


def add_adapters(model: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Add adapters to the model's linear layers, with A random by `seed` and B zero.

    Their parameters have the dtype of the layer, and are the only ones that require a gradient.

    Args:
        model: changed in place. If it is on torch's meta device, the adapters have no numbers
            either. Weights that ZeRO-3 has sharded are not read.

    Raises:
        ConfigError: as check_peft and target_names.
    """
    check_peft()
    from peft import inject_adapter_in_model

    config = peft_config(model, lora)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=is_outline(model))
    for layer in _dropout_layers(model):
        layer.eval()


def peft_config(model: PreTrainedModel, lora: LoraConfig) -> "PeftConfig":
    """The adapters as a configuration of peft, which is written to adapter_config.json.

    Args:
        model: without adapters.

    Raises:
        ConfigError: as target_names.
    """
    from peft import LoraConfig as PeftConfig

    assert lora.rank is not None, "there are adapters"
    return PeftConfig(
        r=lora.rank,
        lora_alpha=lora.scale * lora.rank,
        target_modules=target_names(model, lora),
        lora_dropout=lora.dropout,
        task_type="CAUSAL_LM",
    )


def is_outline(model: PreTrainedModel) -> bool:
    """Whether the model is on torch's meta device, without numbers."""
    return model.device.type == "meta"


def adapted_layers(model: PreTrainedModel) -> list[AdaptedLayer]:
    """The layers that `add_adapters` gave an adapter, in the order of the model."""
    from peft.tuners.lora import LoraLayer

    return [
        AdaptedLayer(
            name=name,
            weight=module.base_layer.weight,
            down=module.lora_A[ADAPTER].weight,
            up=module.lora_B[ADAPTER].weight,
        )
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]


def name_without_adapters(name: str) -> str:
    """The name of a parameter in the model without adapters.

    Example: "q_proj.base_layer.bias" becomes "q_proj.bias".
    """
    return name.replace(f"{BASE}.", ".")


@contextmanager
def dropout(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Inside the `with` block, set a random part of the adapters' inputs to zero.

    Args:
        seed: of the random numbers, so that the same step can be repeated. The state of torch's
            generators is restored afterwards.
    """
    layers = _dropout_layers(model)
    if not layers:
        yield
        return
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for layer in layers:
            layer.train()
        try:
            yield
        finally:
            for layer in layers:
                layer.eval()


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Inside the `with` block, the model computes without its adapters.

    Only for forward passes without gradients: the adapters' parameters require none in the block.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)


def _dropout_layers(model: PreTrainedModel) -> list[nn.Dropout]:
    """The dropout layers of the adapters; empty without lora.dropout."""
    ending = f".lora_dropout.{ADAPTER}"
    return [
        module
        for name, module in model.named_modules()
        if name.endswith(ending) and isinstance(module, nn.Dropout)
    ]
