"""Export of trained adapters without the model, as a folder that peft and vLLM can load."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hybridrl.core.errors import CheckpointError, ConfigError
from hybridrl.core.folders import new_folder
from hybridrl.models.adapters import peft_config
from hybridrl.models.loading import TEXT_FILES, is_on_hub, load_layout, resolve
from hybridrl.settings.run import RunSettings
from hybridrl.weights.fragments import MASTER, FragmentReader
from hybridrl.weights.hugging_face import write_text_files
from hybridrl.weights.parameters import LowRankAdapters

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""peft puts this before the names of a model's parameters."""


def export_adapters(
    state: Path, settings: RunSettings, dtype: str, folder: Path, template: Path | None = None
) -> None:
    """Write the adapters of a checkpoint in peft's format, and the tokenizer with the run's chat
    template and end token. Neither the model's weights nor a value head are read.

    The folder appears complete or not at all (core.folders.new_folder).

    Args:
        state: the folder of the checkpoint, whose fp32 master weights are read.
        dtype: name of the dtype of the written weights.
        folder: the folder to write; replaced if it exists.
        template: the chat template that the run trained with; None, or no such file: the model's.

    Raises:
        ConfigError: the run trained all weights.
        CheckpointError: the checkpoint lacks an adapter, or has one of another shape.
    """
    check_adapter_run(settings)
    lora = settings.lora
    config = peft_config(outline(settings), lora)
    weights = LowRankAdapters(outline(settings), lora=lora, seed=settings.run.seed)
    reader = FragmentReader(state)
    tensors = {}
    for name, parameter in weights.adapters().items():
        if reader.shapes.get(name) != tuple(parameter.shape):
            raise CheckpointError(
                f"{state}: has no {name} of shape {list(parameter.shape)}, so it was not trained "
                f"with lora.rank={lora.rank}"
            )
        tensors[PREFIX + name] = reader.whole(MASTER, name).to(getattr(torch, dtype))
    config.base_model_name_or_path = base_model(settings)
    config.revision = settings.model.revision
    config.inference_mode = True
    source = resolve(settings.model.path, settings.model.revision, files=TEXT_FILES)
    with new_folder(folder) as unfinished:
        write_text_files(source, unfinished, template, settings.model.eos)
        # With a config.json the folder would count as a whole model.
        (unfinished / "config.json").unlink()
        config.save_pretrained(str(unfinished))
        save_file(tensors, unfinished / WEIGHTS, metadata={"format": "pt"})
        (unfinished / WEIGHTS).chmod(0o644)  # files of safetensors are readable by their owner only


def check_adapter_run(settings: RunSettings) -> None:
    """Check that a run trained adapters.

    Raises:
        ConfigError: lora.rank is not set.
    """
    if settings.lora.rank is None:
        raise ConfigError(
            "--adapter: the run trained all weights (lora.rank=null), so it has no adapters; leave "
            "--adapter out"
        )


def outline(settings: RunSettings) -> PreTrainedModel:
    """The student without adapters, on torch's meta device."""
    return load_layout(settings.model.path, settings.model.revision, setting="model.path")


def base_model(settings: RunSettings) -> str:
    """The hub name, or the absolute path, of the model for which the adapters were trained."""
    path = settings.model.path
    if is_on_hub(path):
        return path
    return str(resolve(path, settings.model.revision).absolute())
