"""Workers that fail as they are told; a file of its own, so that their process imports nothing
heavy.
"""

import asyncio
import os

from ray.exceptions import ObjectLostError

from hybridrl.core import failpoints


class Failing:
    """Raises, or ends its process, where it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        if error is not None:
            raise error

    def ping(self) -> str:
        return "here"

    def lose_value(self) -> None:
        """As if the node that kept the result had gone."""
        raise ObjectLostError("ab" * 28, None, "")

    def take(self, value: object) -> None: ...

    def die(self) -> None:
        os._exit(7)


class AsyncFailing(Failing):
    async def ping(self) -> str:
        return "here"


class Engine:
    """In the place of a rollout engine; fails where a failpoint says so."""

    def __init__(self, **_: object) -> None: ...

    async def ping(self) -> str:
        return "here"

    async def generate(self, order: object, prompts: object) -> tuple[str, str]:
        failpoints.hit("engine.generate")
        return "header", "batch"

    async def load_weights(self, manifest: str, packed: object) -> None:
        failpoints.hit("engine.load_weights")


class Judge:
    """In the place of a reward worker."""

    def __init__(self, **_: object) -> None: ...

    def score(self, batch: str, weights: object) -> str:
        return batch


class Patient:
    """Its calls wait for one that lets them through."""

    def __init__(self) -> None:
        self.gate, self.through = asyncio.Event(), 0

    async def wait(self) -> None:
        await self.gate.wait()
        self.through += 1

    async def ping(self) -> int:
        return self.through

    async def go(self) -> None:
        self.gate.set()
