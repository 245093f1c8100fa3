"""One run from settings to report: check, place, train, evaluate, save, and leave nothing
running.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from hybridrl.controller.controller import Controller, OnStep
from hybridrl.controller.evaluator import evaluation_is_due
from hybridrl.controller.held_out_set import HeldOutSet
from hybridrl.controller.preemption import Preemption
from hybridrl.core import redact
from hybridrl.core.errors import (
    CheckpointError,
    ClusterLost,
    DataError,
    FleetExhausted,
    LedgerError,
    WorkerError,
    WorkerTimeout,
    raised,
)
from hybridrl.core.trace import write_trace
from hybridrl.data.mixture import prompt_cursor
from hybridrl.launch.export import keep_template
from hybridrl.launch.notices import (
    naming_what_is_saved,
    ready_notices,
    start_notice,
    stop_notice,
)
from hybridrl.launch.planning_device import check_memory, planned_device
from hybridrl.launch.preflight import (
    check_attention,
    check_engines,
    check_running,
)
from hybridrl.launch.preparation import preflight
from hybridrl.launch.run_result import ExitReason, RunResult, run_result
from hybridrl.launch.set_prompts import prompts_by_set
from hybridrl.launch.teacher_levels import (
    measure_teachers,
    same_levels,
    write_levels,
)
from hybridrl.launch.warm_workers import Kept, WarmWorkers
from hybridrl.launch.worker_conditions import alone
from hybridrl.run_dir.checkpoint import Checkpoint, Checkpointer
from hybridrl.run_dir.directory import (
    EXPORT,
    earlier_settings,
    find_checkpoint,
    run_directory,
)
from hybridrl.run_dir.inputs import digests, pinned
from hybridrl.run_dir.ledger import Ledger, check_cursor, check_ledger, drawn_uids
from hybridrl.runtime.actor_group import dump_stacks
from hybridrl.runtime.calls import gather
from hybridrl.runtime.cluster import Cluster
from hybridrl.runtime.reward_group import RewardGroup
from hybridrl.runtime.workers import (
    Slots,
    Workers,
    begin_job,
    place_workers,
    recover,
    start_workers,
)
from hybridrl.settings.choices import Resume, WandbMode
from hybridrl.settings.run import RunSettings
from hybridrl.tracking.console import ConsoleSink
from hybridrl.tracking.jsonl import JsonlSink, read_metrics
from hybridrl.tracking.sink import Sink, Sinks
from hybridrl.tracking.user_sinks import build_sinks
from hybridrl.tracking.wandb_sink import WandbSink
from hybridrl.types import Prompt, RunInfo

log = logging.getLogger(__name__)


def train(
    settings: RunSettings, on_step: OnStep | None = None, warm: WarmWorkers | None = None
) -> RunResult:
    """Run or resume `settings`; the same call continues where the last one stopped.

    Args:
        on_step: called after each step with its number and its metrics; None: nothing is called.
        warm: provides the workers of the job before and keeps those of this one; None: all workers
            start and end with the call.

    Raises:
        HybridRLError: the run failed, for the reason in its message; no process is left running.
        Exception: the one that on_step raised, after a checkpoint; no process is left running.
    """
    holder = WarmWorkers() if warm is None else warm
    began = time.monotonic()
    requested = settings
    settings = pinned(requested, earlier_settings(requested))
    with ExitStack() as stack:
        preemption = stack.enter_context(Preemption().listening())
        prompts, heldout, sets = preflight(settings)
        expected, _ = planned_device(settings)
        check_memory(settings, expected)
        run_dir = stack.enter_context(run_directory(settings))
        # An absolute path, because workers may run in another directory.
        settings = replace(settings, run=replace(settings.run, dir=str(run_dir)))
        inputs = digests(settings, prompts, heldout, prompts_by_set(sets))
        checkpoint = find_checkpoint(settings, run_dir, inputs)
        keep_template(settings, run_dir)
        console, sinks = stack.enter_context(started_sinks(settings, run_dir, checkpoint))
        preemption.check()  # an optional sink swallows exceptions, that of a signal too
        stack.enter_context(naming_what_is_saved(settings, run_dir))
        if settings.diagnostics.trace:
            stack.callback(write_trace, run_dir)
        earlier = holder.run_dir
        levels = None if earlier is None else same_levels(settings, heldout, inputs, earlier)
        measures = checkpoint is None and levels is None and bool(settings.measured_teachers)
        kept = stack.enter_context(
            holder.job(settings, inputs, measures=measures, say=console.notice)
        )
        if kept is not None and levels is not None:
            write_levels(settings, heldout, inputs, run_dir, levels)
        console.notice(start_notice(settings, checkpoint, kept, levels))
        cluster = connect(settings, holder, preemption, stack)
        check_attention(settings, cluster.device)
        check_engines(settings, cluster.device)
        if expected != cluster.device:  # the cluster has GPUs, this machine has none
            check_memory(settings, cluster.device)
        session = Session(
            settings=settings,
            run_dir=run_dir,
            cluster=cluster,
            slots=place_workers(settings, cluster) if kept is None else kept.slots,
            prompts=prompts,
            heldout=heldout,
            sets=sets,
            inputs=inputs,
            console=console,
            sinks=sinks,
            preemption=preemption,
            on_step=on_step,
        )
        anew = partial(connect_anew, settings, holder, preemption, stack)
        keeps = warm is not None and alone(settings) is None
        workers = session.start(checkpoint, kept, anew, keeps=keeps)
        for line in ready_notices(requested, settings, session.cluster, time.monotonic() - began):
            console.notice(line)
        preemption.started()
        controller = session.run(workers, checkpoint)
        first = checkpoint.state.step if checkpoint else 0
        exported = export_model(settings, controller, run_dir, first)
        reason = exit_reason(settings, controller, first)
        if reason is ExitReason.stopped:
            console.notice(stop_notice(settings, controller.steps_done))
        if warm is not None and not controller.pipeline.in_flight():
            warm.keep(settings, inputs, run_dir, session.slots, controller.workers)
    result = run_result(run_dir, exported, reason)
    if warm is not None:
        preemption.check()  # a signal after the last step: the run is finished, no other begins
    return result


def connect(
    settings: RunSettings, holder: WarmWorkers, preemption: Preemption, stack: ExitStack
) -> Cluster:
    """The cluster of the holder, which is connected if it is not yet. Ray replaces the handlers of
    signals at its start, so `preemption` takes them over again, until the stack ends.

    Raises:
        PlacementError, ConfigError: as Cluster.
    """
    cluster = holder.cluster(settings)
    stack.enter_context(preemption.listening())
    return cluster


def connect_anew(
    settings: RunSettings, holder: WarmWorkers, preemption: Preemption, stack: ExitStack
) -> Cluster:
    """End all workers and this process's own Ray, and return a new cluster as `connect` does."""
    holder.close()
    return connect(settings, holder, preemption, stack)


