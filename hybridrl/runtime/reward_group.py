"""The reward workers."""

from collections.abc import Sequence

from hybridrl.runtime.actor_group import Slot
from hybridrl.runtime.calls import Pending
from hybridrl.runtime.chunk import Chunk
from hybridrl.runtime.stateless_group import StatelessGroup
from hybridrl.settings.run import RunSettings
from hybridrl.types import Sample


class RewardGroup(StatelessGroup):
    """Distributes chunks over the reward workers in turn.

    consumes chunks under way / produces calls that start when their chunk is done / `score` waits
    for nothing.
    """

    worker = "hybridrl.rewards.worker:RewardWorker"

    def __init__(self, settings: RunSettings, slots: Sequence[Slot], *, log_dir: str) -> None:
        watch_only = (
            settings.algorithm.reward_weight.is_zero() and not settings.algorithm.ranks_pairs
        )
        arguments = {
            "config": settings.reward,
            "tokenizer_path": settings.model.path,
            "revision": settings.model.revision,
            "eos": settings.model.eos,
            "watch_only": watch_only,
            "deadline_s": settings.deadlines.reward_s,
            "start_s": settings.deadlines.start_s,
            "device": "cuda" if slots[0].num_gpus else "cpu",
        }
        of_all = [arguments] * len(slots)
        super().__init__(settings, slots, name="reward", arguments=of_all, log_dir=log_dir)
        self.num_alone = 0  # number of calls of score_one

    def score(
        self, chunks: Sequence[Chunk], weights: Sequence[float], only: str | None = None
    ) -> list[Pending]:
        """Start one call per chunk of a wave: -> Rewards. The first worker gets the first chunk.

        Args:
            weights: weights of the reward functions at this step, in the order of reward.functions.
            only: the function that is called; None: all of them.
        """
        return [
            self._score(i % self.group.size, chunk, weights, only) for i, chunk in enumerate(chunks)
        ]

    def score_one(self, chunk: Chunk, weights: Sequence[float], only: str | None = None) -> Pending:
        """As `score`, for a single chunk; successive calls go to the workers in turn."""
        self.num_alone += 1
        return self._score((self.num_alone - 1) % self.group.size, chunk, weights, only)

    def _score(
        self, worker: int, chunk: Chunk, weights: Sequence[float], only: str | None
    ) -> Pending:
        # The deadline counts from the start of the wait for rewards, when the chunks are done.
        limit = self.settings.deadlines.reward_s
        return self.group.submit(worker, "score", chunk.batch.ref, weights, only, deadline_s=limit)

    def samples(self, chunk: Chunk, rewards: Pending, step: int, count: int) -> tuple[Sample, ...]:
        """Wait for the first `count` responses of a chunk as text."""
        limit = self.settings.deadlines.reward_s
        return self.group.submit(
            0, "samples", chunk.batch.ref, rewards.ref, step, count, deadline_s=limit
        ).result()
