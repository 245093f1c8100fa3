"""Which files of its author's own a user's file needs: what it imports, directly or through one
another.
"""

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


def imported_files(file: Path) -> list[Path]:
    """The files of the modules that `file` imports, those within functions included, without
    itself.

    Left out are the standard library, installed packages and hybridrl itself, which are of one
    version for the whole environment, and what is imported by a name that only the running program
    knows.
    """
    file = file.resolve()
    found: dict[Path, None] = {}
    waiting = [file]
    while waiting:
        current = waiting.pop()
        for path in modules_of(current, file.parent):
            if path != file and path not in found:
                found[path] = None
                waiting.append(path)
    return sorted(found)


def modules_of(file: Path, folder: Path) -> Iterator[Path]:
    """The files of the modules that one file names in its imports.

    Args:
        folder: of the user's file, whose neighbours it imports by their names.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return  # running it says what is wrong with it
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
    """Where modules of a user's own are looked for, in this order."""
    others = [Path(entry or ".").resolve() for entry in sys.path]
    return [folder, *(path for path in others if not is_installed(path))]


def find_module(names: list[str], roots: list[Path]) -> Iterator[Path]:
    """The files along a dotted name, packages first; the last name may be something inside of a
    module.
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
    """The folder that a package is imported from which was installed as a link to its sources;
    empty for any other.
    """
    with suppress(Exception):  # finders of any package may answer, and raise what they like
        spec = find_spec(top)
        if spec is not None and spec.origin and not is_installed(Path(spec.origin).resolve()):
            return [
                Path(spec.origin).resolve().parents[1 if spec.submodule_search_locations else 0]
            ]
    return []


def is_installed(path: Path) -> bool:
    return path.suffix == ".zip" or any(path.is_relative_to(folder) for folder in INSTALLED)
