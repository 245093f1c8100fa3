"""Chunks of one wave are submitted together, whatever the order in which they arrive."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from hybridrl.types import GenerateOrder, Prompt

Started = TypeVar("Started")


class Waves(Generic[Started]):
    """Holds the chunks of a wave until all are here. The last to arrive submits every one, in chunk
    order and without yielding, so that what the engine sees does not depend on arrival times.

    Args:
        submit: starts the sampling of a chunk; what it returns is handed to the chunk's caller.
    """

    def __init__(self, submit: Callable[[GenerateOrder, Sequence[Prompt]], Started]) -> None:
        self._submit = submit
        # wave -> chunk -> its order, its prompts, and the future of what `submit` returns
        self._waiting: dict[
            str, dict[int, tuple[GenerateOrder, Sequence[Prompt], asyncio.Future[Started]]]
        ] = {}

    async def arrive(self, order: GenerateOrder, prompts: Sequence[Prompt]) -> Started:
        """Wait for the wave's other chunks. Returns what `submit` made of this one."""
        gate: asyncio.Future[Started] = asyncio.get_running_loop().create_future()
        arrived = self._waiting.setdefault(order.wave, {})
        arrived[order.chunk] = (order, prompts, gate)
        if len(arrived) == order.num_chunks:
            del self._waiting[order.wave]
            for _, (chunk, chunk_prompts, chunk_gate) in sorted(arrived.items()):
                chunk_gate.set_result(self._submit(chunk, chunk_prompts))
        return await gate
