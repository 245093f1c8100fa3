"""Converts imported Python functions to values of `reward.functions.NAME.function`.

Processes on other nodes run a reward function. They load it from its file, so the file must define
the function under its name.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hybridrl.core.errors import ConfigError
from hybridrl.rewards.load import BUILT_IN

WRITE_IT = (
    "write it in a separate file, in a notebook by a cell that begins with "
    "`%%writefile my_rewards.py`, then import my_rewards"
)


def reward_files(rewards: Mapping[str, Callable[..., Any]]) -> dict[str, str]:
    """The file.py:name of each function or class, or the name of a built-in, by the reward's name.

    Example: {"mine": my_rewards.score} -> {"mine": "/home/me/my_rewards.py:score"}

    Raises:
        ConfigError: a value is not a function or class, or a worker could not load it from a file.
    """
    return {name: _reward_file(name, function) for name, function in rewards.items()}


def _reward_file(name: str, function: Callable[..., Any]) -> str:
    field = f"rewards[{name!r}]"
    if isinstance(function, str):
        raise ConfigError(
            f"{field}={function!r}: must be a function, not text; write "
            f"+reward.functions.{name}={function} among the settings"
        )
    kind = type(function).__qualname__
    if not inspect.isfunction(function) and not isinstance(function, type):
        raise ConfigError(
            f"{field}: must be a function or a class, not an object of {kind}; give the function "
            f"or class itself, and its arguments as '+reward.functions.{name}.options="
            "{ARGUMENT: VALUE}'"
        )
    module, attribute = function.__module__, function.__qualname__
    for word, path in BUILT_IN.items():
        if path == f"{module}:{attribute}":
            return word
    if attribute == "<lambda>":
        raise ConfigError(f"{field}: is a lambda, which workers cannot load; {WRITE_IT}")
    if module == "__main__":
        raise ConfigError(
            f"{field}: {attribute} is defined in a notebook or in the script that runs, from which "
            f"workers cannot load it; {WRITE_IT}"
        )
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    if not attribute.isidentifier() or getattr(loaded, attribute, None) is not function:
        raise ConfigError(
            f"{field}: {module} has no {attribute} at its top level that is this function, so "
            "workers cannot load it; define it there under a name of its own, and import the "
            "module again if its file has changed"
        )
    if file is None or Path(file).suffix != ".py":
        raise ConfigError(
            f"{field}: {module} is not a Python file, so workers cannot load it; {WRITE_IT}"
        )
    return f"{Path(file).absolute()}:{attribute}"
