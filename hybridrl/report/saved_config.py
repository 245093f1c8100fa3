"""config.yaml as the report reads it: of this version or another one, written by a run or by
anybody.
"""

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
    "teachers": {ANY: {"path": TEXT}},
    "reward": {"functions": {ANY: {"weight": NUMBER}}},
    "algorithm": {
        "imitation_weight": SCHEDULE,
        "reward_weight": SCHEDULE,
        "pair": {"loss": TEXT},
    },
    "data": {"path": TEXT},
}
"""What the report takes for granted of the settings that it names; all others are only shown."""


def read_config(run_dir: Path) -> tuple[dict[str, Any], str]:
    """(the settings, the text) of a run; empty ones where there is no file.

    Raises:
        DataError: the file is not what a run writes.
        RunDirectoryError: it is a link or a special file.
        OSError: it cannot be read.
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
    """Raise ConfigError where a value has another type than the shape says; what is missing, and a
    section that is null, fit.
    """
    if not isinstance(shape, Mapping):
        if not isinstance(value, shape) or isinstance(value, bool):
            raise ConfigError(f"{key} is {shortened(value)}, not of a kind that a run writes")
    elif isinstance(value, Mapping):
        for name, part in value.items():
            if not isinstance(name, str):
                raise ConfigError(f"{key} has an entry named {shortened(name)}, which is no text")
            if inner := shape.get(name, shape.get(ANY)):
                check_shape(part, inner, f"{key}.{name}" if key else name)
    elif value is not None:
        raise ConfigError(f"{key} is {shortened(value)}, not a section")
