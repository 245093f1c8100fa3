"""The Ray actor around a worker: a plain class, named by its import path so that the driver never imports torch."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any


def build(path: str, log: str, kwargs: dict[str, Any]) -> Any:
    """Instantiate "module:Class"; what the process prints goes to the file `log`."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush(), sys.stderr.flush()
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)(**kwargs)


class Host:
    """One method at a time, on the process's main thread."""

    def __init__(self, path: str, log: str, kwargs: dict[str, Any]) -> None:
        self.worker = build(path, log, kwargs)

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.worker, method)(*args)

    def pid(self) -> int:
        return os.getpid()


class AsyncHost:
    """Coroutines of one event loop, for a worker that answers while it works."""

    def __init__(self, path: str, log: str, kwargs: dict[str, Any]) -> None:
        self.worker = build(path, log, kwargs)

    async def call(self, method: str, *args: Any) -> Any:
        return await getattr(self.worker, method)(*args)

    async def pid(self) -> int:
        return os.getpid()
