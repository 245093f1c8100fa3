"""Builds the production controller, sampling, pipeline and groups around any workers."""

import copy
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import ray

from benchmarks.fake_workers import Work
from hybridrl.controller.controller import Controller
from hybridrl.controller.preemption import Preemption
from hybridrl.data.prompts import PromptSource
from hybridrl.run_dir.checkpoint import Checkpointer
from hybridrl.run_dir.ledger import Ledger, read_ledger
from hybridrl.runtime.actor_group import ActorGroup
from hybridrl.runtime.calls import gather
from hybridrl.runtime.cluster import Cluster
from hybridrl.runtime.engine_load import EngineLoad
from hybridrl.runtime.fleet import Fleet
from hybridrl.runtime.learner_group import LearnerGroup
from hybridrl.runtime.reward_group import RewardGroup
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.runtime.scorer_group import ScorerGroup
from hybridrl.runtime.workers import Workers, place_workers
from hybridrl.settings.choices import WeightTransfer
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings
from hybridrl.tracking.sink import Sinks
from hybridrl.types import Prompt

TypedGroup = TypeVar("TypedGroup", RolloutGroup, ScorerGroup, LearnerGroup)


class FakeRollout(RolloutGroup):
    worker = "benchmarks.fake_workers:Engine"


class FakeScorer(ScorerGroup):
    worker = "benchmarks.fake_workers:Scorer"


class FakeReward(RewardGroup):
    worker = "benchmarks.fake_workers:Judge"


class FakeLearner(LearnerGroup):
    worker = "benchmarks.fake_workers:Learner"


def settings_of(*overrides: str) -> RunSettings:
    return load_config(
        [
            "run.dir=bench",
            "experiment=quickstart",
            "tracking.wandb=disabled",
            "cluster.device=cpu",
            *overrides,
        ]
    )


def prompts_of(count: int, tokens: int) -> list[Prompt]:
    return [Prompt(uid=f"p{i}", input_ids=(1,) * tokens, text="", columns={}) for i in range(count)]


def controller_of(
    settings: RunSettings,
    workers: Workers,
    prompts: Sequence[Prompt],
    folder: Path,
    heldout: Sequence[Prompt] = (),
) -> Controller:
    """A controller at step 0 whose engines serve version 0."""
    controller = Controller(
        settings,
        workers=workers,
        backend=WeightTransfer.object_store,
        prompts=PromptSource(prompts, settings.run.seed),
        heldout=heldout,
        inputs={},
        sinks=Sinks(required=[]),
        checkpointer=Checkpointer(folder, settings.checkpoint),
        ledger=Ledger(folder, 0),
        preemption=Preemption(),
    )
    controller.publish_weights()
    return controller


def trained_by(controller: Controller) -> list[str]:
    """The uids of the prompts that a controller has trained on, by its ledger."""
    return [
        uid for line in read_ledger(controller.checkpointer.root.parent) for uid in line["trained"]
    ]


def resized(group: TypedGroup, settings: RunSettings, size: int | None) -> TypedGroup:
    """A copy of a group with other settings and `size` names; None: as many as the group has."""
    copied = copy.copy(group)
    copied.settings = settings
    copied.group = named(group.group, size or group.group.size)
    return copied


def named(group: ActorGroup, size: int) -> ActorGroup:
    """A copy of a group with `size` names, which are assigned to its actors in turn: with fewer
    names some actors are idle, with more names an actor answers for several.

    One worker can answer for several, because the fake workers take no time and return values that
    depend only on their arguments.
    """
    copied = copy.copy(group)
    places = [i % group.size for i in range(size)]
    copied.size = size
    copied.names = [f"{group.name}/{i}" for i in range(size)]
    copied.epochs = [0] * size
    copied.last_reasons = [None] * size
    copied.first_calls = [{} for _ in range(size)]
    copied.slots = [group.slots[i] for i in places]
    copied.arguments = [group.arguments[i] for i in places]
    copied.actors = [group.actors[i] for i in places]
    copied.pid_refs = [group.pid_refs[i] for i in places]
    return copied


class Stage:
    """Fake workers and a controller for them, as a context manager. They run on a Ray that this
    process is connected to already, which is left running, else on a new one.

    Example: with Stage(settings_of()) as stage: stage.assign(Work(generate_s=0.5));
    stage.controller(settings).step()
    """

    def __init__(self, settings: RunSettings, *, store_bytes: int | None = None) -> None:
        """Start the workers.

        Args:
            store_bytes: the size of the object store of a new Ray; None: Ray's default.
        """
        self.settings = settings
        self.owns_ray = not ray.is_initialized()
        if self.owns_ray:
            ray.init(
                address="local",
                object_store_memory=store_bytes,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        self.folder = Path(tempfile.mkdtemp(prefix="hybridrl-bench-"))
        self.cluster = Cluster(settings).__enter__()
        slots = place_workers(settings, self.cluster)
        log_dir = str(self.folder / "logs")
        here = {"device": "cpu"}
        teacher = settings.scored_teachers[0]
        self.workers = Workers(
            rollout=FakeRollout(
                settings,
                slots["rollout"],
                model=settings.model,
                backend=WeightTransfer.object_store,
                log_dir=log_dir,
                **here,
            ),
            teacher_rollout=None,
            replay=None,
            scorers=[
                FakeScorer(
                    settings, slots[f"scorer-{teacher}"], teacher=teacher, log_dir=log_dir, **here
                )
            ],
            rewards=FakeReward(settings, slots["reward"], log_dir=log_dir),
            learner=FakeLearner(settings, slots["learner"], log_dir=log_dir, **here),
        )
        groups = (
            self.workers.rollout,
            *self.workers.scorers,
            self.workers.rewards,
            self.workers.learner,
        )
        gather([pending for group in groups for pending in group.ready()])

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.__exit__()
        if self.owns_ray:
            ray.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)

    def assign(self, work: Work) -> None:
        for group in (self.workers.rollout, *self.workers.scorers, self.workers.learner):
            group.group.call_all("assign", work, deadline_s=60.0)

    def controller(
        self,
        settings: RunSettings,
        *,
        engines: int | None = None,
        scorers: int | None = None,
        ranks: int | None = None,
        prompt_tokens: int = 8,
    ) -> Controller:
        """The controller of a new run with the same workers.

        Args:
            engines, scorers, ranks: the numbers of names of each kind, see `named`; None: one for
                each actor.
        """
        present = self.workers
        rollout = resized(present.rollout, settings, engines)
        rollout.load = EngineLoad(rollout.group.size)
        rollout.fleet = Fleet(
            rollout.group, settings.deadlines, rollout.fleet.closed_by, rollout.load_latest
        )
        workers = replace(
            present,
            rollout=rollout,
            scorers=[resized(group, settings, scorers) for group in present.scorers],
            learner=resized(present.learner, settings, ranks),
        )
        return controller_of(
            settings,
            workers,
            prompts_of(settings.train.prompts_per_step, prompt_tokens),
            self.folder,
        )
