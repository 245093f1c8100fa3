"""Checks of a model folder before it is loaded: sizes in config.json, and safetensors files."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hybridrl.core.errors import ConfigError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

MOST_LAYERS = 10_000
"""Largest number of layers, blocks or experts of a config.json.

transformers builds all of them before it reads a weight.
"""
COUNTS = re.compile(r".*(layers?|blocks|experts)")


def check_config_file(folder: Path, where: str) -> None:
    """Refuse a config.json with absurd sizes or with the name of a weight file.

    Building an absurd number of layers would take forever. A config.json that is not a JSON object
    is left to transformers, whose error becomes a ConfigError.

    Args:
        where: the setting and its value, e.g. "model.path=/models/a", with which an error begins.

    Raises:
        ConfigError: the file has more than MOST_LAYERS layers, blocks or experts, or names its
            weight file (transformers_weights).
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return
    for key, value in _numbers(config):
        if COUNTS.fullmatch(key) and abs(value) > MOST_LAYERS:
            raise ConfigError(
                f"{where}: config.json says {key}={value:.0f}, the limit is {MOST_LAYERS}; "
                "correct its config.json"
            )
    if isinstance(config, dict) and config.get("transformers_weights") is not None:
        raise ConfigError(
            f"{where}: config.json sets transformers_weights, which is not supported; "
            f"name the weights {WEIGHTS} and remove the key"
        )


def _numbers(config: Any) -> Iterator[tuple[str, float]]:
    """Every number that is the value of a key, at any depth that json.loads can read."""
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
            for key, number in value.items():
                if isinstance(number, int | float) and not isinstance(number, bool):
                    yield key, number


def tensor_files(folder: Path, where: str) -> dict[str, Path]:
    """The file of each tensor, by the tensor's name in it; only headers are read.

    Args:
        where: as in check_config_file.

    Raises:
        ConfigError: there is no safetensors file; the index or a header is damaged; the index names
            a file that is missing or outside of the folder; or the folder has two sets of weights,
            or adapters beside its weights.
    """
    names = sorted(set(index_of(folder, where).values()))
    if not names and not (folder / WEIGHTS).is_file():
        raise ConfigError(f"{where}: {_no_weights(folder)}")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ConfigError(
            f"{where}: {INDEX} names {missing[0]}, which is missing; copy or download the model "
            "again"
        )
    if names and WEIGHTS not in names and (folder / WEIGHTS).is_file():
        raise ConfigError(
            f"{where}: holds two sets of weights, {WEIGHTS} and the files of {INDEX}; remove one"
        )
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{where}: holds adapters beside its weights (adapter_config.json), which some "
            "programs load and others do not; merge them into the weights, or remove them"
        )
    files: dict[str, Path] = {}
    for file in (folder / name for name in names or [WEIGHTS]):
        with open_weights(file, where) as tensors:
            files |= dict.fromkeys(tensors.keys(), file)
    return files


def index_of(folder: Path, where: str) -> dict[str, str]:
    """The file name of each tensor by the index of the weight files; empty without an index.

    Raises:
        ConfigError: the index is damaged, or names a file outside of the folder.
    """
    index = folder / INDEX
    if not index.is_file():
        return {}
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {str(key): name for key, name in weight_map.items()}
        escaped = [name for name in files.values() if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{where}: {INDEX} is damaged: {error or type(error).__name__}; copy or download the "
            "model again"
        ) from error
    if escaped:
        raise ConfigError(
            f"{where}: {INDEX} names {escaped[0]}, a file outside of the folder; copy or download "
            "the model again"
        )
    return files


def open_weights(file: Path, where: str) -> safe_open:
    """Open a safetensors file and check its header.

    Raises:
        ConfigError: it is damaged, or shorter than its header says.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{where}: {file.name} is damaged or cut off: {error}; copy or download the model again"
        ) from error


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    pickles += sorted(path.name for path in folder.glob("*.pt*"))
    if not pickles:
        return f"holds no {WEIGHTS}; give a folder with the weights of a whole model"
    return (
        f"holds pickled weights ({pickles[0]}), which are not read because a pickle can run code; "
        "convert them once: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW), and "
        "copy the tokenizer's files to NEW"
    )
