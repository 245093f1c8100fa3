"""The bytes that one step put into the object store."""

from collections.abc import Sequence
from dataclasses import dataclass

from hybridrl.types import ChunkHeader, ScoreHeader


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Bytes of one step, which has one wave or several. They determine how many waves the pipeline
    may have under way.

    Example: two chunks of 100 bytes with scores of 30 bytes each: rollout_bytes 200, score_bytes
    60, stored_bytes 260.
    """

    rollout_bytes: int
    score_bytes: int
    weight_bytes: int  # sent to each engine

    @property
    def stored_bytes(self) -> int:
        """Bytes of all waves of the step in the object store: their rollouts and scores."""
        return self.rollout_bytes + self.score_bytes


def step_cost(
    headers: Sequence[ChunkHeader], scores: Sequence[ScoreHeader], weight_bytes: int
) -> StepCost:
    return StepCost(
        rollout_bytes=int(sum(header.nbytes for header in headers)),
        score_bytes=int(sum(sum(score.nbytes.values()) for score in scores)),
        weight_bytes=weight_bytes,
    )
