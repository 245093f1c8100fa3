"""Reads config.yaml for the report. The file may be of another version, or edited by hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridrl.core.errors import ConfigError, DataError
from hybridrl.core.files import read_text
from hybridrl.core.json_lines import shortened
from hybridrl.settings.compose import saved_tree

CONFIG = "config.yaml"
ANY = "*"
TEXT = str | None
NUMBER = int | float
SCHEDULE = {"kind": TEXT, "value": NUMBER | None, "end": NUMBER | None, "steps": NUMBER | None}
SHAPE = {
    "model": {"path": TEXT},
    "teachers": {ANY: {"path": TEXT, "url": TEXT, "model": TEXT, "evidence": TEXT}},
    "reward": {"functions": {ANY: {"weight": NUMBER}}},
    "algorithm": {
        "imitation_weight": SCHEDULE,
        "reward_weight": SCHEDULE,
        "pair": {"loss": TEXT},
    },
    "data": {"path": TEXT, "sources": {ANY: {"weight": NUMBER}}},
}
"""The types of settings that the report interprets; ANY stands for every name."""


def read_config(run_dir: Path) -> tuple[dict[str, Any], str]:
    """(the settings, the text) of the config.yaml of a run; both empty if there is no such file.

    Raises:
        DataError: the file does not have the form that a run writes.
        RunDirectoryError: the file is a link or a special file.
        OSError: the file cannot be read.
    """
    path = run_dir / CONFIG
    text = read_text(path)
    if text is None:
        return {}, ""
    try:
        tree = saved_tree(text)
        check_shape(tree, SHAPE)
    except ConfigError as error:
        raise DataError(
            f"{path}: {error}; correct the file, or remove it for a report without settings"
        ) from error
    return tree, text


def check_shape(value: Any, shape: Any, key: str = "") -> None:
    """Compare the types of nested settings with a shape; missing settings and null sections are
    allowed.

    Raises:
        ConfigError: names the first value of another type.
    """
    if not isinstance(shape, Mapping):
        if not isinstance(value, shape) or isinstance(value, bool):
            raise ConfigError(f"{key} is {shortened(value)}, which has a type that no run writes")
    elif isinstance(value, Mapping):
        for name, part in value.items():
            if not isinstance(name, str):
                raise ConfigError(f"{key} has an entry named {shortened(name)}, which is not text")
            if inner := shape.get(name, shape.get(ANY)):
                check_shape(part, inner, f"{key}.{name}" if key else name)
    elif value is not None:
        raise ConfigError(f"{key} is {shortened(value)}, not a section")