def exit_reason(settings: RunSettings, controller: Controller, first: int) -> ExitReason:
    """Why the training ended without an error.

    Args:
        first: the steps that were done when this session began.
    """
    if controller.stopped:
        return ExitReason.stopped
    return ExitReason.already_finished if first == settings.train.steps else ExitReason.finished


@dataclass(slots=True, kw_only=True)
class Session:
    """Training in one job. When a worker fails whose state no other worker has, the session goes
    back to the last checkpoint.

    consumes prompts / produces a trained student and its run directory / waits for the controller /
    unblocked by its end, and by a worker's error: then a new attempt begins, at most
    cluster.max_restarts times.
    """

    settings: RunSettings
    run_dir: Path
    cluster: Cluster
    slots: Slots
    prompts: list[Prompt]
    heldout: list[Prompt]
    sets: list[HeldOutSet]
    inputs: dict[str, str]  # run_dir.inputs.digests
    console: ConsoleSink
    sinks: Sinks
    preemption: Preemption
    on_step: OnStep | None = None
    levels: Mapping[str, float] = field(default_factory=dict, init=False)
    """The teachers' accuracies, for the first row of a run."""
    steps_done: int | None = field(default=None, init=False)
    """The steps that the last attempt had done when it ended; None: no attempt has begun to train.
    """

    @property
    def log_dir(self) -> str:
        """The folder with one file per worker."""
        return str(self.run_dir / "logs")

    def start(
        self,
        checkpoint: Checkpoint | None,
        kept: Kept | None,
        anew: Callable[[], Cluster],
        *,
        keeps: bool,
    ) -> Workers:
        """As start_workers, but with new workers if one of `kept` was lost since its job.

        Args:
            kept: as in start_workers.
            anew: ends the remaining workers of `kept`, and returns a cluster for new ones.
            keeps: a later job may use the workers, so a new learner keeps its first weights.

        Raises:
            WorkerError, ContractError: as start_workers.
            PlacementError, ConfigError: as Cluster.
        """
        if kept is not None:
            try:
                return self.start_workers(checkpoint, kept)
            except (WorkerError, ClusterLost) as error:
                self.console.notice(
                    f"the workers of the previous job end and new ones start: {error}"
                )
            self.cluster = anew()
            self.slots = place_workers(self.settings, self.cluster)
        workers = self.start_workers(checkpoint)
        if keeps:
            workers.learner.keep_start()
        return workers

    def start_workers(self, checkpoint: Checkpoint | None, kept: Kept | None = None) -> Workers:
        """Start and check all workers. If the run begins here, its teachers are measured meanwhile.

        Args:
            kept: workers of the job before, which this job uses; None: all workers start.

        Raises:
            WorkerError: a worker could not be built, or did not answer in time.
            ContractError: as check_running.
        """

        def measure(rewards: RewardGroup) -> None:
            if checkpoint is None:  # a resumed run has the levels in its first row
                self.levels = measure_teachers(
                    self.settings,
                    self.cluster,
                    self.slots,
                    rewards,
                    self.heldout,
                    self.run_dir,
                    self.inputs,
                )

        say = self.console.notice
        if kept is None:
            workers = start_workers(
                self.settings, self.cluster, self.slots, self.log_dir, say, measure
            )
        else:
            workers = begin_job(self.settings, self.slots, kept.workers, self.log_dir, say, measure)
        check_running(self.settings, workers, self.prompts)
        return workers

    def run(self, workers: Workers, checkpoint: Checkpoint | None) -> Controller:
        """Train to the last step.

        Returns:
            The controller of the attempt that reached it.

        Raises:
            FleetExhausted: workers failed more often than cluster.max_restarts allows, or in the
                same way at the same step again.
        """
        last_error: WorkerError | None = None
        last_step: int | None = None  # the steps that were done before that error
        for restarts_left in reversed(range(1 + self.settings.cluster.max_restarts)):
            try:
                if last_error is not None:
                    workers = self.recover(workers, last_error)
                    checkpoint = self.go_back()
                return self.attempt(workers, checkpoint)
            except WorkerError as error:  # others are replaced within the attempt
                if isinstance(error, WorkerTimeout):
                    dump_stacks()
                step = self.steps_done
                if last_error is not None and same_fault(last_error, last_step, error, step):
                    raise FleetExhausted(
                        f"{error}; it failed in the same way at the same step after a restart, so "
                        "another attempt would fail too"
                    ) from error
                if not restarts_left:
                    raise FleetExhausted(f"{error}; cluster.max_restarts is used up") from error
                self.console.notice(f"{error}; going back to the last checkpoint")
                last_error = error
                last_step = step
        raise AssertionError("the last attempt returns or raises")

    def recover(self, workers: Workers, error: WorkerError) -> Workers:
        """The workers with a new learner, and with a replacement of the failed worker."""
        return recover(self.settings, self.cluster, self.slots, workers, error, self.log_dir)

    def go_back(self) -> Checkpoint | None:
        """The newest checkpoint. run.resume is ignored: it applies to the first attempt alone."""
        resumed = replace(self.settings, run=replace(self.settings.run, resume=Resume.auto))
        checkpoint = find_checkpoint(resumed, self.run_dir, self.inputs)
        self.sinks.start(run_info(self.settings, self.run_dir, checkpoint))
        return checkpoint

    def attempt(self, workers: Workers, checkpoint: Checkpoint | None) -> Controller:
        """Train from the checkpoint, or from the start, to the last step.

        Raises:
            WorkerError: a worker failed whose state no other holds.
        """
        gather(workers.learner.ready(), self.preemption.check)
        with closing(Ledger(self.run_dir, checkpoint.state.step if checkpoint else 0)) as ledger:
            if checkpoint:
                self.check_ledger(checkpoint)
            controller = Controller(
                self.settings,
                workers=workers,
                backend=self.cluster.weight_transfer,
                prompts=prompt_cursor(
                    self.prompts, self.settings.run.seed, self.settings.data.weights
                ),
                heldout=self.heldout,
                sets=self.sets,
                inputs=self.inputs,
                sinks=self.sinks,
                checkpointer=Checkpointer(self.run_dir, self.settings.checkpoint),
                ledger=ledger,
                preemption=self.preemption,
                on_step=self.on_step,
            )
            try:
                train_on(controller, checkpoint, self.levels, missing_row(self.run_dir, checkpoint))
            finally:
                self.steps_done = controller.steps_done
        return controller

    def check_ledger(self, checkpoint: Checkpoint) -> None:
        """Print a notice if the ledger does not account for every prompt up to the checkpoint. The
        run goes on, since the ledger is only a record.

        Raises:
            CheckpointError: the checkpoint's data cursor has another form than this version writes.
            DataError: the cursor belongs to data sources with other names.
        """
        try:
            cursor = checkpoint.state.parts["pipeline"]["prompts"]
            check_cursor(self.run_dir, self.prompts, cursor)
            drawn = drawn_uids(self.prompts, self.settings.run.seed, cursor)
            check_ledger(self.run_dir, checkpoint.state.step, drawn)
        except DataError:  # a ValueError too, which the next clause would rename
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"{checkpoint.folder}: its data cursor does not have the form that this version "
                f"of hybridrl writes: {error!r}"
            ) from error
        except LedgerError as error:
            self.console.notice(
                f"{error}; it can no longer be verified that this run trained on each prompt once"
            )


