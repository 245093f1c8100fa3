"""Workers that fail on demand. This file has no heavy imports, so their processes start quickly."""

import asyncio
import os
import signal

from ray.exceptions import ObjectLostError

from hybridrl.core import failpoints


class Failing:
    """A worker whose constructor raises `error`, if given, and whose methods fail in several
    ways.
    """

    def __init__(self, error: Exception | None = None) -> None:
        if error is not None:
            raise error

    def ping(self) -> str:
        return "here"

    def lose_value(self) -> None:
        """Raise the error that Ray raises for a result on a node that has failed."""
        raise ObjectLostError("ab" * 28, None, "")

    def take(self, value: object) -> None: ...

    def die(self) -> None:
        os._exit(7)

    def hang(self) -> None:
        """Block until the process receives a signal."""
        signal.pause()


class AsyncFailing(Failing):
    async def ping(self) -> str:  # type: ignore[override]
        return "here"


class Engine:
    """A stand-in for a rollout engine, which fails at failpoints."""

    def __init__(self, **_: object) -> None: ...

    async def ping(self) -> str:
        return "here"

    async def generate(self, order: object, prompts: object) -> tuple[str, str]:
        failpoints.hit("engine.generate")
        return "header", "batch"

    async def load_weights(self, manifest: str, packed: object) -> None:
        failpoints.hit("engine.load_weights")


class Judge:
    """A stand-in for a reward worker."""

    def __init__(self, **_: object) -> None: ...

    def score(self, batch: str, weights: object, only: str | None) -> str:
        return batch


class Patient:
    """A worker whose calls of `wait` block until `go` is called."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.num_finished = 0

    async def wait(self) -> None:
        await self.gate.wait()
        self.num_finished += 1

    async def ping(self) -> int:
        return self.num_finished

    async def go(self) -> None:
        self.gate.set()


class Named(Failing):
    """A worker that returns the argument of its constructor."""

    def __init__(self, meeting: str) -> None:
        super().__init__()
        self.meeting = meeting

    def met_at(self) -> str:
        return self.meeting


class OnGpus(Failing):
    """A worker that returns the GPUs of its process."""

    def gpus(self) -> list[str]:
        return os.environ["CUDA_VISIBLE_DEVICES"].split(",")


class OnDevice(OnGpus):
    """A stand-in for a worker whose arguments include its device."""

    def __init__(self, device: str, **_: object) -> None:
        super().__init__()
        self.device = device

    def place(self) -> tuple[str, int]:
        """The worker's device, and the number of GPUs that its process sees."""
        return self.device, len(self.gpus())
