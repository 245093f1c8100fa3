"""From `reward.functions.NAME.function` to a callable.

A reward function has TRL's batch signature:

    def f(completions: list[str], prompts: list[str], **columns: list) -> list[float | None]

It is called with keywords, lists of one length: `completions`, `prompts`, `completion_ids`,
`prompt_ids` and the problem's columns, as many of them as its signature names (all, if it has
**kwargs), and with its options. Each sequence must be scored by itself: a function that fails is
called again with one sequence at a time.

A class is built once in each child process, from its options; what it builds is then called with
the columns.
"""

import difflib
import functools
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from hybridrl.core.errors import ConfigError
from hybridrl.rewards.text import described

RewardFunction = Callable[..., Any]  # a list [N] of float | None, or an awaitable of one

# Import paths, not callables: only the process that runs a function pays for importing what it
# needs.
BUILT_IN = {
    "countdown": "hybridrl.rewards.countdown:countdown",
    "math": "hybridrl.rewards.maths:math",
    "reasoning_gym": "hybridrl.rewards.reasoning_gym:reasoning_gym",
    "reward_model": "hybridrl.rewards.reward_model:RewardModel",
}


def load_reward(name: str, function: str, options: dict[str, Any]) -> RewardFunction:
    """The callable of `reward.functions.<name>.function`, with its options in it; a
    file.py:function runs the file.

    Raises:
        ConfigError: unknown name, no such file, no such function in it, the file raises, an option
            it does not take, a class that cannot be built from its options.
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
        raise ConfigError(f"{field}: an object of this class is called, but it has no __call__")
    _parameters(field, built)
    return built


def _with_options(function: RewardFunction, options: dict[str, Any]) -> RewardFunction:
    """The function with its options given, which stand over columns of their names."""

    @functools.wraps(function)
    def called(**columns: list[Any]) -> Any:
        return function(**columns | options)

    signature = inspect.signature(function)
    free = [p for p in signature.parameters.values() if p.name not in options]
    called.__signature__ = signature.replace(parameters=free)
    return called


def _module(field: str, path: Path) -> ModuleType:
    """The file as a module, run once in this process.

    It is imported under its own name, from its own folder, as `python path` would do: it can import
    its neighbours, and a process that it starts can import its functions. Where that name means
    another module (math.py, or a second rewards.py), it has a private name instead, under which
    processes that are started by spawn cannot import it.
    """
    path = path.absolute()
    if not path.is_file():
        raise ConfigError(f"{field}: there is no file {path}; give a path that every node can read")
    if str(path) in _modules:
        return _modules[str(path)]
    _check_neighbours(field, path)
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = _spec(path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[spec.name]
        raise ConfigError(
            f"{field}: running {path} raised {described(error)}; correct the file"
        ) from error
    _modules[str(path)] = module
    return module


_modules: dict[str, ModuleType] = {}  # by absolute path


def _spec(path: Path) -> ModuleSpec | None:
    name = path.stem
    if name not in sys.modules:
        importlib.invalidate_caches()
        found = importlib.util.find_spec(name) if name.isidentifier() else None
        if found is not None and found.origin == str(path):
            return found
    private = f"reward_file_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    return importlib.util.spec_from_file_location(private, path)


def _check_neighbours(field: str, path: Path) -> None:
    """Refuse a file whose imports would give it modules from the folder of another reward file."""
    for loaded in _modules.values():
        other = Path(str(loaded.__file__)).parent
        if other == path.parent:
            continue
        for neighbour in path.parent.iterdir():
            module = sys.modules.get(neighbour.stem)
            source = getattr(module, "__file__", None)
            if source is None or module is loaded:
                continue
            if Path(source).parent in (other, other / neighbour.stem):
                raise ConfigError(
                    f"{field}: {path.parent} and {other} both have {neighbour.name}, and one "
                    "process can import only one of them; rename one, or put both reward files "
                    "into one folder"
                )
