"""A trained model as a Hugging Face folder that transformers, vLLM and `vllm serve` load."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hybridrl.errors import CheckpointError
from hybridrl.models.fragments import MASTER, FragmentReader
from hybridrl.models.loading import VALUE_HEAD, VALUE_HEAD_FILE

COMPANIONS = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
)  # config, tokenizer, chat template, generation settings


TEMPLATE = "chat_template.jinja"
"""Where a folder keeps its chat template; it goes before one in tokenizer_config.json."""


def export(
    state: Mapping[str, torch.Tensor | NDArray[np.generic]],
    source: Path,
    folder: Path,
    template: Path | None = None,
) -> None:
    """Write `state` with everything else of the model it was trained from; the folder appears whole or not at all.

    Args:
        state: every parameter by its Hugging Face name, on CPU; dtypes are kept. Tied names may be left out. A value
            head comes with the others and goes to a file of its own, which only loading.load_value_head reads.
        source: the folder that training started from (loading.resolve).
        folder: replaced if it exists.
        template: the chat template that the run trained with; None, or no such file: the source's own.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape is not the model's.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    tensors = {name: torch.as_tensor(value).detach().contiguous() for name, value in state.items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    _check(tensors, config)
    value_head = tensors.pop(VALUE_HEAD, None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for pattern in COMPANIONS:
            for path in source.glob(pattern):
                if not path.name.endswith(".index.json"):  # names the source's weight shards
                    shutil.copy(path, unfinished)
        if template is not None and template.is_file():
            shutil.copy(template, unfinished / TEMPLATE)
        config.dtype = next(iter(tensors.values())).dtype
        config.save_pretrained(unfinished)
        _save(tensors, unfinished / "model.safetensors")
        if value_head is not None:
            _save({VALUE_HEAD: value_head}, unfinished / VALUE_HEAD_FILE)
        unfinished.chmod(0o755)  # mkdtemp makes it for its owner alone
        _swap(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def master_weights(folder: Path, dtype: str) -> dict[str, torch.Tensor]:
    """The student's parameters in a checkpoint, by name, rounded from fp32 to `dtype` as the learner's own are.

    Optimizer moments are not read. A value head, where the run has one, is among them.

    Raises:
        CheckpointError: the folder does not hold a whole learner state.
    """
    reader = FragmentReader(folder)
    return {name: reader.whole(MASTER, name).to(getattr(torch, dtype)) for name in reader.shapes}


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files for their owner alone


def _check(tensors: dict[str, torch.Tensor], config: AutoConfig) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {name: p.shape for name, p in model.named_parameters()}  # tied parameters appear once
    if VALUE_HEAD in tensors:
        wanted[VALUE_HEAD] = torch.Size([1, config.get_text_config().hidden_size])
    problems = [f"{name} is missing" for name in wanted.keys() - tensors.keys()]
    problems += [f"{name} is unknown" for name in tensors.keys() - wanted.keys()]
    problems += [
        f"{name} is {list(t.shape)}, the model needs {list(wanted[name])}"
        for name, t in tensors.items()
        if name in wanted and t.shape != wanted[name]
    ]
    if problems:
        raise CheckpointError(
            f"not the weights of {config.architectures}: {'; '.join(sorted(problems)[:5])}"
        )


def _swap(new: Path, folder: Path) -> None:
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.rename(folder, old)
        os.rename(new, folder)
        shutil.rmtree(old)
    else:
        os.rename(new, folder)
