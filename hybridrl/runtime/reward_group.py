"""The reward workers."""

from collections.abc import Sequence

from hybridrl.core.errors import (
    WorkerError,
)
from hybridrl.runtime.actor_group import ActorGroup, Slot
from hybridrl.runtime.calls import Pending
from hybridrl.runtime.chunk import Chunk
from hybridrl.runtime.replaceable import replaceable
from hybridrl.settings.run import RunSettings
from hybridrl.types import (
    Sample,
)


class RewardGroup:
    worker = "hybridrl.rewards.worker:RewardWorker"

    def __init__(self, settings: RunSettings, slots: Sequence[Slot], *, log_dir: str) -> None:
        self.settings = settings
        watch_only = (
            settings.algorithm.reward_weight.is_zero() and not settings.algorithm.ranks_pairs
        )
        model = {"tokenizer_path": settings.model.path, "revision": settings.model.revision}
        kwargs = {
            "config": settings.reward,
            **model,
            "watch_only": watch_only,
            "deadline_s": settings.deadlines.reward_s,
        }
        self.group = ActorGroup(
            "reward", self.worker, slots, [kwargs] * len(slots), **replaceable(settings, log_dir)
        )

    def lose(self, lost: WorkerError) -> None:
        """Start another worker in its place; it holds no state that the run would miss."""
        self.group.rebuild(lost, self.settings.deadlines.start_s)

    def ready(self) -> list[Pending]:
        return self.group.submit_all("ping", deadline_s=self.settings.deadlines.start_s)

    def score(self, chunks: Sequence[Chunk], weights: Sequence[float]) -> list[Pending]:
        """One call per chunk: -> Rewards. `weights`: of the functions at this step, in the order of
        reward.functions.
        """
        limit = self.settings.deadlines.reward_s  # as of a score
        return [
            self.group.submit(i % self.group.size, "score", c.batch.ref, weights, deadline_s=limit)
            for i, c in enumerate(chunks)
        ]

    def samples(self, chunk: Chunk, rewards: Pending, step: int, count: int) -> tuple[Sample, ...]:
        """The first `count` rollouts of a chunk as text."""
        limit = self.settings.deadlines.reward_s
        return self.group.submit(
            0, "samples", chunk.batch.ref, rewards.ref, step, count, deadline_s=limit
        ).result()
