"""Trained adapters by themselves, as a folder that peft and vLLM load beside the model."""

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hybridrl.core.errors import CheckpointError, ConfigError
from hybridrl.models.adapters import peft_config
from hybridrl.models.loading import is_on_hub, load_layout, resolve
from hybridrl.settings.run import RunSettings
from hybridrl.weights.fragments import MASTER, FragmentReader
from hybridrl.weights.hugging_face import swap
from hybridrl.weights.parameters import LowRankAdapters

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the names of a model's parameters."""


def export_adapters(state: Path, settings: RunSettings, dtype: str, folder: Path) -> None:
    """Write the adapters of a checkpoint in peft's format; neither the model's weights nor a value
    head are read.

    The folder appears complete or not at all.

    Args:
        state: the folder of the checkpoint, of which fp32 master weights are read.
        dtype: of the written weights.
        folder: replaced if it exists.

    Raises:
        ConfigError: the run trained all weights.
        CheckpointError: the checkpoint lacks an adapter, or holds one in another shape.
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
                f"{state}: lacks {name} in the shape {list(parameter.shape)}, so it is not of "
                f"lora.rank={lora.rank}"
            )
        tensors[PREFIX + name] = reader.whole(MASTER, name).to(getattr(torch, dtype))
    config.base_model_name_or_path = base_model(settings)
    config.revision = settings.model.revision
    config.inference_mode = True
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        config.save_pretrained(str(unfinished))
        save_file(tensors, unfinished / WEIGHTS, metadata={"format": "pt"})
        (unfinished / WEIGHTS).chmod(0o644)  # safetensors makes files for their owner alone
        unfinished.chmod(0o755)  # as mkdtemp does folders
        swap(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def check_adapter_run(settings: RunSettings) -> None:
    """Refuse a run that trained all weights.

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
    """Where a program finds the model beside which the adapters were trained."""
    path = settings.model.path
    if is_on_hub(path):
        return path
    return str(resolve(path, settings.model.revision).absolute())
