"""All workers of a run: what is placed where, and how they are started together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybridrl.choices import Source
from hybridrl.config import ModelConfig, RunSettings
from hybridrl.runtime.calls import gather
from hybridrl.runtime.cluster import Cluster, Team
from hybridrl.runtime.group import Slot
from hybridrl.runtime.groups import LearnerGroup, RewardGroup, RolloutGroup, ScorerGroup
from hybridrl.runtime.replay import ReplayGroup

Slots = Mapping[str, Sequence[Slot]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """The running groups. scorers: one group per scored teacher, in the order of settings.scored_teachers."""

    rollout: RolloutGroup
    teacher_rollout: RolloutGroup | None  # None: the teacher writes nothing
    replay: ReplayGroup | None  # None: no responses come from the data
    scorers: list[ScorerGroup]
    rewards: RewardGroup
    learner: LearnerGroup


def place_workers(settings: RunSettings, cluster: Cluster) -> Slots:
    """Reserve a place for every worker of the run.

    Raises:
        PlacementError: the cluster cannot hold them.
    """
    rollout = settings.rollout
    scorers = [Team(name=f"scorer-{name}", size=settings.scorer.replicas, gpus=1, heavy=True) for name in settings.scored_teachers]
    return cluster.place(
        [
            Team(name="learner", size=settings.learner.ranks, gpus=1, heavy=True),
            Team(name="rollout", size=rollout.engines, gpus=rollout.tensor_parallel, heavy=True),
            Team(name="reward", size=settings.reward.workers, gpus=0, heavy=False),
            *scorers,
            *([Team(name="teacher", size=1, gpus=rollout.tensor_parallel, heavy=True)] if settings.algorithm.teacher_fraction else []),
            *([Team(name="replay", size=1, gpus=0, heavy=False)] if settings.algorithm.data_fraction else []),
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
    engine = {"device": device, "backend": backend, "log_dir": log_dir}
    rollout = RolloutGroup(settings, slots["rollout"], model=settings.model, **engine)
    engines = [rollout]
    if settings.algorithm.teacher_fraction:
        writer = {"model": teacher_model(settings), "source": Source.teacher, "name": "teacher"}
        if settings.cluster.colocate:  # an engine measures the free memory of its GPU; nobody else may move in meanwhile
            gather(rollout.ready())
        engines.append(RolloutGroup(settings, slots["teacher"], **writer, **engine))
    if settings.cluster.colocate:
        gather(engines[-1].ready())
    learner = LearnerGroup(settings, slots["learner"], device=device, log_dir=log_dir)
    scorers = [
        ScorerGroup(settings, slots[f"scorer-{name}"], teacher=name, device=device, log_dir=log_dir) for name in settings.scored_teachers
    ]
    replay = ReplayGroup(settings, slots["replay"], log_dir=log_dir) if settings.algorithm.data_fraction else None
    starting = [*engines, learner, *scorers, *([replay] if replay else [])]
    gather([pending for group in starting for pending in group.ready()])
    return Workers(
        rollout=rollout,
        teacher_rollout=engines[1] if len(engines) == 2 else None,
        replay=replay,
        scorers=scorers,
        rewards=rewards,
        learner=learner,
    )


def teacher_model(settings: RunSettings) -> ModelConfig:
    """The first teacher, as a model that an engine can serve."""
    teacher = next(iter(settings.teachers.values()))
    return ModelConfig(path=teacher.path, dtype=teacher.dtype) if teacher.path else settings.model
