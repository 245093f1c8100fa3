"""The training loop. It holds only headers and references; tokens, log-probs and weights go from
worker to worker.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

from hybridrl.controller.coefficients import Coefficients
from hybridrl.controller.engine_probe import EngineProbe
from hybridrl.controller.evaluator import Evaluator, evaluation_is_due
from hybridrl.controller.global_batch import (
    GlobalBatch,
    divide,
    num_token_samples,
    trained_uids,
    update_order,
    update_plan,
)
from hybridrl.controller.held_out_set import HeldOutSet
from hybridrl.controller.logprob_gap import check_logprob_gap
from hybridrl.controller.metrics import StepRecord, step_row
from hybridrl.controller.part_states import check_complete, load_parts
from hybridrl.controller.pipeline import Pipeline, wave_seed
from hybridrl.controller.preemption import Preemption
from hybridrl.controller.reward_errors import check_reward_errors
from hybridrl.controller.rounding import rounding_warning
from hybridrl.controller.sampling import Arrived, Sampling, first_groups
from hybridrl.controller.saving import SAVED_ENDS, Saving
from hybridrl.controller.step_cost import step_cost
from hybridrl.controller.step_results import Published, Sampled, Update
from hybridrl.controller.worker_reports import work_of
from hybridrl.core import failpoints
from hybridrl.core.errors import (
    CheckpointError,
    HybridRLError,
    RunDirectoryError,
    RunDirectoryTaken,
    SkippedStep,
    StopTraining,
    WorkerError,
)
from hybridrl.core.trace import DRIVER, SUFFIX, Trace
from hybridrl.data.mixture import PromptMixture
from hybridrl.data.prompts import PromptSource
from hybridrl.objectives import make_objective
from hybridrl.run_dir.checkpoint import Checkpointer, RunState, SettingsFile, Stateful, Writer
from hybridrl.run_dir.inputs import of_teacher
from hybridrl.run_dir.ledger import Ledger
from hybridrl.runtime.calls import Meter
from hybridrl.runtime.ray_connection import object_store_bytes
from hybridrl.runtime.residency import Phase
from hybridrl.runtime.weight_sync import WeightSync
from hybridrl.runtime.workers import Workers
from hybridrl.settings.choices import OnStale, WeightTransfer
from hybridrl.settings.run import RunSettings
from hybridrl.tracking.jsonl import write_token_samples
from hybridrl.tracking.sink import Sinks
from hybridrl.tracking.timing import PhaseClock
from hybridrl.types import (
    BatchPlan,
    LearnerStats,
    Prompt,
    ScoreHeader,
    UpdatePlan,
)

log = logging.getLogger(__name__)

OnStep = Callable[[int, Mapping[str, float]], object]
"""A function of the caller. It is called after each step with the number of steps done and the
step's row of metrics. Its return value is ignored.
"""


class Controller:
    """The training loop. A step has this order:

    prompts -> rollout -> chunks -+-> scorers -> scores  -+
                                  +-> rewards -> rewards -+-> learner -> weights -> rollout

    Arrows between workers are object-store references. Scoring of a chunk starts when the chunk is
    done, while others are still being sampled; learning starts when the headers, rewards and scores
    of all chunks exist, with the chunks in prompt order. With pipeline.ahead > 0 the responses of
    the next steps are sampled while the learner works.
    """

    def __init__(
        self,
        settings: RunSettings,
        *,
        workers: Workers,
        backend: WeightTransfer,
        prompts: PromptSource | PromptMixture,
        heldout: Sequence[Prompt],
        sets: Sequence[HeldOutSet] = (),
        inputs: Mapping[str, str],
        sinks: Sinks,
        checkpointer: Checkpointer,
        ledger: Ledger,
        preemption: Preemption,
        on_step: OnStep | None = None,
    ) -> None:
        """Build the parts of the loop around workers that are running.

        Args:
            backend: how weights reach the engines.
            heldout: problems of the evaluations.
            sets: further, named sets of held-out problems.
            inputs: digests of the run's inputs (run_dir.inputs.digests), stored in checkpoints.
            on_step: called after each step, once it is logged and any checkpoint of it is begun.
        """
        self.settings = settings
        self.workers = workers
        self.learner = workers.learner
        self.prompts = prompts
        self.inputs = inputs
        self.sinks = sinks
        self.checkpointer = checkpointer
        self.ledger = ledger
        self.preemption = preemption
        self.on_step = on_step
        self.stopped = False  # by StopTraining, before the last step
        self.learns_from_rewards = make_objective(settings).needs.rewards
        self.coefficients = Coefficients(settings)
        self.sampling = Sampling(settings, workers, preemption)
        self.evaluator = Evaluator(settings, workers, self.coefficients, heldout, sets)
        self.pipeline = Pipeline(
            settings,
            self.sampling,
            prompts,
            self.coefficients,
            store_bytes=object_store_bytes(),
        )
        self.weight_sync = WeightSync(workers.learner, workers.rollout, backend)
        self.probe = EngineProbe(settings, workers, prompts.prompts)
        self.clock = PhaseClock(driver_trace(settings))
        self.stateful: dict[str, Stateful] = {
            "pipeline": self.pipeline,
            "schedules": self.coefficients,
        }
        self.steps_done = 0  # batches, each of one optimizer update or several
        self.optimizer_steps = 0
        self.weight_version = 0
        self.saving = Saving()
        self.warned_of_rounding = False

    def step(self, started: float | None = None) -> dict[str, float]:
        """Train on one batch.

        consumes prompts / produces the updates of the batch, the new weights on every engine, and a
        row of metrics / waits for engines, reward workers, scorers, the learner, and the engines
        again.

        Args:
            started: time.perf_counter() at the start of the step, which includes batches that were
                skipped just before; None: now.

        Raises:
            SkippedStep: nothing could be learned from the batch.
        """
        started = time.perf_counter() if started is None else started
        fetched_before = Meter.materialized_bytes
        sampled = self._sample()
        scores = self._score(sampled)
        update = self._learn(sampled)
        self._record(sampled, update)
        published = self._sync()
        cost = step_cost(sampled.headers, scores, published.nbytes)
        row = step_row(
            StepRecord(
                steps_done=self.steps_done,
                headers=sampled.headers,
                rewards=sampled.rewards,
                scores=scores,
                plan=update.plan,
                stats=update.stats,
                cost=cost,
                probe_gap=update.probe_gap,
                num_late=len(sampled.returning),
                num_sampled=sampled.num_sampled,
                in_flight_bytes=self.pipeline.in_flight_bytes,
                materialized_bytes=Meter.materialized_bytes - fetched_before,
                restarts=self.workers.restarts,
                step_s=time.perf_counter() - started,
                sync_s=published.seconds,
                phases=self.clock.take(),
                epochs=self.prompts.epochs(),
                work=work_of(sampled.arrived, scores, update.stats),
            )
        )
        self.pipeline.wave_bytes = cost.stored_bytes // sampled.num_waves
        self.coefficients.observe(row)
        self._show_rollouts(sampled)
        return row

    def _show_rollouts(self, sampled: Sampled) -> None:
        """Every tracking.rollouts_every steps, give the sinks some responses of the step as text.
        If the reward worker that decodes them fails, it is replaced and this step shows none.
        """
        tracking = self.settings.tracking
        if not tracking.rollouts_every or self.steps_done % tracking.rollouts_every:
            return
        try:
            rows = self.sampling.rollouts(sampled.arrived, self.steps_done, tracking.rollouts)
        except WorkerError as error:
            self.workers.lose(error)
            log.warning("step %d shows no rollouts, because %s", self.steps_done, error)
            return
        self.sinks.rollouts(rows)

    def run(self) -> None:
        """Train from the present state until train.steps are done or on_step raises StopTraining;
        evaluate, save checkpoints and log on the way.

        consumes prompts / produces rows, samples and checkpoints / waits for each step / unblocked
        by a stop signal, which takes effect at the next point where nothing would be lost.

        Raises:
            Exception: of any type, as on_step raised it; what was learned so far is saved, or a
                note says why not.
            Preempted: a stop signal arrived; what was learned so far is saved.
            RunDirectoryTaken: another directory is at the path of the run directory; nothing is
                saved there.
            RunDirectoryError: the run directory or a file in it was removed, moved or replaced.
                What was learned so far is saved under its path.
            RewardError, ServerError, FleetExhausted: no rewards, no scores or no responses can be
                had. What was learned so far is saved if the step had not changed the weights yet.
            CheckpointError: the last checkpoint cannot be written. If the run was ending for
                another reason, the message says that too.
        """
        try:
            self._train()
        except Exception as error:
            if isinstance(error, WorkerError):
                self.learner.note_failure(error)
            self.saving.settle_logged()
            raise
        except BaseException:
            self.learner.give_up("the run was ended at once")
            raise

    def _train(self) -> None:
        settings = self.settings
        row: dict[str, float] = {}
        while self.steps_done < settings.train.steps and not self.stopped:
            try:
                self.preemption.check()
                self.ledger.check_in_place()
                row = self._step_or_skip()
                row |= self.saving.take()
                if evaluation_is_due(settings, self.steps_done):
                    row |= self.evaluate()
                # Before the checkpoint: a resumed run keeps the rows up to its checkpoint's step.
                self.sinks.log(row)
            except RunDirectoryTaken:
                raise
            except SAVED_ENDS as end:
                self._save_at_end(row, end)
                raise
            failpoints.hit("controller.logged", step=self.steps_done)
            last = self.steps_done == settings.train.steps
            every = settings.checkpoint.every
            if last or (every and self.steps_done % every == 0):
                self.save(row, last=last)
            failpoints.hit("controller.saved", step=self.steps_done)
            if self.on_step is not None:
                self._call_back(self.on_step, row)

    def _save_at_end(self, row: Mapping[str, float], end: HybridRLError) -> None:
        """Save what was learned when `end` stops the run, unless it stopped a step after its
        update, before its row was complete: such a state has no checkpoint.

        Raises:
            CheckpointError: the checkpoint cannot be written; the message includes that of `end`.
        """
        if row.get("train/step") != self.steps_done:
            return
        try:
            self.save_unsaved(row)
        except HybridRLError as error:
            step = f"step {self.steps_done} has no checkpoint (older ones are intact)"
            raise CheckpointError(f"{end}; {step}: {error}") from end

    def _call_back(self, on_step: OnStep, row: Mapping[str, float]) -> None:
        """Call the caller's function with a copy of the row.

        Raises:
            Exception: as on_step raised it, after an attempt to save a checkpoint; a note says
                whether that succeeded.
        """
        try:
            on_step(self.steps_done, dict(row))
        except StopTraining:
            self.save_unsaved(row)
            self.stopped = self.steps_done < self.settings.train.steps
        except Exception as error:
            error.add_note(f"on_step raised this after step {self.steps_done} of the run")
            try:
                self.save_unsaved(row)
            except HybridRLError as unsaved:
                error.add_note(f"the step has no checkpoint (older ones are intact): {unsaved}")
            else:
                error.add_note("the step is saved, and the same call continues after it")
            raise

    def _step_or_skip(self) -> dict[str, float]:
        """Run a step and return its row of metrics. Up to train.max_skipped batches in a row are
        skipped if nothing can be learned from them.

        Raises:
            SkippedStep: nothing can be learned from one batch more.
        """
        started = time.perf_counter()
        for skips_left in reversed(range(1 + self.settings.train.max_skipped)):
            try:
                return self.step(started)
            except SkippedStep as error:
                if not skips_left:
                    raise
                log.warning("%s; the batch is left out", error)
        raise AssertionError("the last try returns or raises")

    # -- the parts of a step -----------------------------------------------------------------------

    @property
    def _groups_per_step(self) -> int:
        return self.settings.train.prompts_per_step

    def _sample(self) -> Sampled:
        """Wait for rollouts and their rewards. While too few groups are usable, draw further waves:
        at most algorithm.dynamic_sampling, or 1 if that is 0 and pipeline.on_stale=drop.
        """
        settings = self.settings
        step = self.steps_done
        dynamic = settings.algorithm.dynamic_sampling
        enough = self._groups_per_step if dynamic else 1
        further_waves = max(dynamic, int(settings.pipeline.on_stale is OnStale.drop))
        arrived: list[Arrived] = []
        returning: list[Prompt] = []
        self._enter(Phase.sample)
        for number in range(1 + further_waves):
            with self.clock.phase("rollout"):
                wave = self.pipeline.redraw(step) if number else self.pipeline.take(step)
                drawn = wave.drawn
                if settings.rollout.oversample:
                    drawn, cancelled = self.sampling.first(drawn, self._groups_per_step)
                    returning += [prompt for d in cancelled for prompt in d.chunk.prompts]
                headers = self.sampling.headers(drawn)
            with self.clock.phase("reward"):
                arrived_now = self.sampling.arrived(drawn, headers, step)
                returning += self.sampling.stale_prompts(arrived_now, step)
                arrived += arrived_now
                check_reward_errors(
                    [a.rewards for a in arrived],
                    settings.reward.max_error_rate,
                    step=step + 1,
                    learned_from=self.learns_from_rewards,
                )
            if sum(len(a.groups) for a in arrived) >= enough:
                break
        failpoints.hit("controller.sampled", step=step)
        return Sampled(
            arrived=arrived,
            returning=returning,
            num_sampled=self.pipeline.num_sampled,
            num_waves=len(self.pipeline.current),
        )

    def _score(self, sampled: Sampled) -> list[ScoreHeader]:
        """Wait until every teacher has scored every chunk."""
        with self.clock.phase("score"):
            return self.sampling.scores([a.drawn for a in sampled.arrived])

    def _plan(self, batch: GlobalBatch, mini_batch: int = 0) -> UpdatePlan:
        return update_plan(
            batch,
            mini_batch,
            self.settings,
            self.coefficients,
            step=self.steps_done,
            num_groups=self.sampling.num_pairs(batch.part([mini_batch])),
        )

    def _planned(self, used: Sequence[Arrived]) -> tuple[GlobalBatch, BatchPlan]:
        """Divide the used groups into mini-batches and order the updates on them. The random
        choices depend only on the run's seed and the step.
        """
        train = self.settings.train
        seed = wave_seed(self.settings.run.seed, "updates", self.steps_done)
        batch = divide(
            used,
            num_ranks=self.settings.learner.ranks,
            num_mini_batches=train.updates_per_batch,
            seed=seed,
        )
        count = len(batch.mini_batches)
        plan = BatchPlan(
            mini_batches=tuple(self._plan(batch, i) for i in range(count)),
            order=update_order(count, train.epochs_per_batch, seed),
            token_samples=num_token_samples(self.settings, self.steps_done),
        )
        return batch, plan

    def _learn(self, sampled: Sampled) -> Update:
        """Update the student on a batch of the first usable groups.

        Raises:
            SkippedStep: no gradient is finite; the prompts are not lost.
            WeightSyncError: the engines do not run the learner's weights.
        """
        with self.clock.phase("learn"):
            batch, plan = self._planned(first_groups(sampled.arrived, self._groups_per_step))
            probe_gap = self.probe.check()
            self._enter(Phase.learn)
            try:
                stats = self.learner.learn(plan, batch.groups, batch.values)
            except SkippedStep:
                self.pipeline.skip(sampled.returning)
                raise
            for sentence in stats.left_out:
                log.warning("%s; the update is left out", sentence)
            check_logprob_gap(stats, self.settings.rollout.max_logprob_gap, step=plan.step + 1)
        self._warn_of_rounding(stats)
        failpoints.hit("controller.learned", step=plan.step)
        return Update(batch=batch, plan=plan, probe_gap=probe_gap, stats=stats)

    def _record(self, sampled: Sampled, update: Update) -> None:
        """Count the step, and record in the ledger what happened to every prompt that was drawn for
        it. Prompts of a mini-batch that no update learned from are recorded as passed over.
        """
        self.steps_done += 1
        self.optimizer_steps = update.stats.optimizer_steps
        batch = update.batch
        learned = [i for i in range(len(batch.mini_batches)) if i not in update.stats.unlearned]
        skipped = [prompt.uid for prompt in self.pipeline.skipped]
        self.pipeline.settle(sampled.returning)
        trained, passed_over = trained_uids(sampled.arrived, batch.part(learned), sampled.returning)
        self.ledger.record(self.steps_done, trained, [*skipped, *passed_over])
        with suppress(RunDirectoryError):  # the check before the step's row raises it again
            self.ledger.check_in_place()
            write_token_samples(self.checkpointer.root.parent, update.stats.token_samples)

    def _sync(self) -> Published:
        with self.clock.phase("sync"):
            published = self.publish_weights()
        failpoints.hit("controller.synced", step=self.steps_done)
        return published

    def publish_weights(self) -> Published:
        """Send the weights to every engine. Their version is the number of steps done, so with
        schedule=sync step k (from 0) samples with version k.
        """
        self.weight_version = self.steps_done
        self._enter(Phase.sync)
        started = time.perf_counter()
        nbytes = self.weight_sync.publish(self.weight_version)
        seconds = time.perf_counter() - started
        self._enter(Phase.sample)
        with self.clock.phase("probe"):
            self.probe.start()
        return Published(nbytes=nbytes, seconds=seconds)

    def begin(self) -> None:
        """Give the engines the weights before the first step of a session. The time for that is
        counted in no step's row.
        """
        self.publish_weights()
        self.clock.take()

    def _enter(self, phase: Phase) -> None:
        """Begin a phase. With cluster.take_turns, this moves engines and learner off or onto the
        GPUs that they share.
        """
        if self.workers.residency.takes_turns:
            with self.clock.phase("turn"):
                self.workers.enter(phase)

    def _warn_of_rounding(self, stats: LearnerStats) -> None:
        """Log the warning of rounding_warning, at most once in a session."""
        if self.warned_of_rounding:
            return
        sentence = rounding_warning(self.settings, stats, self.learner.device)
        if sentence:
            log.warning("step %d: %s", self.steps_done + 1, sentence)
            self.warned_of_rounding = True

    def evaluate(self) -> dict[str, float]:
        """Evaluate the held-out problems and sets. Samples go to the sinks; returns the metrics."""
        with self.clock.phase("eval"):
            self.probe.check()
            result = self.evaluator.evaluate(self.steps_done)
        self.sinks.samples(result.samples)
        return result.metrics | self.clock.take()

    # -- state -------------------------------------------------------------------------------------

    def save(self, row: Mapping[str, float], *, last: bool) -> None:
        """Save a checkpoint. With checkpoint.background and without `last`, it is written while the
        run goes on; otherwise this returns when it is written. The time that the run waits for it
        appears in the next row.

        If it cannot be written, the log reports it and the run continues to the next checkpoint,
        since the older ones are undamaged. A scorer that fails at the beginning is replaced.

        Args:
            row: the step's metrics, among which is the one that checkpoint.best names.
            last: whether it is the last checkpoint of the run or of its session.

        Raises:
            CheckpointError: the checkpoint cannot be written, and `last` is true.
            RunDirectoryTaken: another directory is at the path of the run directory.
            WorkerError: a learner rank failed.
        """
        self.ledger.check_folder()
        with self.clock.phase("save"):
            self.saving.settle_logged()
            self._enter(Phase.learn)
            try:
                self._save(row, wait=last or not self.settings.checkpoint.background)
            except CheckpointError as error:
                if last:
                    raise
                log.error(
                    "step %d has no checkpoint (older ones are intact): %s",
                    self.steps_done,
                    error,
                )

    def save_unsaved(self, row: Mapping[str, float]) -> None:
        """Save a last checkpoint as `save` does, unless the newest one is of this step."""
        self.saving.settle_logged()
        if self.steps_done > self.saving.saved_step:
            self.save(row, last=True)

    def _save(self, row: Mapping[str, float], *, wait: bool) -> None:
        for _ in count():
            writers: list[Writer] = [
                self.learner,
                *self.workers.scorers,
                SettingsFile(self.settings),
            ]
            try:
                unfinished = self.checkpointer.begin(self.state(row), writers)
                finish = partial(self.checkpointer.finish, unfinished)
                self.saving.start(self.steps_done, finish)
                if wait:
                    self.saving.settle()
                return
            except WorkerError as error:
                self.workers.lose(error)

    def state(self, row: Mapping[str, float]) -> RunState:
        """The state of the run for a checkpoint; `row` has the metrics of its step."""
        return RunState(
            step=self.steps_done,
            weight_version=self.weight_version,
            optimizer_steps=self.optimizer_steps,
            parts={name: part.state_dict() for name, part in self.stateful.items()},
            metrics=dict(row),
            trackers=self.sinks.state_dict(),
            inputs=dict(self.inputs),
        )

    def load_state(self, state: RunState, folder: str) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: the state of a part of the controller is missing or has another form,
                or the workers cannot load their state.
            DataError: the state belongs to other prompts.
        """
        check_complete(state.parts, self.stateful, folder)
        self._enter(Phase.learn)
        self.learner.load_state(folder, state.optimizer_steps)
        for scorer in self.workers.scorers:
            teacher = scorer.teacher
            if of_teacher(state.inputs, teacher) == of_teacher(self.inputs, teacher):
                scorer.load_state(folder)
        load_parts(state.parts, self.stateful, folder)
        self.steps_done = state.step
        self.optimizer_steps = state.optimizer_steps
        self.saving.saved_step = state.step
        self.weight_version = state.weight_version


def driver_trace(settings: RunSettings) -> Trace:
    """The trace of the step's phases, which records nothing unless diagnostics.trace is set."""
    path = Path(settings.run.dir) / "logs" / f"{DRIVER}{SUFFIX}"
    return Trace(path if settings.diagnostics.trace else None)
