"""From `reward.functions.NAME.function` to a callable.

A reward function has TRL's batch signature:

    def f(completions: list[str], prompts: list[str], **columns: list) -> list[float]

It is called with keywords, lists of one length: `completions`, `prompts`, `completion_ids`, `prompt_ids` and the
problem's columns, as many of them as its signature names (all, if it has **kwargs), and with its options. Each sequence
must be scored by itself: a function that fails is called again with one sequence at a time.

A class is built once in each child process, from its options; what it builds is then called with the columns.
"""

import difflib
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from hybridrl.errors import ConfigError

RewardFunction = Callable[..., list[float]]

# Import paths, not callables: only the process that runs a function pays for importing what it needs.
BUILT_IN = {
    "countdown": "hybridrl.rewards.countdown:countdown",
    "math": "hybridrl.rewards.maths:math",
    "reasoning_gym": "hybridrl.rewards.reasoning_gym:reasoning_gym",
    "reward_model": "hybridrl.rewards.reward_model:RewardModel",
}


def load_reward(name: str, function: str, options: dict[str, Any]) -> RewardFunction:
    """The callable of `reward.functions.<name>.function`, with its options in it; a file.py:function runs the file.

    Raises:
        ConfigError: unknown name, no such file, no such function in it, the file raises, an option it does not take, a
            class that cannot be built from its options.
    """
    field = f"reward.functions.{name}.function={function}"
    path, colon, attribute = function.rpartition(":")
    if function in BUILT_IN:
        module, _, attribute = BUILT_IN[function].partition(":")
        loaded = getattr(import_module(module), attribute)
    elif colon and path.endswith(".py"):
        loaded = getattr(_module(field, Path(path)), attribute, None)
        if loaded is None:
            raise ConfigError(
                f"{field}: {path} has no {attribute}; name a function that the file defines"
            )
        if not callable(loaded):
            raise ConfigError(
                f"{field}: {attribute} must be callable; name a function that the file defines"
            )
    else:
        near = difflib.get_close_matches(function, BUILT_IN, n=1)
        remedy = (
            f"did you mean {near[0]}?"
            if near
            else "write one of those, or path/to/file.py:function"
        )
        raise ConfigError(
            f"{field}: must be one of {', '.join(BUILT_IN)} or file.py:function; {remedy}"
        )
    accepted = accepted_names(loaded)
    for option in options:
        if accepted is not None and option not in accepted:
            raise ConfigError(
                f"reward.functions.{name}.options.{option}: {function} takes no such argument; remove it"
            )
    return (
        _built(field, loaded, options)
        if isinstance(loaded, type)
        else _with_options(loaded, options)
    )


def accepted_names(function: RewardFunction) -> frozenset[str] | None:
    """The keywords that `function` takes; None: any, it has **kwargs."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(
        p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    )


def _built(field: str, kind: type, options: dict[str, Any]) -> RewardFunction:
    try:
        return kind(**options)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from error
    except Exception as error:
        raise ConfigError(
            f"{field}: building it raised {type(error).__name__}: {error}; correct its options"
        ) from error


def _with_options(function: RewardFunction, options: dict[str, Any]) -> RewardFunction:
    @functools.wraps(function)  # with its signature
    def called(**columns: list[Any]) -> list[float]:
        return function(**columns | options)  # over a column of the same name

    return called


def _module(field: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(
            f"{field}: there is no file {path.absolute()}; give a path that every node can read"
        )
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(
            f"{field}: running {path} raised {type(error).__name__}: {error}; correct the file"
        ) from error
    return module
