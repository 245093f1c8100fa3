"""The central loop. It holds headers and references; tokens, log-probs and weights go from worker
to worker.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from itertools import count

import numpy as np

from hybridrl.batch.balance import balance_groups, micro_batches
from hybridrl.controller.coefficients import Weights
from hybridrl.controller.engine_probe import EngineProbe
from hybridrl.controller.evaluation import Evaluation, evaluate
from hybridrl.controller.metrics import (
    late_metrics,
    learner_metrics,
    reward_metrics,
    rollout_metrics,
    transfer_metrics,
    worker_times,
)
from hybridrl.controller.pipeline import Pipeline, wave_seed
from hybridrl.controller.preemption import Preemption
from hybridrl.controller.rounding import rounding_warning
from hybridrl.controller.sampling import Arrived, Sampling, first_groups
from hybridrl.core import failpoints
from hybridrl.core.errors import (
    CheckpointError,
    DataError,
    Preempted,
    RewardError,
    RunDirectoryError,
    RunDirectoryTaken,
    SkippedStep,
    WeightSyncError,
    WorkerError,
)
from hybridrl.data.prompts import PromptSource
from hybridrl.objectives import make_objective
from hybridrl.run_dir.checkpoint import Checkpointer, RunState, SettingsFile, Stateful
from hybridrl.run_dir.ledger import Ledger
from hybridrl.runtime.calls import Meter, Reference
from hybridrl.runtime.cluster import object_store_bytes
from hybridrl.runtime.weight_sync import WeightSync
from hybridrl.runtime.workers import Workers
from hybridrl.settings.choices import OnStale, WeightTransfer
from hybridrl.settings.run import RunSettings
from hybridrl.tracking.sink import Sinks
from hybridrl.tracking.timing import PhaseClock
from hybridrl.types import LearnerStats, Prompt, Rewards, Shard, UpdatePlan

log = logging.getLogger(__name__)


class Controller:
    """One step, in the order of the paper:

    prompts -> rollout -> chunks -+-> scorers -> scores  -+
                                  +-> rewards -> rewards -+-> learner -> weights -> rollout

    Arrows between workers are object-store references. Scoring of a chunk starts when the chunk is
    done, while others still generate; learning starts when every chunk's header is here, in prompt
    order. With pipeline.ahead > 0 the same goes on for the next steps' prompts meanwhile.
    """

    def __init__(
        self,
        settings: RunSettings,
        *,
        workers: Workers,
        backend: WeightTransfer,
        prompts: PromptSource,
        heldout: Sequence[Prompt],
        sinks: Sinks,
        checkpointer: Checkpointer,
        ledger: Ledger,
        preemption: Preemption,
    ) -> None:
        self.settings = settings
        self.workers, self.learner = workers, workers.learner
        self.sampling, self.weights_of = Sampling(settings, workers, preemption), Weights(settings)
        self.pipeline = Pipeline(
            settings, self.sampling, prompts, self.weights_of, store_bytes=object_store_bytes()
        )
        self.weights, self.probe = (
            WeightSync(workers.learner, workers.rollout, backend),
            EngineProbe(settings, workers, prompts.prompts),
        )
        self.prompts, self.heldout, self.sinks, self.checkpointer, self.ledger = (
            prompts,
            heldout,
            sinks,
            checkpointer,
            ledger,
        )
        self.stateful: dict[str, Stateful] = {
            "pipeline": self.pipeline,
            "schedules": self.weights_of,
        }
        self.heldout_data = heldout_with_responses(settings, heldout)
        self.needs = make_objective(settings).needs
        self.preemption, self.clock = preemption, PhaseClock()
        self.steps_done = 0
        self.weight_version = 0
        self.saved_step = 0
        self.wandb_id: str | None = None  # None: wandb is off
        self.warned_of_rounding = False
        self.inputs: dict[str, str] = {}  # controller.inputs.digests, for checkpoints

    def step(self) -> dict[str, float]:
        """One optimizer step; returns its metrics."""
        started, fetched = time.perf_counter(), Meter.materialized_bytes
        arrived, late = self._sample()
        headers, rewards = [a.header for a in arrived], [a.rewards for a in arrived]
        failpoints.hit("controller.sampled", step=self.steps_done)
        with self.clock.phase("score"):
            score_headers = self.sampling.scores([a.drawn for a in arrived])
        with self.clock.phase("learn"):
            used = first_groups(arrived, self.settings.train.prompts_per_step)
            shards = self._shards(used)
            plan = self._plan(used, shards)
            probe_gap = self.probe.check()
            try:
                stats = self.learner.update(
                    plan, [shard for shard, _ in shards], values_of(used, shards)
                )
            except SkippedStep:
                self.pipeline.skip(late)
                raise
            self._check_logprob_gap(stats)
        self._warn_of_rounding(stats)
        failpoints.hit("controller.learned", step=self.steps_done)
        self.steps_done += 1
        sampled, skipped = (
            self.pipeline.num_sampled,
            [prompt.uid for prompt in self.pipeline.skipped],
        )
        self.pipeline.settle(late)
        trained, passed_over = trained_uids(arrived, used, late)
        self.ledger.record(self.steps_done, trained, [*skipped, *passed_over])
        with self.clock.phase("sync"):
            weight_bytes = self.publish_weights()
        failpoints.hit("controller.synced", step=self.steps_done)
        step_s = time.perf_counter() - started
        row = {
            "train/step": float(self.steps_done),
            **reward_metrics(rewards),
            **rollout_metrics(headers, rewards, plan.step),
            **learner_metrics(plan, stats),
            **transfer_metrics(
                headers,
                score_headers,
                weight_bytes,
                self.clock.seconds("sync") - self.clock.seconds("probe"),
            ),
            **late_metrics(late, sampled),
            "policy/probe_gap": probe_gap,
            "transfer/inflight_bytes": float(self.pipeline.in_flight_bytes),
            "controller/materialized_bytes": float(Meter.materialized_bytes - fetched),
            "perf/tokens_per_s": float(sum(h.response_lengths.sum() for h in headers)) / step_s,
            "time/step_s": step_s,
            "cluster/restarts": float(self.workers.restarts),
            **worker_times(headers, score_headers, stats),
            **self.clock.take(),
        }
        self.pipeline.wave_bytes = int(row["transfer/bytes_rollout"] + row["transfer/bytes_scores"])
        self.weights_of.observe(row)
        return row

    def _sample(self) -> tuple[list[Arrived], list[Prompt]]:
        """Rollouts with their rewards, and prompts that come again. Further waves while too few
        groups are usable, as far as algorithm.dynamic_sampling and pipeline.on_stale make that a
        normal thing.
        """
        settings, step = self.settings, self.steps_done
        wanted = settings.train.prompts_per_step
        enough = wanted if settings.algorithm.dynamic_sampling else 1
        further = max(
            settings.algorithm.dynamic_sampling, int(settings.pipeline.on_stale is OnStale.drop)
        )
        arrived: list[Arrived] = []
        late: list[Prompt] = []
        for again in range(1 + further):
            with self.clock.phase("rollout"):
                drawn = (self.pipeline.redraw(step) if again else self.pipeline.take(step)).drawn
                if settings.rollout.oversample:
                    drawn, cancelled = self.sampling.first(drawn, wanted)
                    late += [prompt for d in cancelled for prompt in d.chunk.prompts]
                headers = self.sampling.headers(drawn)
            with self.clock.phase("reward"):
                fresh = self.sampling.arrived(drawn, headers, step)
                late += self.sampling.stale_prompts(fresh, step)
                arrived += fresh
                self._check_reward_errors([a.rewards for a in arrived])
            if sum(len(a.groups) for a in arrived) >= enough:
                break
        return arrived, late

    def run(self) -> None:
        """Train to train.steps from wherever the state stands; evaluate, checkpoint and log on the
        way.

        Raises:
            Preempted: the run was told to end; what was learned so far is saved.
            RunDirectoryTaken: the run directory is another run's now; nothing is saved there.
            RunDirectoryError: the run directory or a file of it was removed, moved or replaced.
                What was learned so far is saved under its path.
        """
        settings, row = self.settings, {}
        while self.steps_done < settings.train.steps:
            try:
                self.preemption.check()
                self.ledger.check_in_place()
                row = self._step_or_skip()
                last = self.steps_done == settings.train.steps
                if last or (settings.eval.every and self.steps_done % settings.eval.every == 0):
                    row |= self.evaluate()
                # Before the checkpoint: a resumed run keeps the rows up to its checkpoint's step.
                self.sinks.log(row)
            except RunDirectoryTaken:
                raise
            except (Preempted, RunDirectoryError):
                if self.steps_done > self.saved_step:
                    self.save(row, last=False)
                raise
            failpoints.hit("controller.logged", step=self.steps_done)
            if last or (
                settings.checkpoint.every and self.steps_done % settings.checkpoint.every == 0
            ):
                self.save(row, last=last)
            failpoints.hit("controller.saved", step=self.steps_done)

    def _step_or_skip(self) -> dict[str, float]:
        """A step; batches of which nothing could be learned are left out, train.max_skipped of them
        in a row.
        """
        for left in reversed(range(1 + self.settings.train.max_skipped)):
            try:
                return self.step()
            except SkippedStep as error:
                if not left:
                    raise
                log.warning("%s; the batch is left out", error)
        raise AssertionError("the last try returns or raises")

    def publish_weights(self) -> int:
        """Engines sample step k's rollouts with version k; returns the bytes sent to each
        engine.
        """
        self.weight_version = self.steps_done
        num_bytes = self.weights.publish(self.weight_version)
        with self.clock.phase("probe"):
            self.probe.ask()
        return num_bytes

    def evaluate(self) -> dict[str, float]:
        with self.clock.phase("eval"):
            self.probe.check()
            result = self._evaluate()
            data_metrics = self._evaluate_on_data()
        self.sinks.samples(result.samples)
        return result.metrics | data_metrics | self.clock.take()

    def _evaluate_on_data(self) -> dict[str, float]:
        """The loss on the held-out data's own responses (eval/loss, ...); empty where the run
        learns from no data.
        """
        prompts = self.heldout_data
        if not prompts:
            return {}
        drawn = self.sampling.heldout(prompts, wave=f"eval-data-{self.steps_done}")
        headers = self.sampling.headers(drawn)
        arrived = self.sampling.arrived(drawn, headers, self.steps_done)
        self.sampling.scores(drawn)
        shards = self._shards(arrived)
        plan = self._plan(arrived, shards)
        return self.learner.evaluate(
            plan, [shard for shard, _ in shards], values_of(arrived, shards)
        ).metrics

    def _evaluate(self) -> Evaluation:
        """Once more from the start when a worker is lost, in a wave of another name: engines that
        live still have the old one.
        """
        seed = wave_seed(self.settings.run.seed, "eval", self.steps_done)
        for again in count():
            try:
                return evaluate(
                    self.settings.eval,
                    self.workers.rollout,
                    self.workers.rewards,
                    self.heldout,
                    wave=f"eval-{self.steps_done}.{again}",
                    step=self.steps_done,
                    temperature=self.settings.algorithm.temperature,
                    seed=seed,
                    watch=self.workers.silent,
                )
            except WorkerError as error:
                self.workers.lose(error)
        raise AssertionError("count never ends")

    def save(self, row: Mapping[str, float], *, last: bool) -> None:
        """Commit a checkpoint; its time appears in the next step's row. One that fails is told and
        tried again when the next is due: the older ones are whole, and the run may go on. A scorer
        that is lost is replaced first.

        Raises:
            CheckpointError: the last one failed.
            RunDirectoryTaken: the run directory is another run's now.
            WorkerError: a learner rank was lost.
        """
        self.ledger.check_folder()
        with self.clock.phase("save"):
            try:
                self._save(row)
                self.saved_step = self.steps_done
            except CheckpointError as error:
                if last:
                    raise
                log.error(
                    "step %d has no checkpoint, the older ones are whole: %s",
                    self.steps_done,
                    error,
                )

    def _save(self, row: Mapping[str, float]) -> None:
        for _ in count():
            writers = [self.learner, *self.workers.scorers, SettingsFile(self.settings)]
            try:
                self.checkpointer.save(self.state(row), writers)
                return
            except WorkerError as error:
                self.workers.lose(error)

    # -- state -------------------------------------------------------------------------------------

    def state(self, row: Mapping[str, float]) -> RunState:
        return RunState(
            step=self.steps_done,
            weight_version=self.weight_version,
            optimizer_steps=self.steps_done,
            parts={name: part.state_dict() for name, part in self.stateful.items()},
            metrics=dict(row),
            wandb_id=self.wandb_id,
            inputs=self.inputs,
        )

    def load_state(self, state: RunState, folder: str) -> None:
        """Raises:
        CheckpointError: a part of the controller has no state there or one of another form, or the
        workers cannot load theirs. DataError: the state is of other prompts.
        """
        if missing := self.stateful.keys() - state.parts.keys():
            raise CheckpointError(
                f"{folder}: has no state of {', '.join(sorted(missing))}; it is of another "
                "version of hybridrl"
            )
        self.learner.load_state(folder, state.optimizer_steps)
        for scorer in self.workers.scorers:
            scorer.load_state(folder)
        for name, part in self.stateful.items():
            try:
                part.load_state_dict(state.parts[name])
            except DataError:  # of other prompts, and it says so
                raise
            except (TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
                raise CheckpointError(
                    f"{folder}: its state of {name} has another form than this version of hybridrl "
                    f"writes: {error!r}"
                ) from error
        self.steps_done = self.saved_step = state.step
        self.weight_version = state.weight_version

    # -- parts of a step ---------------------------------------------------------------------------

    def _plan(
        self, used: Sequence[Arrived], shards: Sequence[tuple[Shard, list[int]]]
    ) -> UpdatePlan:
        settings, step = self.settings, self.steps_done
        keep = [a.of_groups(a.rewards.keep) for a in used]
        tokens = [a.of_groups(a.header.response_lengths) for a in used]
        return UpdatePlan(
            step=step,
            num_tokens=int(sum(t[k].sum() for t, k in zip(tokens, keep, strict=True))),
            num_sequences=int(sum(k.sum() for k in keep)),
            num_groups=self.sampling.num_pairs(used),
            num_micro_batches=max(
                self._count_micro_batches(shard, mine, used) for shard, mine in shards
            ),
            lr=learning_rate(settings, step),
            teacher_weights=self.weights_of.teachers(step),
            teacher_routes=tuple(
                settings.teachers[name].route for name in settings.scored_teachers
            ),
            reward_weight=self.weights_of.reward(step),
            diagnose=bool(settings.diagnostics.every) and step % settings.diagnostics.every == 0,
        )

    def _shards(self, used: Sequence[Arrived]) -> list[tuple[Shard, list[int]]]:
        """Per learner rank: its groups, and the indices of the chunks that hold them."""
        tokens = [a.of_groups(a.header.num_tokens).sum(axis=1) for a in used]  # per chunk [G']
        where = [(c, g) for c, a in enumerate(used) for g in a.groups]
        shards = []
        for groups in balance_groups(
            [int(n) for t in tokens for n in t], self.settings.learner.ranks
        ):
            mine = [where[i] for i in groups]
            chunks = sorted({c for c, _ in mine})
            per_chunk = tuple(tuple(g for c, g in mine if c == chunk) for chunk in chunks)
            shards.append(
                (
                    Shard(
                        num_chunks=len(chunks),
                        num_teachers=len(self.workers.scorers),
                        groups=per_chunk,
                    ),
                    chunks,
                )
            )
        return shards

    def _count_micro_batches(
        self, shard: Shard, chunks: Sequence[int], used: Sequence[Arrived]
    ) -> int:
        lengths: list[int] = []
        for chunk, groups in zip(chunks, shard.groups, strict=True):
            header = used[chunk].header
            lengths += (
                header.num_tokens.reshape(-1, header.group_size)[list(groups)].flatten().tolist()
            )
        train = self.settings.train
        return max(
            len(micro_batches(lengths, train.max_tokens_per_micro_batch, packed=train.packing)), 1
        )

    def _check_reward_errors(self, rewards: Sequence[Rewards]) -> None:
        if not self.needs.rewards:  # they are only watched
            return
        rate, limit = (
            float(np.concatenate([r.errors for r in rewards]).mean()),
            self.settings.reward.max_error_rate,
        )
        if rate > limit:
            raise RewardError(
                f"step {self.steps_done}: {rate:.1%} of the reward calls failed, "
                f"reward.max_error_rate is {limit:.1%}; see logs/reward-*.log"
            )

    def _check_logprob_gap(self, stats: LearnerStats) -> None:
        gap, limit = (
            stats.metrics.get("policy/logprob_gap", 0.0),
            self.settings.rollout.max_logprob_gap,
        )
        if not gap <= limit:
            raise WeightSyncError(
                f"step {self.steps_done}: sampler and learner differ by {gap:.3g} nats per token, "
                f"rollout.max_logprob_gap is {limit:g}; "
                "the engines do not run the learner's weights, or not in the learner's precision"
            )

    def _warn_of_rounding(self, stats: LearnerStats) -> None:
        """Once in a run."""
        if self.warned_of_rounding:
            return
        sentence = rounding_warning(self.settings, stats.metrics, self.learner.device)
        if sentence:
            log.warning("step %d: %s", self.steps_done, sentence)
            self.warned_of_rounding = True


def heldout_with_responses(settings: RunSettings, heldout: Sequence[Prompt]) -> list[Prompt]:
    """Held-out prompts with responses such as the run learns from; none where it learns from no
    data.
    """
    if not settings.algorithm.data_fraction:
        return []
    wanted = settings.algorithm.responses_per_prompt
    return [prompt for prompt in heldout if len(prompt.responses) == wanted]


def values_of(
    used: Sequence[Arrived], shards: Sequence[tuple[Shard, list[int]]]
) -> list[list[Reference]]:
    """Per learner rank, the references that follow its shard: of each of its chunks the batch, the
    rewards and the scores.
    """
    of_chunk = [
        [
            a.drawn.chunk.batch.ref,
            a.drawn.rewards[0].ref,
            *(scores.ref for _, scores in a.drawn.scores),
        ]
        for a in used
    ]
    return [[ref for chunk in chunks for ref in of_chunk[chunk]] for _, chunks in shards]


def learning_rate(settings: RunSettings, step: int) -> float:
    """Linear warm-up, then constant or half a cosine down to lr_end."""
    train = settings.train
    if step < train.lr_warmup_steps:
        return train.lr * (step + 1) / train.lr_warmup_steps
    if train.lr_end is None:
        return train.lr
    done = (step - train.lr_warmup_steps) / max(train.steps - train.lr_warmup_steps, 1)
    return train.lr_end + (train.lr - train.lr_end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def trained_uids(
    arrived: Sequence[Arrived], used: Sequence[Arrived], late: Sequence[Prompt]
) -> tuple[list[str], list[str]]:
    """(trained on, passed over) of the prompts drawn: a group that is not used, or whose reward
    failed, teaches nothing. Those that come again are neither.
    """
    trained = [
        a.header.uids[g]
        for a in used
        for g in a.groups
        if a.rewards.keep.reshape(-1, a.header.group_size)[g].all()
    ]
    elsewhere = {*trained, *(prompt.uid for prompt in late)}
    return trained, [uid for a in arrived for uid in a.header.uids if uid not in elsewhere]
