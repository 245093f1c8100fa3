"""Submits the chunks of one wave together, whatever the order in which they arrive."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from hybridrl.types import GenerateOrder, Prompt

Started = TypeVar("Started")


class Waves(Generic[Started]):
    """Holds the chunks of a wave until all have arrived. When the last one arrives, all are
    submitted in chunk order and without yielding to the event loop, so that the order of the
    engine's requests does not depend on arrival times.

    Args:
        submit: starts the sampling of a chunk; `arrive` returns its result to the chunk's caller.
    """

    def __init__(self, submit: Callable[[GenerateOrder, Sequence[Prompt]], Started]) -> None:
        self._submit = submit
        # wave -> chunk -> its order, its prompts, and the future of what `submit` returns
        self._waiting: dict[
            str, dict[int, tuple[GenerateOrder, Sequence[Prompt], asyncio.Future[Started]]]
        ] = {}

    def drop(self) -> None:
        """Forget the waves whose chunks have not all arrived, and cancel the calls that wait."""
        for arrived in self._waiting.values():
            for _, _, started in arrived.values():
                started.cancel()
        self._waiting = {}

    async def arrive(self, order: GenerateOrder, prompts: Sequence[Prompt]) -> Started:
        """Wait for the wave's other chunks; returns the result of `submit` for this one."""
        started: asyncio.Future[Started] = asyncio.get_running_loop().create_future()
        arrived = self._waiting.setdefault(order.wave, {})
        arrived[order.chunk] = (order, prompts, started)
        if len(arrived) == order.num_chunks:
            del self._waiting[order.wave]
            for _, (chunk, chunk_prompts, chunk_started) in sorted(arrived.items()):
                chunk_started.set_result(self._submit(chunk, chunk_prompts))
        return await started