def same_fault(
    before: WorkerError, before_step: int | None, error: WorkerError, step: int | None
) -> bool:
    """Whether a worker raised the same error at the same step again, so that its cause is not
    transient.

    Args:
        before_step, step: the steps that were done before each of the two errors; None: no attempt
            had begun to train.
    """
    same = (before.worker, before.call, before.reason) == (error.worker, error.call, error.reason)
    return raised(error) and same and before_step == step


def missing_row(run_dir: Path, checkpoint: Checkpoint | None) -> dict[str, float] | None:
    """The row of the checkpoint's step, if metrics.jsonl lacks it because the run ended between the
    step and its row; None: no row is missing.
    """
    if checkpoint is None:
        return None
    step, row = checkpoint.state.step, checkpoint.state.metrics
    rows = read_metrics(run_dir, step)
    logged = rows[-1]["train/step"] if rows else 0
    return row if logged < step == row.get("train/step") else None


def train_on(
    controller: Controller,
    checkpoint: Checkpoint | None,
    levels: Mapping[str, float],
    missing: Mapping[str, float] | None = None,
) -> None:
    """Train from the checkpoint, or from the start, to the last step.

    Args:
        levels: the teachers' accuracies, for the first row of a run.
        missing: as missing_row returns it. It is logged first, with the evaluation of its step if
            that failed.
    """
    if checkpoint:
        controller.load_state(checkpoint.state, str(checkpoint.folder))
    controller.begin()
    if not checkpoint:
        controller.sinks.log({"train/step": 0.0, **levels, **controller.evaluate()})
    elif missing is not None:
        evaluated = any(key.startswith("eval/") for key in missing)
        due = evaluation_is_due(controller.settings, controller.steps_done) and not evaluated
        controller.sinks.log({**missing, **(controller.evaluate() if due else {})})
    controller.run()


