"""A trained model as a Hugging Face folder that transformers, vLLM and `vllm serve` load."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hybridrl.errors import CheckpointError

MASTER = "master/"
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt")  # config, tokenizer, chat template, generation settings


def export(state: Mapping[str, torch.Tensor | NDArray[np.generic]], source: Path, folder: Path) -> None:
    """Write `state` with everything else of the model it was trained from; the folder appears whole or not at all.

    Args:
        state: every parameter by its Hugging Face name, on CPU; dtypes are kept. Tied names may be left out.
        source: the folder that training started from (loading.resolve).
        folder: replaced if it exists.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape is not the model's.
    """
    config = AutoConfig.from_pretrained(source)
    tensors = {name: torch.as_tensor(value).detach().contiguous() for name, value in state.items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    _check(tensors, config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for pattern in COMPANIONS:
            for path in source.glob(pattern):
                if not path.name.endswith(".index.json"):  # names the source's weight shards
                    shutil.copy(path, unfinished)
        config.dtype = next(iter(tensors.values())).dtype
        config.save_pretrained(unfinished)
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        (unfinished / "model.safetensors").chmod(0o644)  # safetensors and mkdtemp make files for their owner alone
        unfinished.chmod(0o755)
        _swap(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def master_weights(path: Path, dtype: str) -> dict[str, torch.Tensor]:
    """The student's parameters of a learner.safetensors, by name, rounded from fp32 to `dtype` as the learner's own are.

    Optimizer moments are not read; the value head, which is no part of the language model, is left out.
    """
    with safe_open(path, framework="pt") as file:
        names = [key for key in file.keys() if key.startswith(MASTER) and key != f"{MASTER}value_head.weight"]  # noqa: SIM118 (not a dict)
        return {key.removeprefix(MASTER): file.get_tensor(key).to(getattr(torch, dtype)) for key in names}


def _check(tensors: dict[str, torch.Tensor], config: AutoConfig) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {name: p.shape for name, p in model.named_parameters()}  # tied parameters appear once
    problems = [f"{name} is missing" for name in wanted.keys() - tensors.keys()]
    problems += [f"{name} is unknown" for name in tensors.keys() - wanted.keys()]
    problems += [
        f"{name} is {list(t.shape)}, the model needs {list(wanted[name])}"
        for name, t in tensors.items()
        if name in wanted and t.shape != wanted[name]
    ]
    if problems:
        raise CheckpointError(f"not the weights of {config.architectures}: {'; '.join(sorted(problems)[:5])}")


def _swap(new: Path, folder: Path) -> None:
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.rename(folder, old)
        os.rename(new, folder)
        shutil.rmtree(old)
    else:
        os.rename(new, folder)
