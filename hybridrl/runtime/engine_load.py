"""The assignment of chunks to engines: each goes to the engine with the fewest pending tokens."""

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hybridrl.runtime.calls import Pending, ended


@dataclass(frozen=True, slots=True)
class Work:
    """A chunk under way."""

    tokens: int
    header: Pending  # done when the chunk is


class EngineLoad:
    """Counts the pending tokens of each engine: the prompts and longest possible responses of the
    chunks that are not done.

    Example: of two idle engines, chunks of [5, 5, 5] tokens go to the engines [0, 1, 0].
    """

    def __init__(self, num_engines: int) -> None:
        self.under_way: list[list[Work]] = [[] for _ in range(num_engines)]  # per engine

    def assign(self, tokens: Sequence[int], serving: Collection[int]) -> list[int]:
        """Choose an engine of `serving` for each chunk, in order: the one with the fewest pending
        tokens, and the lowest index among equals. The result is reproducible if all are idle.

        Args:
            tokens: the number of tokens of each chunk.
        """
        done = ended([work.header.ref for under_way in self.under_way for work in under_way])
        self.under_way = [
            [work for work in under_way if work.header.ref not in done]
            for under_way in self.under_way
        ]
        loads = [(sum(work.tokens for work in self.under_way[i]), i) for i in serving]
        heapq.heapify(loads)
        engines = []
        for num_tokens in tokens:
            load, engine = loads[0]
            heapq.heapreplace(loads, (load + num_tokens, engine))
            engines.append(engine)
        return engines

    def add(self, engine: int, tokens: int, header: Pending) -> None:
        self.under_way[engine].append(Work(tokens, header))
