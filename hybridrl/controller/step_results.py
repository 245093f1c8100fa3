"""The results that the parts of a step pass on to later parts."""

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
    """The updates on one batch: the batch, the plan of the updates and their measurements."""

    batch: GlobalBatch
    plan: BatchPlan
    probe_gap: float  # nats a token, the largest over the engines, before the update
    stats: LearnerStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Size and time of a publication of weights, which every engine has received."""

    nbytes: int  # sent to each engine
    seconds: float  # without the probe, and without moving models off and onto a GPU
