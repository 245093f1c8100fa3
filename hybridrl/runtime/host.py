"""The Ray actor around a worker. The worker is a plain class, named by its import path so that the
driver does not import its module.

An exception of the worker's constructor is stored and raised by every call: otherwise Ray would end
the actor and report only its death.
"""

import importlib
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from hybridrl.core import redact
from hybridrl.core.errors import HybridRLError, PlacementError
from hybridrl.core.importing import collection_paused
from hybridrl.core.trace import trace_of_worker
from hybridrl.runtime.worker_log import WorkerLog
from hybridrl.settings.run import RunSettings


class NotBuilt(Exception):
    """The worker's constructor raised an exception that is not a HybridRLError; the message names
    it.
    """


def log_of(path: str, arguments: Mapping[str, object]) -> WorkerLog:
    """Redirect the output of this process to the log at `path`. Secret environment variables that a
    worker does not need are removed; their values, and the secrets in `arguments`, are masked in
    the log.
    """
    dropped = redact.drop_variables(needed=redact.NEEDED)
    redact.remember([*dropped.values(), *redact.secrets_in(arguments)])
    log = WorkerLog(path)
    redact.log_warnings()
    return log


def build(path: str, arguments: Mapping[str, object]) -> Any:
    """Instantiate "module:Class".

    Returns:
        The worker; an Unbuilt if its constructor raised an exception.
    """
    module, name = path.split(":")
    try:
        if ray.is_initialized() and (gpus := ray.get_gpu_ids()):
            os.environ |= visible_gpus(gpus)
        with collection_paused():
            imported = importlib.import_module(module)
        return getattr(imported, name)(**arguments)
    except Exception as error:
        print(redact.text(traceback.format_exc()), file=sys.stderr)
        return Unbuilt(
            error
            if isinstance(error, HybridRLError)
            else NotBuilt(redact.text(f"{type(error).__name__}: {error}"))
        )


def visible_gpus(gpus: Sequence[int | str]) -> dict[str, str]:
    """The variables that restrict this process to the GPUs that Ray assigned to it. They must be
    set before torch is imported.

    Ray does not set them if RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES is set; all workers would
    then compute on the first GPU. DeepSpeed reads them as numbers, so UUIDs are replaced by the
    numbers of nvidia-smi, which follow the PCI bus.

    Raises:
        PlacementError: an id is neither a number nor the UUID of a GPU, e.g. that of a MIG slice;
            or nvidia-smi does not answer.
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
                f"CUDA_VISIBLE_DEVICES={name}: does not name one GPU of this node, which has "
                f"{', '.join(indices)}; slices of a GPU (MIG) cannot be used, start Ray with "
                "whole GPUs"
            )
        numbers += matches
    return {"CUDA_VISIBLE_DEVICES": ",".join(numbers), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


class Unbuilt:
    """The substitute for a worker that could not be built: every call raises the error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, method: str) -> Any:
        raise self._error


class Host:
    """The actor of a worker with ordinary methods: one call at a time, on the main thread."""

    def __init__(self, path: str, log: str, arguments: Mapping[str, object]) -> None:
        self.trace = trace_of_worker(log, coroutines=False)
        self.log = log_of(log, arguments)
        with self.trace.span("start"):
            self.worker = build(path, arguments)

    def begin_job(self, settings: RunSettings, log: str) -> None:
        """Write to the log of another job from now on, and mask the secrets of its settings too."""
        redact.remember(redact.secrets_in(settings))
        self.log.move(log)

    def call(self, method: str, *args: Any) -> Any:
        with self.trace.span(method):
            return getattr(self.worker, method)(*args)

    def pid(self) -> int:
        return os.getpid()

    def hold(self, value: object) -> None:
        """Does nothing: Ray copies the value to this node before the call."""


class AsyncHost:
    """The actor of a worker whose methods are coroutines of one event loop, so that it answers
    while it works.
    """

    def __init__(self, path: str, log: str, arguments: Mapping[str, object]) -> None:
        self.trace = trace_of_worker(log, coroutines=True)
        self.log = log_of(log, arguments)
        with self.trace.span("start"):
            self.worker = build(path, arguments)

    async def begin_job(self, settings: RunSettings, log: str) -> None:
        """As Host.begin_job."""
        redact.remember(redact.secrets_in(settings))
        self.log.move(log)

    async def call(self, method: str, *args: Any) -> Any:
        with self.trace.span(method):
            return await getattr(self.worker, method)(*args)

    async def pid(self) -> int:
        return os.getpid()

    async def hold(self, value: object) -> None:
        """As Host.hold."""
