"""The files that a user's Python file imports, directly or indirectly, other than packages."""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

INSTALLED = tuple(
    Path(sysconfig.get_path(kind)).resolve()
    for kind in ("stdlib", "platstdlib", "purelib", "platlib")
)
"""Folders of the standard library and of installed packages."""


def imported_files(file: Path) -> list[Path]:
    """The files of the modules that `file` imports, without itself; imports in functions count.

    The standard library, installed packages and hybridrl itself are excluded: each has one version
    for the whole environment. So are imports by a name that is computed while the program runs.
    """
    file = file.resolve()
    files: dict[Path, None] = {}
    waiting = [file]
    while waiting:
        current = waiting.pop()
        for path in modules_of(current, file.parent):
            if path != file and path not in files:
                files[path] = None
                waiting.append(path)
    return sorted(files)


def modules_of(file: Path, folder: Path) -> Iterator[Path]:
    """The files of the modules that one file names in its imports.

    Args:
        folder: the folder of the user's file, whose neighbours it imports by their names.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return  # loading the function raises an error that names the cause
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from find_module(alias.name.split("."), search_path(folder))
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            roots = [file.parents[node.level - 1]] if node.level else search_path(folder)
            for alias in node.names:
                yield from find_module([*base, alias.name], roots)


def search_path(folder: Path) -> list[Path]:
    """The folders that are searched for a user's own modules, in this order."""
    others = [Path(entry or ".").resolve() for entry in sys.path]
    return [folder, *(path for path in others if not is_installed(path))]


def find_module(names: list[str], roots: list[Path]) -> Iterator[Path]:
    """The files along a dotted name, packages first.

    The last part of the name may be an object inside of a module instead.
    """
    top = names[0]
    if top in sys.stdlib_module_names or top in ("hybridrl", "*"):
        return
    for root in [*roots, *editable_root(top)]:
        place = root
        files = []
        for name in names:
            place = place / name
            candidates = (place / "__init__.py", place.with_name(f"{name}.py"))
            files += [path.resolve() for path in candidates if path.is_file()][:1]
            if not place.is_dir():
                break
        if files:
            yield from files
            return


def editable_root(top: str) -> list[Path]:
    """The folder from which an editable install imports a package; empty for any other package."""
    with suppress(Exception):  # any package may add a finder, which may raise any exception
        spec = find_spec(top)
        if spec is not None and spec.origin and not is_installed(Path(spec.origin).resolve()):
            return [
                Path(spec.origin).resolve().parents[1 if spec.submodule_search_locations else 0]
            ]
    return []


def is_installed(path: Path) -> bool:
    """Whether a path is inside of INSTALLED or in an archive."""
    return path.suffix == ".zip" or any(path.is_relative_to(folder) for folder in INSTALLED)
