"""Records, in every process, which lines that depend on the device are executed.

The process imports instrumented source of the product. A line is written to the file of the process
when it is executed for the first time, so that nothing is lost if the process is killed.
"""

import builtins
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from gpu_coverage.lines import HIT, instrumented

FOLDER = "GPU_LINES_FOLDER"
"""The environment variable with the folder of the recordings."""
PACKAGE = "hybridrl"


class Loader(SourceFileLoader):
    """Compiles the instrumented source of a module, without reading or writing a bytecode file."""

    def get_code(self, fullname: str) -> CodeType:
        name = fullname.replace(".", "/") + ("/__init__" * self.is_package(fullname)) + ".py"
        source = Path(self.path).read_text()
        return compile(instrumented(source, name), self.path, "exec")


class Finder(MetaPathFinder):
    """Finds the modules of the product and gives them the instrumenting Loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{PACKAGE}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(fullname, spec.loader.path)
        return spec


class Recorder:
    """Writes the name of each executed line once; a forked process writes into the same file."""

    def __init__(self, folder: Path) -> None:
        self.seen: set[str] = set()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.file = os.open(folder / str(os.getpid()), flags)

    def hit(self, line: str) -> None:
        if line not in self.seen:
            self.seen.add(line)
            os.write(self.file, f"{line}\n".encode())


def install() -> None:
    """Start recording in this process, if the environment variable FOLDER is set."""
    if folder := os.environ.get(FOLDER):
        setattr(builtins, HIT, Recorder(Path(folder)).hit)
        sys.meta_path.insert(0, Finder())


def recorded(folder: Path) -> set[str]:
    """The names of all lines that any process has executed."""
    return {line for file in folder.iterdir() for line in file.read_text().splitlines()}
