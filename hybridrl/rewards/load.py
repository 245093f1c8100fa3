"""Loads the callable that `reward.functions.NAME.function` names.

A reward function has TRL's batch signature:

    def f(completions: list[str], prompts: list[str], **columns: list) -> list[float | None]

It is called with its options and with keyword arguments that are lists of equal length:
`completions`, `prompts`, `completion_ids`, `prompt_ids` and the problem's columns, of which it gets
those that its signature names, or all if it has **kwargs. It must score each sequence
independently, since a call that fails is repeated with one sequence at a time.

A class is instantiated with its options once in each child process; the instance is then called
with the columns.
"""

import difflib
import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from hybridrl.core.errors import ConfigError
from hybridrl.core.plain_text import described
from hybridrl.core.user_files import load_from_file

RewardFunction = Callable[..., Any]
"""Returns a list [N] of float | None, or an awaitable of one."""

# Import paths and not callables, so that only a process that runs a function imports its libraries.
BUILT_IN = {
    "countdown": "hybridrl.rewards.countdown:countdown",
    "math": "hybridrl.rewards.maths:math",
    "reasoning_gym": "hybridrl.rewards.reasoning_gym:reasoning_gym",
    "reward_model": "hybridrl.rewards.reward_model:RewardModel",
}


def load_reward(name: str, function: str, options: dict[str, Any]) -> RewardFunction:
    """The callable of `reward.functions.<name>.function` with its options bound.

    Loading a file.py:function executes the file.

    Raises:
        ConfigError: the name is unknown; the file does not exist, raises, or has no such function;
            the function does not take an option; or a class cannot be built from its options.
    """
    field = f"reward.functions.{name}.function={function}"
    path, colon, attribute = function.rpartition(":")
    if function in BUILT_IN:
        module, _, attribute = BUILT_IN[function].partition(":")
        loaded = getattr(import_module(module), attribute)
    elif colon and path.endswith(".py"):
        loaded = load_from_file(field, function)
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
    parameters = _parameters(field, loaded)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option in options:
        if not takes_any and option not in parameters:
            raise ConfigError(
                f"reward.functions.{name}.options.{option}: {function} takes no such argument; "
                "remove it"
            )
    if isinstance(loaded, type):
        return _built(field, loaded, options)
    return _with_options(loaded, options)


def _parameters(field: str, function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{field}: its arguments cannot be read ({described(error)}); name a function written "
            "in Python"
        ) from error
    for parameter in parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise ConfigError(
                f"{field}: its argument {parameter.name} cannot be given by name; "
                "remove the / that follows it"
            )
    return dict(parameters)


def _built(field: str, kind: type, options: dict[str, Any]) -> RewardFunction:
    try:
        built = kind(**options)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from error
    except Exception as error:
        raise ConfigError(
            f"{field}: building it raised {described(error)}; correct its options"
        ) from error
    if not callable(built):
        raise ConfigError(
            f"{field}: an object of this class is called, but it has no __call__; define it, or "
            "name a function"
        )
    _parameters(field, built)
    return built


def _with_options(function: RewardFunction, options: dict[str, Any]) -> RewardFunction:
    """The function with its options bound; they take precedence over columns of the same name."""

    @functools.wraps(function)
    def called(**columns: list[Any]) -> Any:
        return function(**columns | options)

    signature = inspect.signature(function)
    unbound = [p for p in signature.parameters.values() if p.name not in options]
    called.__signature__ = signature.replace(parameters=unbound)  # type: ignore[attr-defined]
    return called
