"""All workers of a run: what is placed where, and how they are started together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybridrl.config import RunSettings
from hybridrl.runtime.calls import gather
from hybridrl.runtime.cluster import Cluster, Team
from hybridrl.runtime.group import Slot
from hybridrl.runtime.groups import LearnerGroup, RewardGroup, RolloutGroup, ScorerGroup

Slots = Mapping[str, Sequence[Slot]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """The running groups. scorers: one group per teacher, in the order of settings.teachers; none for pure RL."""

    rollout: RolloutGroup
    scorers: list[ScorerGroup]
    rewards: RewardGroup
    learner: LearnerGroup


def scored_teachers(settings: RunSettings) -> list[str]:
    return [] if settings.algorithm.imitation_weight.is_zero() else list(settings.teachers)


def place_workers(settings: RunSettings, cluster: Cluster) -> Slots:
    """Reserve a place for every worker of the run.

    Raises:
        PlacementError: the cluster cannot hold them.
    """
    scorers = [Team(name=f"scorer-{name}", size=settings.scorer.replicas, gpus=1, heavy=True) for name in scored_teachers(settings)]
    return cluster.place(
        [
            Team(name="learner", size=settings.learner.ranks, gpus=1, heavy=True),
            Team(name="rollout", size=settings.rollout.engines, gpus=settings.rollout.tensor_parallel, heavy=True),
            Team(name="reward", size=settings.reward.workers, gpus=0, heavy=False),
            *scorers,
        ]
    )


def start_rewards(settings: RunSettings, slots: Slots, log_dir: str) -> RewardGroup:
    rewards = RewardGroup(settings, slots["reward"], log_dir=log_dir)
    gather(rewards.ready())
    return rewards


def start_workers(settings: RunSettings, cluster: Cluster, slots: Slots, rewards: RewardGroup, log_dir: str) -> Workers:
    """Start learner, scorers and engines at the same time; return when all answer.

    Raises:
        WorkerError: a worker could not be built, within deadlines.start_s.
    """
    device, backend = cluster.device, cluster.weight_transfer
    learner = LearnerGroup(settings, slots["learner"], device=device, log_dir=log_dir)
    rollout = RolloutGroup(settings, slots["rollout"], model=settings.model, device=device, backend=backend, log_dir=log_dir)
    scorers = [
        ScorerGroup(settings, slots[f"scorer-{name}"], teacher=name, device=device, log_dir=log_dir) for name in scored_teachers(settings)
    ]
    gather([*learner.ready(), *rollout.ready(), *(p for scorer in scorers for p in scorer.ready())])
    return Workers(rollout=rollout, scorers=scorers, rewards=rewards, learner=learner)
