"""All workers of a run: their placement, their common start, and the replacement of failed ones."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from hybridrl.core.errors import WorkerError
from hybridrl.runtime.actor_group import Slot
from hybridrl.runtime.calls import Pending, watch_nothing
from hybridrl.runtime.cluster import Cluster, Team
from hybridrl.runtime.learner_group import LearnerGroup
from hybridrl.runtime.replay_group import ReplayGroup
from hybridrl.runtime.residency import Phase, Residency
from hybridrl.runtime.reward_group import RewardGroup
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.runtime.scorer_group import ScorerGroup
from hybridrl.runtime.start_up import StartUp
from hybridrl.settings.choices import Source
from hybridrl.settings.models import ModelConfig
from hybridrl.settings.run import RunSettings

log = logging.getLogger(__name__)

Slots = Mapping[str, Sequence[Slot]]
Group = RolloutGroup | ScorerGroup | RewardGroup | ReplayGroup | LearnerGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """The worker groups of a run."""

    rollout: RolloutGroup
    teacher_rollout: RolloutGroup | None  # None: the teacher samples no responses
    replay: ReplayGroup | None  # None: no responses come from the data
    scorers: list[ScorerGroup]  # in the order of settings.teachers_with_scorers
    rewards: RewardGroup
    learner: LearnerGroup
    learners_lost: int = 0
    residency: Residency = field(default_factory=lambda: Residency(takes_turns=False))

    def enter(self, phase: Phase) -> None:
        """As Residency.enter."""
        self.residency.enter(phase, self.engines, self.learner)

    @property
    def groups(self) -> list[Group]:
        groups: list[Group] = [*self.engines]
        if self.replay is not None:
            groups.append(self.replay)
        return [*groups, *self.scorers, self.rewards, self.learner]

    @property
    def engines(self) -> list[RolloutGroup]:
        if self.teacher_rollout is None:
            return [self.rollout]
        return [self.rollout, self.teacher_rollout]

    @property
    def restarts(self) -> int:
        """How many workers have been replaced so far."""
        return sum(sum(group.group.epochs) for group in self.groups) + self.learners_lost

    @property
    def intact(self) -> bool:
        """Whether no worker has been replaced and all engines serve."""
        all_serve = all(len(group.fleet.serving) == group.group.size for group in self.engines)
        return all_serve and not self.restarts

    def silent(self) -> Pending | None:
        """An overdue ping of some engine, as Fleet.silent; None: all engines answer."""
        return next((ping for group in self.engines if (ping := group.silent()) is not None), None)

    def lose(self, error: WorkerError, watch: Callable[[], None] = watch_nothing) -> None:
        """Replace the worker that failed.

        Args:
            watch: called every WATCH_S while the new one starts; an exception from it ends the
                wait.

        Raises:
            WorkerError: `error` itself, if the run can only continue from a checkpoint: a learner
                rank failed, or values were lost with a node.
            FleetExhausted: too many workers of its kind failed.
        """
        for group in self.groups:
            if error.worker in group.group.names and not isinstance(group, LearnerGroup):
                log.warning("%s; starting another worker in its place", error)
                return group.lose(error, watch)
        raise error


def place_workers(settings: RunSettings, cluster: Cluster) -> Slots:
    """Reserve a place for every worker of the run.

    Raises:
        PlacementError: the cluster cannot hold them.
    """
    return cluster.place(teams(settings))


def teams(settings: RunSettings) -> list[Team]:
    """The teams of workers of a run, one of each kind."""
    rollout = settings.rollout
    found = [
        Team(name="learner", size=settings.learner.ranks, gpus=1, heavy=True),
        Team(name="rollout", size=rollout.engines, gpus=rollout.tensor_parallel, heavy=True),
        Team(name="reward", size=settings.reward.workers, gpus=settings.reward.gpus, heavy=False),
    ]
    for name in settings.teachers_with_scorers:
        teacher = settings.teachers[name]
        size = settings.scorer.replicas * teacher.devices
        computes = teacher.url is None  # otherwise its scorer only sends requests
        found.append(Team(name=f"scorer-{name}", size=size, gpus=teacher.gpus, heavy=computes))
    if settings.algorithm.teacher_fraction:
        found.append(Team(name="teacher", size=1, gpus=rollout.tensor_parallel, heavy=True))
    if settings.algorithm.data_fraction:
        found.append(Team(name="replay", size=1, gpus=0, heavy=False))
    return found


def start_workers(
    settings: RunSettings,
    cluster: Cluster,
    slots: Slots,
    log_dir: str,
    say: Callable[[str], None] = log.info,
    before_engines: Callable[[RewardGroup], None] = lambda rewards: None,
) -> Workers:
    """Start all workers and wait until all answer.

    Each worker loads for many seconds on one core, so they load at the same time where possible.
    Colocated engines start before the learner and the scorers, and one group after the other: an
    engine measures the free memory of its GPU, so no other worker may take memory at that time.
    With cluster.take_turns the engines then sleep.

    Args:
        say: prints a line about each worker that has started.
        before_engines: called when the reward workers answer. On GPUs all engines, including those
            that score, start after it, so that it can use their GPUs. Other workers may be loading
            while it runs.

    Raises:
        WorkerError: a worker could not be built within deadlines.start_s.
    """
    start_up = StartUp(say)
    rewards = RewardGroup(settings, slots["reward"], log_dir=log_dir)
    start_learner = partial(start_learner_and_scorers, settings, cluster, slots, log_dir)
    start_rollout = partial(start_engines, settings, cluster, slots, log_dir, start_up)
    on_cpu = cluster.device == "cpu"
    engines_score = any(settings.teachers[n].engine is not None for n in settings.scored_teachers)
    late = settings.cluster.colocate or (engines_score and not on_cpu)
    early_learner = None if late else start_learner()
    early_engines = start_rollout() if on_cpu else None
    start_up.wait(rewards.ready())
    before_engines(rewards)
    rollout, teacher_rollout = early_engines or start_rollout()
    learner, scorers = early_learner or start_learner()
    replay = None
    if settings.algorithm.data_fraction:
        replay = ReplayGroup(settings, slots["replay"], log_dir=log_dir)
    engines = [] if settings.cluster.colocate else [rollout, teacher_rollout]
    starting = [group for group in (*engines, learner, *scorers, replay) if group is not None]
    start_up.wait([call for group in starting for call in group.ready()])
    return Workers(
        rollout=rollout,
        teacher_rollout=teacher_rollout,
        replay=replay,
        scorers=scorers,
        rewards=rewards,
        learner=learner,
        residency=Residency(takes_turns=settings.cluster.take_turns),
    )


def start_learner_and_scorers(
    settings: RunSettings, cluster: Cluster, slots: Slots, log_dir: str
) -> tuple[LearnerGroup, list[ScorerGroup]]:
    """Start the learner and the scorers, without waiting until they are built."""
    device = cluster.device
    learner = LearnerGroup(settings, slots["learner"], device=device, log_dir=log_dir)
    scorers = [
        ScorerGroup(settings, slots[f"scorer-{name}"], teacher=name, device=device, log_dir=log_dir)
        for name in settings.teachers_with_scorers
    ]
    return learner, scorers


def start_engines(
    settings: RunSettings, cluster: Cluster, slots: Slots, log_dir: str, start_up: StartUp
) -> tuple[RolloutGroup, RolloutGroup | None]:
    """Start the student's engines, and the teacher's engine if it samples responses. With
    cluster.colocate, wait until they are built.

    Raises:
        WorkerError: a colocated engine could not be built within deadlines.start_s.
    """
    models: list[tuple[str, ModelConfig, Source, str | None]]
    models = [("rollout", settings.model, Source.student, None)]
    if settings.algorithm.teacher_fraction:
        writer = next(iter(settings.teachers))
        models.append(("teacher", settings.teacher_model(writer), Source.teacher, writer))
    groups = []
    for name, model, source, teacher in models:
        engines = RolloutGroup(
            settings,
            slots[name],
            model=model,
            device=cluster.device,
            backend=cluster.weight_transfer,
            log_dir=log_dir,
            name=name,
            source=source,
            teacher=teacher,
        )
        if settings.cluster.colocate:
            start_up.wait(engines.ready())
        if settings.cluster.take_turns:
            engines.sleep()
        groups.append(engines)
    return groups[0], groups[1] if len(groups) > 1 else None


def begin_job(
    settings: RunSettings,
    slots: Slots,
    workers: Workers,
    log_dir: str,
    say: Callable[[str], None] = log.info,
    before_engines: Callable[[RewardGroup], None] = lambda rewards: None,
) -> Workers:
    """Prepare the workers of a job for another one, which computes the same as with new workers;
    wait until all are ready.

    The reward workers are replaced: they run the user's code, whose state only a new process
    forgets.

    Args:
        workers: the intact workers of a finished job with equal `launch.worker_conditions`.
        say, before_engines: as in start_workers.

    Raises:
        WorkerError: a worker did not answer in time, or raised an error.
    """
    start_up = StartUp(say)
    workers.rewards.close()
    rewards = RewardGroup(settings, slots["reward"], log_dir=log_dir)
    for group in workers.groups:
        if group is not workers.rewards:
            group.begin_job(settings, log_dir)
    start_up.wait(rewards.ready())
    before_engines(rewards)
    return replace(workers, rewards=rewards)


def recover(
    settings: RunSettings,
    cluster: Cluster,
    slots: Slots,
    workers: Workers,
    error: WorkerError,
    log_dir: str,
) -> Workers:
    """Replace the learner, and the worker that failed if it is not one of the learner's; keep all
    other workers. Responses that were being sampled for the old learner are aborted. The new
    learner is still starting when this returns.

    Raises:
        FleetExhausted: too many workers of another kind failed.
    """
    with suppress(WorkerError):
        workers.lose(error)
    workers.learner.close()
    for engines in workers.engines:
        engines.quiet()
    workers.residency.begin_again(workers.engines)
    learner = LearnerGroup(settings, slots["learner"], device=cluster.device, log_dir=log_dir)
    return replace(workers, learner=learner, learners_lost=workers.learners_lost + 1)