def make_sinks(settings: RunSettings) -> tuple[ConsoleSink, Sinks]:
    """The console, for notices, and all sinks, the console among them."""
    console = ConsoleSink(every_s=settings.tracking.line_every_s)
    optional: dict[str, Sink] = {"the console": console}
    if settings.tracking.wandb is not WandbMode.disabled:
        optional["tracking.wandb"] = WandbSink(settings.tracking)
    optional |= build_sinks(settings.tracking)
    return console, Sinks(required=[JsonlSink()], optional=optional)


@contextmanager
def started_sinks(
    settings: RunSettings, run_dir: Path, checkpoint: Checkpoint | None
) -> Iterator[tuple[ConsoleSink, Sinks]]:
    """Start the console and all sinks, which continue what they recorded of the run. The end of the
    block closes them, with status 1 if it ends by an exception, else 0.
    """
    console, sinks = make_sinks(settings)
    status = 1
    try:
        if checkpoint:
            sinks.load_state_dict(checkpoint.state.trackers)
        sinks.start(run_info(settings, run_dir, checkpoint))
        yield console, sinks
        status = 0
    finally:
        sinks.close(status)


def run_info(settings: RunSettings, run_dir: Path, checkpoint: Checkpoint | None) -> RunInfo:
    return RunInfo(
        run_dir=str(run_dir),
        name=run_dir.name,
        total_steps=settings.train.steps,
        first_step=checkpoint.state.step if checkpoint else 0,
        config=redact.tree(asdict(settings)),
    )


def export_model(
    settings: RunSettings, controller: Controller, run_dir: Path, first: int
) -> Path | None:
    """Write the final student as a Hugging Face folder, unless it is there already.

    Args:
        first: the steps that were done when this session began.

    Returns:
        The folder; None: there is none, since checkpoint.export is off.
    """
    folder = run_dir / EXPORT / f"step_{controller.steps_done:06d}"
    if settings.checkpoint.export and not (folder.exists() and controller.steps_done == first):
        controller.learner.export(str(folder))
    return folder if folder.exists() else None
