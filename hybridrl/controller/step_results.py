"""What the parts of a step give to the parts after them."""

from dataclasses import dataclass

from hybridrl.controller.global_batch import GlobalBatch
from hybridrl.controller.sampling import Arrived
from hybridrl.types import BatchPlan, ChunkHeader, LearnerStats, Prompt, Rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The rollouts of one step, with their rewards."""

    arrived: list[Arrived]
    returning: list[Prompt]  # of groups that were cancelled or too old; they are drawn again
    num_sampled: int  # prompts, including the cancelled ones
    num_waves: int

    @property
    def headers(self) -> list[ChunkHeader]:
        return [a.header for a in self.arrived]

    @property
    def rewards(self) -> list[Rewards]:
        return [a.rewards for a in self.arrived]


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What the learner did with a batch: the batch, the plan of its updates and their
    measurements.
    """

    batch: GlobalBatch
    plan: BatchPlan
    probe_gap: float  # nats a token, the largest of an engine before the update
    stats: LearnerStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Weights that every engine has got."""

    nbytes: int  # sent to each engine
    seconds: float  # without the probe, and without making room on a GPU
