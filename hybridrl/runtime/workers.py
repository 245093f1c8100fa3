"""All workers of a run: what is placed where, how they are started together, and how lost ones are
replaced.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from hybridrl.core.errors import WorkerError, WorkerTimeout
from hybridrl.runtime.actor_group import Slot, dump_stacks
from hybridrl.runtime.calls import Pending
from hybridrl.runtime.cluster import Cluster, Team
from hybridrl.runtime.learner_group import LearnerGroup
from hybridrl.runtime.replay_group import ReplayGroup
from hybridrl.runtime.reward_group import RewardGroup
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.runtime.scorer_group import ScorerGroup
from hybridrl.runtime.start_up import wait_for_start
from hybridrl.settings.choices import Source
from hybridrl.settings.run import RunSettings

log = logging.getLogger(__name__)

Slots = Mapping[str, Sequence[Slot]]
Group = RolloutGroup | ScorerGroup | RewardGroup | ReplayGroup | LearnerGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """The running groups. scorers: one group per scored teacher, in the order of
    settings.scored_teachers.
    """

    rollout: RolloutGroup
    teacher_rollout: RolloutGroup | None  # None: the teacher writes nothing
    replay: ReplayGroup | None  # None: no responses come from the data
    scorers: list[ScorerGroup]
    rewards: RewardGroup
    learner: LearnerGroup
    learners_lost: int = 0

    @property
    def groups(self) -> list[Group]:
        found = (
            self.rollout,
            self.teacher_rollout,
            self.replay,
            *self.scorers,
            self.rewards,
            self.learner,
        )
        return [group for group in found if group is not None]

    @property
    def engines(self) -> list[RolloutGroup]:
        return [group for group in (self.rollout, self.teacher_rollout) if group is not None]

    @property
    def restarts(self) -> int:
        """How many workers have been replaced so far."""
        return sum(sum(group.group.epochs) for group in self.groups) + self.learners_lost

    def silent(self) -> Pending | None:
        """A ping that some engine should have answered by now; None: all answer."""
        return next((ping for group in self.engines if (ping := group.silent()) is not None), None)

    def lose(self, lost: WorkerError) -> None:
        """Replace a worker.

        Raises:
            WorkerError: `lost` itself, where only going back to a checkpoint helps: a learner's
                rank, or values of a lost node.
            FleetExhausted: too many of its kind were lost.
        """
        for group in self.groups:
            if lost.worker in group.group.names and not isinstance(group, LearnerGroup):
                log.warning("%s; starting another worker in its place", lost)
                return group.lose(lost)
        raise lost


def place_workers(settings: RunSettings, cluster: Cluster) -> Slots:
    """Reserve a place for every worker of the run.

    Raises:
        PlacementError: the cluster cannot hold them.
    """
    rollout = settings.rollout
    scorers = [
        Team(name=f"scorer-{name}", size=settings.scorer.replicas, gpus=1, heavy=True)
        for name in settings.scored_teachers
    ]
    return cluster.place(
        [
            Team(name="learner", size=settings.learner.ranks, gpus=1, heavy=True),
            Team(name="rollout", size=rollout.engines, gpus=rollout.tensor_parallel, heavy=True),
            Team(name="reward", size=settings.reward.workers, gpus=0, heavy=False),
            *scorers,
            *(
                [Team(name="teacher", size=1, gpus=rollout.tensor_parallel, heavy=True)]
                if settings.algorithm.teacher_fraction
                else []
            ),
            *(
                [Team(name="replay", size=1, gpus=0, heavy=False)]
                if settings.algorithm.data_fraction
                else []
            ),
        ]
    )


def start_rewards(
    settings: RunSettings, slots: Slots, log_dir: str, say: Callable[[str], None] = log.info
) -> RewardGroup:
    rewards = RewardGroup(settings, slots["reward"], log_dir=log_dir)
    wait_for_start(rewards.ready(), say)
    return rewards


def start_workers(
    settings: RunSettings,
    cluster: Cluster,
    slots: Slots,
    rewards: RewardGroup,
    log_dir: str,
    say: Callable[[str], None] = log.info,
) -> Workers:
    """Start learner, scorers and engines at the same time; return when all answer.

    Args:
        say: prints a line about each worker that is up.

    Raises:
        WorkerError: a worker could not be built, within deadlines.start_s.
    """
    device, backend = cluster.device, cluster.weight_transfer
    engine = {"device": device, "backend": backend, "log_dir": log_dir}
    rollout = RolloutGroup(settings, slots["rollout"], model=settings.model, **engine)
    engines = [rollout]
    if settings.algorithm.teacher_fraction:
        writer = {
            "model": settings.teacher_model(next(iter(settings.teachers))),
            "source": Source.teacher,
            "name": "teacher",
        }
        if (
            settings.cluster.colocate
        ):  # an engine measures the free memory of its GPU; nobody else may move in meanwhile
            wait_for_start(rollout.ready(), say)
        engines.append(RolloutGroup(settings, slots["teacher"], **writer, **engine))
    if settings.cluster.colocate:
        wait_for_start(engines[-1].ready(), say)
    learner = LearnerGroup(settings, slots["learner"], device=device, log_dir=log_dir)
    scorers = [
        ScorerGroup(settings, slots[f"scorer-{name}"], teacher=name, device=device, log_dir=log_dir)
        for name in settings.scored_teachers
    ]
    replay = (
        ReplayGroup(settings, slots["replay"], log_dir=log_dir)
        if settings.algorithm.data_fraction
        else None
    )
    starting = [learner, *scorers, *([replay] if replay else [])]
    if not settings.cluster.colocate:  # else the engines are up already
        starting = [*engines, *starting]
    try:
        wait_for_start([call for group in starting for call in group.ready()], say)
    except WorkerTimeout:
        dump_stacks()
        raise
    return Workers(
        rollout=rollout,
        teacher_rollout=engines[1] if len(engines) == 2 else None,
        replay=replay,
        scorers=scorers,
        rewards=rewards,
        learner=learner,
    )


def recover(
    settings: RunSettings,
    cluster: Cluster,
    slots: Slots,
    workers: Workers,
    lost: WorkerError,
    log_dir: str,
) -> Workers:
    """The same workers with a new learner, and with another worker in the place of `lost` if that
    was none of the learner's; what was being sampled for the old one is given up. The new one is
    under way when this returns.

    Raises:
        FleetExhausted: too many workers of another kind were lost.
    """
    with suppress(WorkerError):
        workers.lose(lost)
    workers.learner.close()
    for engines in workers.engines:
        engines.quiet()
    learner = LearnerGroup(settings, slots["learner"], device=cluster.device, log_dir=log_dir)
    return replace(workers, learner=learner, learners_lost=workers.learners_lost + 1)
