"""The Ray actor around a worker: a plain class, named by its import path so that the driver never imports torch.

What a worker's constructor raises is kept and raised by the first call: Ray would end the actor and tell of its death.
"""

import faulthandler
import importlib
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from hybridrl import redact
from hybridrl.errors import HybridRLError

STACKS = signal.SIGUSR1
"""Makes a worker write the stack of each of its threads into its log, also while it is busy outside Python."""


class NotBuilt(Exception):
    """The worker's constructor raised what is no HybridRLError; the message names it."""


def build(path: str, log: str, kwargs: dict[str, Any]) -> Any:
    """Instantiate "module:Class"; what the process prints goes to the file `log`. On an error: an Unbuilt.

    Secrets that the node's environment had beside those of the driver are dropped first. They, and those in the settings among
    `kwargs`, are masked in what the process logs.
    """
    dropped = redact.drop_variables(needed=redact.NEEDED)
    redact.remember([*dropped.values(), *redact.secrets_in(kwargs)])
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush(), sys.stderr.flush()
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    redact.log_warnings()
    faulthandler.register(STACKS, file=descriptor, all_threads=True)
    module, name = path.split(":")
    try:
        return getattr(importlib.import_module(module), name)(**kwargs)
    except Exception as error:
        print(redact.text(traceback.format_exc()), file=sys.stderr)
        return Unbuilt(
            error
            if isinstance(error, HybridRLError)
            else NotBuilt(redact.text(f"{type(error).__name__}: {error}"))
        )


class Unbuilt:
    """In the place of a worker that could not be built."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, method: str) -> Any:
        raise self._error


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
