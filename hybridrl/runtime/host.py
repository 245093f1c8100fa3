"""The Ray actor around a worker: a plain class, named by its import path so that the driver never
imports torch.

An exception of the worker's constructor is stored and raised by the first call: otherwise Ray would
end the actor and report only its death.
"""

import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from hybridrl.core import redact
from hybridrl.core.errors import HybridRLError, PlacementError
from hybridrl.core.trace import trace_of_worker

STACKS = signal.SIGUSR1
"""Makes a worker write the stack of each of its threads into its log, also while it is busy outside
Python.
"""


class NotBuilt(Exception):
    """The worker's constructor raised another error than a HybridRLError; the message names it."""


def build(path: str, log: str, arguments: Mapping[str, object]) -> Any:
    """Instantiate "module:Class"; the output of the process goes to the file `log`.

    Secrets that the node's environment has beside those of the driver are dropped first. They, and
    those in the settings among `arguments`, are masked in what the process logs.

    Returns:
        The worker; an Unbuilt if its constructor raised an exception.
    """
    dropped = redact.drop_variables(needed=redact.NEEDED)
    redact.remember([*dropped.values(), *redact.secrets_in(arguments)])
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    redact.log_warnings()
    faulthandler.register(STACKS, file=descriptor, all_threads=True)
    module, name = path.split(":")
    try:
        if ray.is_initialized() and (gpus := ray.get_gpu_ids()):
            os.environ |= visible_gpus(gpus)
        return getattr(importlib.import_module(module), name)(**arguments)
    except Exception as error:
        print(redact.text(traceback.format_exc()), file=sys.stderr)
        return Unbuilt(
            error
            if isinstance(error, HybridRLError)
            else NotBuilt(redact.text(f"{type(error).__name__}: {error}"))
        )


def visible_gpus(gpus: Sequence[int | str]) -> dict[str, str]:
    """The variables that restrict this process to the GPUs that Ray assigned to it; they must be
    set before torch is imported.

    Ray does not set them where RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES is set, and all workers
    would compute on the first GPU. DeepSpeed reads them as numbers, so UUIDs become the numbers
    that nvidia-smi gives in the order of the bus.

    Raises:
        PlacementError: an id is neither a number nor a GPU's UUID, as that of a MIG slice, or
            nvidia-smi does not answer.
    """
    names = [str(name) for name in gpus]
    if all(name.isdecimal() for name in names):
        return {"CUDA_VISIBLE_DEVICES": ",".join(names)}
    query = ["nvidia-smi", "--query-gpu=uuid,index", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise PlacementError(
            f"CUDA_VISIBLE_DEVICES={','.join(names)}: nvidia-smi does not say which numbers these "
            f"GPUs have ({error}); start Ray with the GPUs' numbers in CUDA_VISIBLE_DEVICES"
        ) from error
    indices = dict(line.split(", ") for line in answer.stdout.splitlines())
    numbers = []
    for name in names:
        # CUDA also accepts the beginning of a UUID.
        matches = [index for uuid, index in indices.items() if uuid.startswith(name)]
        if name.isdecimal():
            matches = [name]
        if len(matches) != 1:
            raise PlacementError(
                f"CUDA_VISIBLE_DEVICES={name}: is no GPU of this node, which has "
                f"{', '.join(indices)}; slices of a GPU (MIG) cannot be used, start Ray with "
                "whole GPUs"
            )
        numbers += matches
    return {"CUDA_VISIBLE_DEVICES": ",".join(numbers), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


class Unbuilt:
    """Stands in for a worker that could not be built: every call raises the error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, method: str) -> Any:
        raise self._error


class Host:
    """One method at a time, on the process's main thread."""

    def __init__(self, path: str, log: str, arguments: Mapping[str, object]) -> None:
        self.trace = trace_of_worker(log, coroutines=False)
        with self.trace.span("start"):
            self.worker = build(path, log, arguments)

    def call(self, method: str, *args: Any) -> Any:
        with self.trace.span(method):
            return getattr(self.worker, method)(*args)

    def pid(self) -> int:
        return os.getpid()

    def hold(self, value: object) -> None:
        """Ray copies the value to this node before it calls this."""


class AsyncHost:
    """Coroutines of one event loop, for a worker that answers while it works."""

    def __init__(self, path: str, log: str, arguments: Mapping[str, object]) -> None:
        self.trace = trace_of_worker(log, coroutines=True)
        with self.trace.span("start"):
            self.worker = build(path, log, arguments)

    async def call(self, method: str, *args: Any) -> Any:
        with self.trace.span(method):
            return await getattr(self.worker, method)(*args)

    async def pid(self) -> int:
        return os.getpid()

    async def hold(self, value: object) -> None:
        """As Host.hold."""
