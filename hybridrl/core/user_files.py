"""A user's Python file as a module of this process."""

import hashlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from hybridrl.core.errors import ConfigError
from hybridrl.core.plain_text import described


def load_from_file(field: str, name: str, kind: str = "function") -> Any:
    """The callable that a user's file defines under a name; the file runs once in this process.

    Args:
        field: the setting and its value, with which an error begins.
        name: file.py:name.
        kind: what errors call it, "function" or "class".

    Raises:
        ConfigError: there is no such file, it raises, or it defines no callable of that name.
    """
    path, _, attribute = name.rpartition(":")
    loaded = getattr(load_file(field, Path(path)), attribute, None)
    if loaded is None:
        raise ConfigError(
            f"{field}: {path} has no {attribute}; name a {kind} that the file defines"
        )
    if not callable(loaded):
        raise ConfigError(
            f"{field}: {attribute} must be callable; name a {kind} that the file defines"
        )
    return loaded


def load_file(field: str, path: Path) -> ModuleType:
    """The file as a module, run once in this process.

    It is imported under its own name, from its own folder, as `python path` would do: it can import
    its neighbours, and a process that it starts can import its functions. Where that name belongs
    to another module (math.py, or a second rewards.py), it is imported under a private name, under
    which processes started by spawn cannot import it.

    Raises:
        ConfigError: there is no such file, or it raises.
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
    sys.modules[spec.name] = module  # dataclasses look up their module by its name
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
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is not None and spec.origin == str(path):
            return spec
    private = f"user_file_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    return importlib.util.spec_from_file_location(private, path)


def _check_neighbours(field: str, path: Path) -> None:
    """Refuse a file that would import modules from the folder of another such file."""
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
                    "process can import only one of them; rename one, or put both files into "
                    "one folder"
                )
