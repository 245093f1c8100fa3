"""One rank of the student's learner: forward pass, hybrid gradient and AdamW step under DeepSpeed's
ZeRO 1, 2 or 3.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hybridrl.batch.groups import scored_batches
from hybridrl.batch.micro_batch import MicroBatch, idle_sequence, train_sequences
from hybridrl.batch.packing import check_packing
from hybridrl.core import failpoints
from hybridrl.core.errors import ConfigError, NonFiniteError, SkippedStep
from hybridrl.core.peak_memory import PeakMemory
from hybridrl.models.adapters import dropout
from hybridrl.models.loading import load_tokenizer
from hybridrl.objectives import make_objective
from hybridrl.objectives.credit import Credit, assign_credit
from hybridrl.objectives.head_rule import head_rule
from hybridrl.objectives.hybrid import by_sequence
from hybridrl.policy.device_memory import DeviceMemory
from hybridrl.policy.diagnostics import gradient_geometry, teacher_distance
from hybridrl.policy.learner_view import ForwardPasses, LearnerView
from hybridrl.policy.optimizer_state import OptimizerState
from hybridrl.policy.shared_base import Base, SharedTeachers
from hybridrl.policy.skipped_batch import refuse_batch
from hybridrl.policy.statistics import (
    TOKENS,
    Tally,
    Updated,
    batch_metrics,
    count_credits,
    count_micro,
    heldout_metrics,
    learner_stats,
)
from hybridrl.policy.student import Look, Student
from hybridrl.policy.token_samples import token_samples
from hybridrl.policy.training_setup import (
    adam,
    deepspeed_config,
    join_ranks,
    set_layers,
    sharded_model,
    zero_stage,
)
from hybridrl.policy.weight_publisher import WeightPublisher
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.inbox import TeacherInbox
from hybridrl.types import (
    NO_VERSION,
    BatchPlan,
    LearnerStats,
    Rewards,
    RolloutBatch,
    SavedFile,
    ScoredBatch,
    TokenSample,
    TokenScores,
    UpdatePlan,
    WeightManifest,
    Work,
)
from hybridrl.weights.library_internals import left_out, set_adam, update_memory
from hybridrl.weights.parameters import WeightsKind, train_only, weights_kind


class Learner:
    """Holds a shard of the student and its optimizer; every method is called on all ranks
    together.
    """

    def __init__(
        self,
        settings: RunSettings,
        *,
        rank: int,
        master: tuple[str, int],
        device: str,
        weights: WeightsKind | None = None,
    ) -> None:
        """
        Args:
            weights: the class of student weights to train; None: the one that the settings name.
        """
        self.settings = settings
        self.rank = rank
        self.world = settings.learner.ranks
        self.device = torch.device(device)
        self.peaks = PeakMemory.of_device(device)
        join_ranks(settings, rank, master, self.device)
        config = deepspeed_config(settings, self.device)
        self.model = sharded_model(settings, config)
        head = self.model.get_output_embeddings()
        with self._gather([head.weight] if head is not None else []):  # Student checks it
            student = Student(
                self.model,
                head_rule(settings),
                with_value=make_objective(settings).needs.learner_values,
            )
        self.weights_kind = weights or weights_kind(settings)
        value_head = student.value_head
        head_weight = None if value_head is None else value_head.get_parameter("weight")
        self.weights = self.weights_kind(self.model, head_weight)  # may change the model's layers
        set_layers(self.model, settings, self.device)
        optimizer = adam(train_only(self.weights, student), settings)
        self.engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=config)
        self.publisher = WeightPublisher(self.weights, self._gather, rank=rank)
        self.state = OptimizerState(
            self.weights.saved(), self.engine.optimizer, self._step_without_moving
        )
        self.memory = DeviceMemory(self.device)
        self.optimizer_steps = 0
        self.configure(settings)
        if settings.train.packing:
            check_packing(
                self.view.logprobs,
                vocabulary=self.model.config.get_text_config().vocab_size,
                dtype=self.model.dtype,
                model=type(self.model).__name__,
            )

    def configure(self, settings: RunSettings) -> None:
        """Use other settings from now on: algorithm, teachers, learning rate, micro-batches. The
        student's weights are kept.

        Raises:
            ConfigError: the settings need a value head, and the student was built without one.
        """
        self.objective = make_objective(settings)
        if self.objective.needs.learner_values and self.engine.module.value_head is None:
            raise ConfigError(
                "algorithm: needs a value head, which the running learner lacks; start a separate "
                "run"
            )
        self.settings = settings
        self.engine.module.head.rule = head_rule(settings)
        evidence = self.objective.needs.evidence
        self.shared: SharedTeachers | None = None
        head = self._base_head() if settings.shared_teachers else None
        if head is not None:
            together = zero_stage(settings) == 3
            base = Base(self.engine, self.model, head, together=together)
            self.shared = SharedTeachers(settings, evidence, base)
        self.teachers = TeacherInbox.load(settings, evidence, self.device, head)
        self.passes = ForwardPasses(settings.train, idle_sequence(self.teachers.idle()))
        self.view = LearnerView(self.engine, self.passes, self.device)

    def keep_start(self) -> None:
        """Copy the student's present weights, from which each `begin_job` will start."""
        self.state.keep_start()

    def begin_job(self, settings: RunSettings) -> None:
        """Start another job, as a newly built learner would: with the weights that `keep_start`
        copied and an optimizer that has taken no step.

        Args:
            settings: those of the job. The settings that launch.worker_conditions lists must equal
                those of this learner.
        """
        self.state.back_to_start()
        self.optimizer_steps = 0
        self.peaks.take()
        train = settings.train
        first, second = train.betas
        set_adam(
            self.engine.optimizer,
            betas=(first, second),
            weight_decay=train.weight_decay,
            clip=train.grad_clip,
        )
        self.configure(settings)

    def ping(self) -> int:
        return self.optimizer_steps

    # -- training ----------------------------------------------------------------------------------

    def update(
        self,
        plan: UpdatePlan,
        groups: Sequence[Sequence[int]],
        *values: RolloutBatch | Rewards | TokenScores,
    ) -> LearnerStats:
        """One optimizer step on this rank's groups: a batch that is a single mini-batch.

        Args:
            groups: for each chunk, the indices of its groups that belong to this rank.
            values: as in `learn`.

        Raises:
            SkippedStep, NonFiniteError: as in `learn`.
        """
        return self.learn(BatchPlan.one_update(plan), (groups,), *values)

    def learn(
        self,
        plan: BatchPlan,
        groups: Sequence[Sequence[Sequence[int]]],
        *values: RolloutBatch | Rewards | TokenScores,
    ) -> LearnerStats:
        """The optimizer steps of one batch on this rank's groups.

        An update whose gradient is NaN or infinite is left out and changes nothing. If the batch
        has further updates, they are made, unless more than train.max_skipped in a row were left
        out.

        Args:
            groups: for each mini-batch and each chunk, the indices of its groups that belong to
                this rank.
            values: for each chunk its RolloutBatch, its Rewards and one TokenScores per teacher.

        Raises:
            SkippedStep: no update was made, since no gradient is finite; this rank's mini-batches
                are in run.dir/skipped.
            NonFiniteError: more than train.max_skipped updates in a row were left out, or a loss
                is not finite and the weights were stepped. The mini-batch is in run.dir/skipped.
        """
        with self.peaks.phase("learn"):
            return self._learn(plan, groups, values)

    def _learn(
        self,
        plan: BatchPlan,
        groups: Sequence[Sequence[Sequence[int]]],
        values: Sequence[RolloutBatch | Rewards | TokenScores],
    ) -> LearnerStats:
        self._check_resident()
        started = time.monotonic()
        batches = [self._scored(own, values) for own in groups]
        if self.objective.needs.old_logprobs:
            batches = [
                with_old_logprobs(self.view.with_own_columns(scored, mini.num_micro_batches))
                for mini, scored in zip(plan.mini_batches, batches, strict=True)
            ]
        made: dict[int, list[Updated]] = {index: [] for index in plan.order}
        left_out: list[str] = []
        in_a_row = 0
        for number, index in enumerate(plan.order):
            try:
                made[index].append(self._update(plan, number, batches[index]))
                in_a_row = 0
            except SkippedStep as error:
                left_out.append(str(error))
                in_a_row += 1
                self._check_skipped(plan, in_a_row, error)
        updates = [update for of_mini_batch in made.values() for update in of_mini_batch]
        if not updates:
            raise SkippedStep(left_out[-1])
        totals = Tally.over_updates([update.tally for update in updates]).totals()
        metrics = batch_metrics(
            totals, [update.plan for update in updates], [update.grad_norm for update in updates]
        )
        for update in updates:
            metrics |= update.diagnostics
        took = time.monotonic() - started
        lengths = [b.rollout.response_lengths.sum() for i in plan.order for b in batches[i]]
        work = Work(tokens=int(sum(lengths)), busy_s=took, peak_bytes=self.peaks.take())
        stats = learner_stats(
            totals,
            metrics,
            took,
            optimizer_steps=self.optimizer_steps,
            left_out=left_out,
            unlearned=[index for index, of_mini_batch in made.items() if not of_mini_batch],
        )
        stats = replace(stats, work=(work,))
        if self.rank or not plan.token_samples:
            return stats
        return replace(stats, token_samples=self._token_samples(plan, batches))

    def _token_samples(
        self, plan: BatchPlan, batches: Sequence[Sequence[ScoredBatch]]
    ) -> tuple[TokenSample, ...]:
        """A few responses of the first mini-batch, with student and teacher compared at each
        token.
        """
        model = self.settings.model
        return token_samples(
            batches[0],
            self.teachers,
            self.engine.module.head.rule,
            load_tokenizer(model.path, model.revision, eos=model.eos),
            plan.mini_batches[0],
            plan.token_samples,
        )

    def _update(self, plan: BatchPlan, number: int, batches: Sequence[ScoredBatch]) -> Updated:
        """The optimizer step of update `number` of a batch.

        Raises:
            SkippedStep, NonFiniteError: the loss or gradient is NaN or infinite; see refuse_batch.
        """
        mini = plan.mini_batches[plan.order[number]]
        failpoints.hit("learner.update", step=mini.step, rank=self.rank)
        tally = Tally(self.device)
        # The pass that gave the old log-probs is also the forward pass before the first update.
        viewed = number == 0 and self.objective.needs.old_logprobs
        credits, micros = self._prepare(mini, batches, viewed=viewed)
        diagnostics = self._diagnostics(micros) if mini.diagnose and number == 0 else {}
        version = mini.step if number == 0 else NO_VERSION  # engines get no weights between updates
        with dropout(self.model, self._seed(mini.step, number)):
            for micro in micros:
                self._backward(micro, tally, version)
        count_credits(tally, credits)
        tally.reduce()
        # If no token has a weight, momentum and weight decay alone would still move the weights.
        learns = tally.totals()[TOKENS] > 0
        for group in self.engine.optimizer.param_groups:
            group["lr"] = mini.lr if learns else 0.0
        self.engine.step()  # changes nothing if a gradient is not finite
        grad_norm = float(self.engine.get_global_grad_norm())
        totals = tally.totals()
        if not (np.isfinite(totals["train/loss"]) and np.isfinite(grad_norm)):
            refuse_batch(
                plan,
                number,
                totals,
                grad_norm,
                micros,
                run_dir=Path(self.settings.run.dir).expanduser(),
                rank=self.rank,
                stepped=not left_out(self.engine.optimizer),
            )
        self.optimizer_steps += 1
        return Updated(plan=mini, tally=tally, grad_norm=grad_norm, diagnostics=diagnostics)

    def _check_skipped(self, plan: BatchPlan, in_a_row: int, error: SkippedStep) -> None:
        """Raise NonFiniteError if more than train.max_skipped updates in a row were left out.

        A batch of a single update is left out as a whole, and the controller counts it.
        """
        limit = self.settings.train.max_skipped
        if len(plan.order) > 1 and in_a_row > limit:
            raise NonFiniteError(f"{error}; train.max_skipped={limit} updates in a row") from error

    def evaluate(
        self,
        plan: UpdatePlan,
        groups: Sequence[Sequence[int]],
        *values: RolloutBatch | Rewards | TokenScores,
    ) -> LearnerStats:
        """Measure this rank's groups of held-out data as `update` does, without learning.

        Args:
            plan: with the counts of the held-out data.
            groups, values: as in `update`.

        Returns:
            Statistics whose metrics have the keys eval/*.
        """
        started = time.monotonic()
        tally = Tally(self.device)
        credits, micros = self._prepare(plan, self._scored(groups, values))
        with torch.no_grad():
            for micro in micros:
                self._forward(micro, tally, plan.step)
        count_credits(tally, credits)
        tally.reduce()
        totals = tally.totals()
        return learner_stats(
            totals,
            heldout_metrics(totals),
            time.monotonic() - started,
            optimizer_steps=self.optimizer_steps,
        )

    def _scored(
        self,
        groups: Sequence[Sequence[int]],
        values: Sequence[RolloutBatch | Rewards | TokenScores],
    ) -> list[ScoredBatch]:
        """This rank's groups of a mini-batch with the scores of all teachers."""
        batches = scored_batches(groups, values)
        return batches if self.shared is None else self.shared.scored(batches)

    def shared_scores(self, batch: RolloutBatch) -> list[TokenScores]:
        """The scores that each teacher of settings.shared_teachers gives the batch."""
        assert self.shared is not None, "the run has such teachers"
        return self.shared.answers(batch)

    def _base_head(self) -> Tensor:
        """[V, H] the output embedding, which does not train; a whole copy if it is sharded."""
        weight = self.engine.module.head.weight
        if zero_stage(self.settings) < 3:
            return weight.detach()
        with self._gather([weight]):
            return weight.detach().to(self.device, copy=True)

    def _prepare(
        self, plan: UpdatePlan, batches: Sequence[ScoredBatch], *, viewed: bool = False
    ) -> tuple[list[Credit], list[MicroBatch]]:
        """The credit of this rank's groups, and the micro-batches of their tokens.

        Args:
            viewed: the batches already have the log-probs and values of the present weights.
        """
        if self.objective.needs.learner_view and not viewed:
            batches = self.view.with_own_columns(batches, plan.num_micro_batches)
        credits = assign_credit(self.objective, batches, plan, self._sum_over_ranks)
        sequences: list[MicroBatch] = []
        for batch, credit in zip(batches, credits, strict=True):
            teachers = self.teachers.head_inputs(batch, credit.teacher_weights)
            columns = credit.learned(torch.float32)
            sequences += train_sequences(batch.rollout, columns, teachers)
        divided = self.passes.divided(sequences, plan.num_micro_batches)
        micros = [self.passes.collated([sequences[i] for i in indices]) for indices in divided]
        return credits, micros

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        on_device = sums.to(self.device)
        dist.all_reduce(on_device)
        return on_device.cpu()

    def _backward(self, micro: MicroBatch, tally: Tally, version: int) -> None:
        """Forward and backward of one micro-batch, counted in `tally`."""
        loss = self._forward(micro, tally, version)
        # DeepSpeed averages gradients over ranks; the objective's normaliser is already global.
        self.engine.backward(loss * self.world, scale_wrt_gas=False)

    def _forward(self, micro: MicroBatch, tally: Tally, version: int) -> Tensor:
        """The loss [] of one micro-batch, counted in `tally`."""
        loss, stats = self.engine(*micro.to(self.device).arguments(), Look.learn)
        count_micro(
            tally,
            loss,
            stats,
            micro,
            version,
            has_old=self.objective.needs.old_logprobs,
            by_sequence=by_sequence(self.settings.algorithm),
        )
        return loss

    def _diagnostics(self, micros: Sequence[MicroBatch]) -> dict[str, float]:
        """Diagnostics that are too expensive for every step."""
        metrics = teacher_distance(self.engine, micros, self.device)
        if zero_stage(self.settings) < 3:
            metrics |= gradient_geometry(self.engine.module, micros, self.device)
        return metrics

    def logprob_gaps(self, *batches: RolloutBatch) -> list[float]:
        """Mean |log p(y) - log mu(y)| of each batch's response tokens, in nats; see LearnerView."""
        return self.view.logprob_gaps(batches)

    # -- memory ------------------------------------------------------------------------------------

    def release(self) -> None:
        """Free the device's memory except for the weights: master weights and moments move to host
        memory, gradient buffers are dropped, and torch's cache is emptied. Until `acquire` the
        learner can run forward passes and send weights, but not learn, save or load.
        """
        self.engine.empty_partition_cache()  # weights that ZeRO 3 has gathered for the next pass
        self.memory.release(*update_memory(self.engine.optimizer))
        torch.cuda.empty_cache()

    def acquire(self) -> None:
        """Undo `release`; later updates are what they would have been without it."""
        self.memory.acquire()

    def _check_resident(self) -> None:
        if self.memory.released:
            raise RuntimeError("the learner has released its optimizer; acquire() comes first")

    # -- weights out -------------------------------------------------------------------------------

    def pack_weights(self, version: int) -> tuple[WeightManifest | None, np.ndarray | None]:
        """The student's weights in its own dtype; (None, None) on all ranks but 0, which only help
        to gather them.
        """
        with self.peaks.phase("sync"):
            return self.publisher.pack(version)

    def connect_engines(
        self, backend: str, master: tuple[str, int], call: Callable, num_engines: int
    ) -> None:
        """Open vLLM's own nccl or ipc channel to the engines, over which rank 0 sends."""
        self.publisher.connect(
            backend,
            master,
            call,
            num_engines=num_engines,
            tensor_parallel=self.settings.rollout.tensor_parallel,
        )

    def send_weights(self, version: int) -> int:
        """Send the weights through that channel, and wait until every engine serves them as this
        version.

        Returns:
            The bytes that each engine received.
        """
        with self.peaks.phase("sync"):
            return self.publisher.send(version)

    def export(self, folder: str) -> None:
        """Write the student as a Hugging Face folder, with its value head if it has one. Rank 0
        writes.
        """
        self.publisher.export(self.settings, Path(folder), self.weights_kind)

    # -- checkpoint --------------------------------------------------------------------------------

    def state_bytes(self) -> int:
        """The bytes that begin_save will write on this rank, without headers."""
        return self.state.nbytes()

    def begin_save(self, folder: str) -> None:
        """Begin to write this rank's pieces of the present fp32 master weights and Adam moments
        into a file of its own.

        Raises:
            NonFiniteError: a weight or moment is NaN or infinite.
        """
        self._check_resident()
        self.state.begin_save(Path(folder), background=self.settings.checkpoint.background)

    def saved_file(self) -> SavedFile | None:
        """The file of the last begin_save; None: it is still being written.

        Raises:
            CheckpointError: the file cannot be written, or no save was begun.
        """
        return self.state.saved_file()

    def load_state(self, folder: str, optimizer_steps: int) -> None:
        """Load what begin_save wrote on any number of ranks in any ZeRO stage. The caller has
        verified the files.

        Raises:
            CheckpointError: a file is missing or not a file of begin_save, or the state is of
                another model.
        """
        self._check_resident()
        rank = self.settings.lora.rank
        adapters = "" if rank is None else f" with lora.rank={rank}"
        model = f"{self.settings.model.path}{adapters}"
        self.state.load(Path(folder), optimizer_steps, model)
        self.optimizer_steps = optimizer_steps

    def _step_without_moving(self) -> None:
        """Take a step with zero gradient and zero learning rate. DeepSpeed then copies the master
        weights to those of the forward pass, and at its first step creates Adam's moments.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = 0.0
        self._backward(self.passes.collated([]), Tally(self.device), 0)
        self.engine.step()

    # -- helpers -----------------------------------------------------------------------------------

    def _seed(self, step: int, update: int) -> int:
        """The seed of the random numbers of one update of a step on this rank."""
        entropy = (self.settings.run.seed, step, update, self.rank)
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _gather(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager:
        if zero_stage(self.settings) < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None)


def with_old_logprobs(batches: Sequence[ScoredBatch]) -> list[ScoredBatch]:
    """The batches with their learner_logprobs as old_logprobs, those before the first update."""
    return [replace(batch, old_logprobs=batch.learner_logprobs) for batch in batches]
