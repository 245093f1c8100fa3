"""Runs the real Learner outside of pytest: `python learner_job.py FOLDER WORLD:FUNCTION ...` runs
the named functions of CASES one after the other, each on WORLD new ranks.

FOLDER holds the models `student` and `teacher`. For each case of a function, rank 0 writes
CASE.json and CASE.safetensors (the weights) there.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hybridrl.core.errors import ConfigError, NonFiniteError, SkippedStep
from hybridrl.core.free_port import free_port
from hybridrl.models.model_internals import attention_of
from hybridrl.rollout.rollouter import Completion, join_turns
from hybridrl.runtime.scorer_group import scoring
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.scorer import Scorer
from hybridrl.types import (
    BatchPlan,
    FinishReason,
    Prompt,
    Rewards,
    RolloutBatch,
    SavedFile,
    TokenScores,
    UpdatePlan,
)
from hybridrl.weights.library_internals import fragment_values, update_memory
from hybridrl.weights.parameters import WeightsKind
from hybridrl.weights.stream import unpack
from tests.support.batches import make_batch, make_plan, make_rewards, make_scores
from tests.support.forked import fork_ranks
from tests.support.frozen_embedding import FrozenEmbedding

WIDTH = 128  # the hidden size of the tiny model
LR = 5e-4
GROUPS = [
    ((1, 5, 6), [(7, 8, 2), (9, 2)]),
    ((1, 10, 11, 12, 13), [(14,), (15, 16, 17, 18, 2)]),
    ((1, 19), [(20, 21, 2), (22, 2)]),
    ((1, 4, 4, 4), [(5, 2), (5, 6, 7, 2)]),
]
VALUES = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5, -1.0]
Chunk = tuple[RolloutBatch, Rewards, TokenScores]


def chunk_of(
    first: int, last: int, *, keep: list[bool] | None = None, values: list[float] = VALUES
) -> Chunk:
    """The groups `first` to `last - 1` of GROUPS with their rewards and scores. The scores of a
    group are the same in every chunk.
    """
    all_groups = make_batch(GROUPS)
    rng = np.random.default_rng(0)
    rows = int(all_groups.response_mask.sum())
    hidden = rng.standard_normal((rows, WIDTH)).astype(np.float32)
    logprobs = -3 * rng.random(rows).astype(np.float32)
    ends = np.concatenate([[0], np.cumsum(all_groups.response_lengths)])
    span = slice(int(ends[2 * first]), int(ends[2 * last]))
    batch = make_batch(GROUPS[first:last])
    return (
        batch,
        make_rewards(batch, values[2 * first : 2 * last], keep),
        make_scores(batch, logprobs[span], hidden[span]),
    )


def save(learner, folder: Path) -> SavedFile:
    """Save a rank's state, and wait until it is on disk."""
    learner.begin_save(str(folder))
    return saved(learner)


def saved(learner) -> SavedFile:
    """Wait until the state of the last begin_save is on disk."""
    while (file := learner.saved_file()) is None:
        time.sleep(0.01)
    return file


def inf_teacher() -> Chunk:
    batch, rewards, scores = chunk_of(0, 4)
    return batch, rewards, replace(scores, rows=np.full_like(scores.rows, np.inf))


Tokens = tuple[int, ...]
TURNS: list[tuple[Tokens, Tokens, Tokens, Tokens]] = [
    ((1, 5, 6), (7, 8, 2), (19, 4), (9, 2)),
    ((1, 10), (14, 2), (19,), (15, 16, 2)),
]
"""(prompt, first turn, observation, second turn)"""


def turns_chunk(*, apart: bool) -> Chunk:
    """TURNS with their rewards and scores, and one response per prompt.

    Args:
        apart: make each turn a response of its own, whose prompt is everything before the turn;
            False: a response has two turns.
    """
    prompts = []
    trajectories = []
    for i, (ids, first, observation, second) in enumerate(TURNS):
        start = Prompt(uid=f"p{i}", input_ids=ids, text="", columns={})
        read = Prompt(uid=f"p{i}-read", input_ids=(*ids, *first, *observation), text="", columns={})
        turns = [written(first), written(second)]
        if apart:
            prompts += [start, read]
            trajectories += [join_turns(start, turns[:1]), join_turns(read, turns[1:])]
        else:
            prompts += [start]
            trajectories += [join_turns(start, [turns[0], observation, turns[1]])]
    batch = RolloutBatch.pack(prompts, 1, trajectories)
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((10, WIDTH)).astype(np.float32)
    values = [1.0, 1.0, -0.5, -0.5] if apart else [1.0, -0.5]
    return batch, make_rewards(batch, values), make_scores(batch, [-2.0] * 10, hidden)


def written(ids: Tokens) -> Completion:
    """A turn of the model, whose tokens have the sampler log-prob -1."""
    return Completion(
        token_ids=ids,
        logprobs=np.full(len(ids), -1, np.float32),
        policy_versions=np.zeros(len(ids), np.int32),
        support_ids=np.zeros((len(ids), 0), np.int32),
        finish_reason=FinishReason.stop,
    )


def settings_for(folder: Path, ranks: int, *overrides: str) -> RunSettings:
    return load_config(
        [
            f"run.dir={folder}",
            "experiment=quickstart",
            f"model.path={folder}/student",
            f"teachers.main.path={folder}/teacher",
            "algorithm.gamma=0.5",
            "train.head_chunk=5",
            f"learner.ranks={ranks}",
            "deadlines.learn_s=60",
            "cluster.device=cpu",
            *overrides,
        ]
    )


MINI_BATCHES = ((0, 2), (1, 3))
"""The groups of each mini-batch, as indices into GROUPS."""
ORDER = (0, 1, 1, 0)
UPDATES_LR = 5e-3
SEVERAL = (
    "train.prompts_per_step=4",
    "train.updates_per_batch=2",
    "train.epochs_per_batch=2",
    "algorithm.gamma=0",
    "algorithm.baseline=none",
)
CLIP = ("algorithm.ratio.kind=clip", "algorithm.ratio.low=0.1", "algorithm.ratio.high=0.2")


def chunk_of_other_sampler(*, values: list[float] = VALUES) -> Chunk:
    """GROUPS with the log-probs of another sampler: a uniform distribution over the tiny model's 23
    tokens, plus noise of 0.7 N(0, 1) nats.
    """
    batch, rewards, scores = chunk_of(0, 4, values=values)
    drift = 0.7 * np.random.default_rng(2).standard_normal(len(batch.input_ids))
    logprobs = np.where(batch.response_mask, drift - np.log(23), 0.0).astype(np.float32)
    return replace(batch, rollout_logprobs=logprobs), rewards, scores


def batch_plan(order: tuple[int, ...], num_micro_batches: int, step: int = 0) -> BatchPlan:
    """The plan of a batch with updates on MINI_BATCHES in this order."""
    return BatchPlan(
        mini_batches=tuple(
            make_plan(
                make_batch([GROUPS[g] for g in groups]),
                step=step,
                num_micro_batches=num_micro_batches,
                lr=UPDATES_LR,
            )
            for groups in MINI_BATCHES
        ),
        order=order,
    )


def plan_for(step: int, num_micro_batches: int, groups: int = 4, **changes) -> UpdatePlan:
    return make_plan(
        make_batch(GROUPS[:groups]),
        step=step,
        num_micro_batches=num_micro_batches,
        lr=LR,
        **changes,
    )


OTHER_ADAM = ("train.betas=[0.5,0.6]", "train.weight_decay=0.5", "train.grad_clip=0.01")


def held_bytes(learner) -> int:
    """The bytes of this rank's weights, master weights and Adam moments; shared memory counts
    once.
    """
    from hybridrl.weights.library_internals import update_memory

    state, _ = update_memory(learner.engine.optimizer)
    weights = [getattr(p, "ds_tensor", p) for p in learner.engine.module.parameters()]
    storages = [tensor.untyped_storage() for tensor in (*weights, *state)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Job:
    """One rank; every method that runs a case builds a new Learner on the same process group."""

    def __init__(self, rank: int, world: int, port: int, folder: Path) -> None:
        self.rank = rank
        self.world = world
        self.port = port
        self.folder = folder

    def learner(self, *overrides: str, weights: WeightsKind | None = None):
        from hybridrl.policy.learner import Learner

        return Learner(
            settings_for(self.folder, self.world, *overrides),
            rank=self.rank,
            master=("127.0.0.1", self.port),
            device="cpu",
            weights=weights,
        )

    def refused(self, case: str, model: str, *overrides: str) -> None:
        """Write the error that a learner raises for another model, or "no error"."""
        try:
            self.learner(f"model.path={self.folder}/{model}", *overrides)
            message = "no error"
        except ConfigError as error:
            message = str(error)
        (self.folder / f"{case}.json").write_text(json.dumps(message))

    def report(self, case: str, learner, stats: list, **more) -> None:
        """Write the results of a case for the tests. All ranks must call it, to gather the
        weights.
        """
        weights = {name: weight.float().clone() for name, weight in learner.publisher.stream}
        manifest, _ = learner.pack_weights(0)
        if self.rank == 0:
            weights.pop("lm_head.weight")
            save_file(weights, self.folder / f"{case}.safetensors")

            def column(key):
                return [s.metrics[key] for s in stats]

            result = {"loss": column("train/loss"), "grad_norm": column("train/grad_norm")}
            result |= {"digest": manifest.digest, "metrics": [s.metrics for s in stats]}
            works = [work for s in stats for work in s.work]
            result |= {"work": [[w.tokens, sorted(w.peak_bytes)] for w in works]}
            result |= {"attention": attention_of(learner.model.config)} | more
            (self.folder / f"{case}.json").write_text(json.dumps(result))

    def two_steps(
        self,
        case: str,
        chunks: list[Chunk],
        groups: tuple,
        num_micro_batches: int,
        *overrides: str,
        num_groups: int = 4,
    ):
        learner = self.learner(*overrides)
        values = [value for chunk in chunks for value in chunk]
        stats = [
            learner.update(plan_for(step, num_micro_batches, num_groups), groups, *values)
            for step in range(2)
        ]
        self.report(case, learner, stats, held=held_bytes(learner))
        return learner, groups, values

    def turns(self, case: str, *, apart: bool) -> None:
        """Take two steps on TURNS with gamma 0, so that no cost is credited to an earlier turn."""
        learner = self.learner("algorithm.gamma=0", "algorithm.baseline=none")
        chunk = turns_chunk(apart=apart)
        groups = (tuple(range(len(chunk[0].uids))),)
        plans = [make_plan(chunk[0], step=step, lr=LR) for step in range(2)]
        self.report(case, learner, [learner.update(plan, groups, *chunk) for plan in plans])

    def diagnosed(self, case: str, groups: tuple, num_micro_batches: int, *overrides: str) -> None:
        """Take a step with other optimizer settings and with diagnostics; then begin another job
        with the same learner and take its first two steps.
        """
        learner = self.learner(*overrides, *OTHER_ADAM)
        learner.keep_start()
        plan = plan_for(0, num_micro_batches, diagnose=True)
        stats = learner.update(plan, groups, *chunk_of(0, 4))
        self.report(case, learner, [stats])
        self.begun(case, learner, groups, list(chunk_of(0, 4)), num_micro_batches, *overrides)

    def begun(
        self,
        case: str,
        learner,
        groups: tuple,
        values: list,
        num_micro_batches: int,
        *overrides: str,
    ) -> None:
        """Begin another job with a learner that has already trained, and take its first two
        steps.
        """
        learner.begin_job(settings_for(self.folder, self.world, *overrides))
        begun = learner.ping()
        stats = [
            learner.update(plan_for(step, num_micro_batches), groups, *values) for step in range(2)
        ]
        self.report(f"{case}-begun", learner, stats, optimizer_steps=begun)

    def resume(
        self,
        case: str,
        learner,
        groups: tuple,
        values: list,
        num_micro_batches: int,
        *overrides: str,
    ) -> None:
        """Begin to save, release the optimizer and acquire it again, and take a step before
        anything is written. Then load the saved state into a new learner, and take the same step.
        """
        state = self.folder / f"{case}-state"
        state.mkdir(exist_ok=True)
        stepped = Event()
        learner.state.threads.submit(stepped.wait)
        learner.begin_save(str(state))
        assert learner.saved_file() is None
        self.gathered(case, learner)
        plan = plan_for(2, num_micro_batches)
        self.turn(case, learner, groups, values, plan)
        self.report(f"{case}-straight", learner, [learner.update(plan, groups, *values)])
        stepped.set()
        saved(learner)
        again = self.learner(*overrides)
        again.keep_start()
        again.load_state(str(state), 2)
        # With two ranks, the first call has a batch for one rank only, the second call two and one.
        batches = [chunk_of(i, i + 1)[0] for i in range(3)]
        again.logprob_gaps(*batches[:1][self.rank :: self.world])
        gaps = again.logprob_gaps(*batches[self.rank :: self.world])
        whole = again.logprob_gaps(*batches)[self.rank :: self.world]
        done = again.ping()
        self.report(f"{case}-loaded", again, [], optimizer_steps=done, gaps=gaps, whole=whole)
        self.report(f"{case}-resumed", again, [again.update(plan, groups, *values)])
        self.begun(case, again, groups, values, num_micro_batches, *overrides)

    def turn(self, case: str, learner, groups: tuple, values: list, plan: UpdatePlan) -> None:
        """Release the optimizer and acquire it again; write what the learner did without it, and
        the memory of the optimizer before, meanwhile and afterwards.
        """
        batches = [chunk_of(i, i + 1)[0] for i in range(3)][self.rank :: self.world]
        manifest, _ = learner.pack_weights(0)
        found = {"gaps": learner.logprob_gaps(*batches)}
        state, buffers = update_memory(learner.engine.optimizer)
        tensors = [*state, *buffers]
        found["bytes"] = [sum(t.untyped_storage().nbytes() for t in tensors)]
        learner.release()
        learner.release()
        found["bytes"] += [sum(t.untyped_storage().nbytes() for t in tensors)]
        found["gaps_released"] = learner.logprob_gaps(*batches)
        sent, _ = learner.pack_weights(0)
        try:
            learner.update(plan, groups, *values)
            found["error"] = "no error"
        except RuntimeError as error:
            found["error"] = str(error)
        learner.acquire()
        found["bytes"] += [sum(t.untyped_storage().nbytes() for t in tensors)]
        if self.rank == 0:
            found["digests"] = [manifest.digest, sent.digest]
            (self.folder / f"{case}-turn.json").write_text(json.dumps(found))

    def left_out(
        self, case: str, learner, groups: tuple, num_micro_batches: int, chunk: Chunk
    ) -> None:
        """Update on a batch that must be left out; write the error, and the digests of the weights
        before and after it.
        """
        before, _ = learner.pack_weights(0)
        try:
            learner.update(plan_for(3, num_micro_batches), groups, *chunk)
            message = "no error"
        except SkippedStep as error:
            message = str(error)
        self.report(case, learner, [], error=message, before=before.digest if before else None)

    def valued(self, case: str, groups: tuple, num_micro_batches: int, *overrides: str) -> None:
        """Take two steps with a value head, export, and take a third step, also after loading."""
        overrides = ("algorithm=ppo", *overrides)
        learner, groups, values = self.two_steps(
            case, [chunk_of(0, 4)], groups, num_micro_batches, *overrides
        )
        learner.export(str(self.folder / f"{case}-export"))
        self.resume(case, learner, groups, values, num_micro_batches, *overrides)

    def frozen(self, case: str, groups: tuple, num_micro_batches: int, *overrides: str) -> None:
        """Take two steps of a student whose embedding does not train; publish, export and save it;
        and take a third step, also after loading.
        """
        learner = self.learner(*overrides, weights=FrozenEmbedding)
        values = chunk_of(0, 4)
        plans = [plan_for(step, num_micro_batches) for step in range(3)]
        stats = [learner.update(plan, groups, *values) for plan in plans[:2]]
        manifest, packed = learner.pack_weights(0)
        if manifest is not None:
            published = {name: weight.clone() for name, weight in unpack(manifest, packed)}
            save_file(published, self.folder / f"{case}-published.safetensors")
        learner.export(str(self.folder / f"{case}-export"))
        state = self.folder / f"{case}-state"
        state.mkdir(exist_ok=True)
        file = save(learner, state)
        masters = sum(t.nbytes for t in load_file(state / file.name).values())
        assert learner.state_bytes() == masters
        self.report(case, learner, stats)
        self.report(f"{case}-straight", learner, [learner.update(plans[2], groups, *values)])
        again = self.learner(*overrides, weights=FrozenEmbedding)
        again.load_state(str(state), 2)
        self.report(f"{case}-resumed", again, [again.update(plans[2], groups, *values)])

    def several(self, case: str, num_micro_batches: int, *overrides: str) -> None:
        """Learn from two batches of four updates each, from the second one also after loading."""
        overrides = (*SEVERAL, *CLIP, *overrides)
        learner = self.learner(*overrides)
        values = chunk_of_other_sampler()
        groups = tuple((own[self.rank :: self.world],) for own in MINI_BATCHES)
        plans = [batch_plan(ORDER, num_micro_batches, step) for step in range(2)]
        first = learner.learn(plans[0], groups, *values)
        self.report(case, learner, [first], optimizer_steps=first.optimizer_steps)
        state = self.folder / f"{case}-state"
        state.mkdir(exist_ok=True)
        save(learner, state)
        self.report(f"{case}-straight", learner, [learner.learn(plans[1], groups, *values)])
        again = self.learner(*overrides)
        again.load_state(str(state), first.optimizer_steps)
        self.report(f"{case}-resumed", again, [again.learn(plans[1], groups, *values)])

    def several_by_hand(self) -> None:
        """Make two updates in one call and in two calls, and a batch of four updates of which two
        must be left out.
        """
        groups = tuple((own,) for own in MINI_BATCHES)
        values = chunk_of_other_sampler()
        plan = batch_plan((0, 1), 1)
        together = self.learner(*SEVERAL)
        self.report("two-updates", together, [together.learn(plan, groups, *values)])
        apart = self.learner(*SEVERAL)
        updates = zip(plan.mini_batches, groups, strict=True)
        stats = [apart.update(mini, own, *values) for mini, own in updates]
        self.report("two-calls", apart, stats)

        broken = chunk_of_other_sampler(values=[*VALUES[:2], float("nan"), *VALUES[3:]])
        patient = self.learner(*SEVERAL, *CLIP, "train.max_skipped=2")
        stats = patient.learn(batch_plan(ORDER, 1), groups, *broken)
        self.report(
            "two-left-out", patient, [stats], left_out=stats.left_out, unlearned=stats.unlearned
        )
        whole = self.learner(*SEVERAL, *CLIP)
        self.report("two-of-one", whole, [whole.learn(batch_plan((0, 0), 1), groups, *values)])
        strict = self.learner(*SEVERAL, *CLIP, "train.max_skipped=1")
        errors = []
        for order in (ORDER, (1,) * 4, (1,)):
            try:
                strict.learn(batch_plan(order, 1), groups, *broken)
            except NonFiniteError as error:
                errors.append(f"{type(error).__name__}: {error}")
        self.report("too-many-left-out", strict, [], errors=errors)

    def gathered(self, case: str, learner) -> None:
        """Write the state as gathered by DeepSpeed itself, which does not depend on our offsets."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        tensors = {}
        for name, p in learner.weights.saved().items():
            tensors[f"master/{name}"] = safe_get_full_fp32_param(p).clone()
            tensors |= {
                f"{m}/{name}": safe_get_full_optimizer_state(p, m).clone()
                for m in ("exp_avg", "exp_avg_sq")
            }
        if self.rank == 0:
            save_file(tensors, self.folder / f"{case}-gathered.safetensors")

    def resharded(
        self,
        case: str,
        saved: str,
        groups: tuple,
        values: list,
        num_micro_batches: int,
        *overrides: str,
    ) -> None:
        """Load the state that another number of ranks saved, save it again, and take the next
        step.
        """
        learner, again = self.learner(*overrides), self.folder / f"{case}-state"
        learner.load_state(str(self.folder / f"{saved}-state"), 2)
        again.mkdir(exist_ok=True)
        save(learner, again)
        self.report(f"{case}-loaded", learner, [])
        self.report(
            case, learner, [learner.update(plan_for(2, num_micro_batches), groups, *values)]
        )


NAN_REWARD = chunk_of(
    0, 4, values=[*VALUES[:4], float("nan"), *VALUES[5:]]
)  # the NaN is in the group of rank 1
INF_REWARD = chunk_of(0, 4, values=[*VALUES[:4], float("inf"), *VALUES[5:]])
BROKEN = dict(zip((1, 2, 3), (NAN_REWARD, INF_REWARD, inf_teacher()), strict=True))  # by ZeRO stage
ONE_EACH = "train.max_tokens_per_micro_batch=1"


def uneven(job: Job) -> tuple:
    return ((0, 1, 3),) if job.rank == 0 else ((2,),)


def two_ranks(job: Job) -> None:
    """Run all cases with shards of 6 and 2 sequences and micro-batches of one sequence, so that
    rank 1 has no data in four of the six micro-batches.
    """
    groups = uneven(job)
    for stage in (1, 2, 3):
        overrides = (f"learner.zero_stage={stage}", ONE_EACH)
        learner, groups, values = job.two_steps(
            f"zero{stage}", [chunk_of(0, 4)], groups, 6, *overrides
        )
        job.resume(f"zero{stage}", learner, groups, values, 6, *overrides)
        job.left_out(f"zero{stage}-left-out", learner, groups, 6, BROKEN[stage])
        job.diagnosed(f"zero{stage}-diagnosed", groups, 6, *overrides)
        bf16 = (*overrides, "model.dtype=bfloat16")
        learner, groups, values = job.two_steps(
            f"zero{stage}-bf16", [chunk_of(0, 4)], groups, 6, *bf16
        )
        job.resume(f"zero{stage}-bf16", learner, groups, values, 6, *bf16)
        job.left_out(f"zero{stage}-bf16-left-out", learner, groups, 6, BROKEN[stage])
        job.frozen(f"zero{stage}-frozen", groups, 6, *overrides)
    job.valued("zero3-value", groups, 6, "learner.zero_stage=3", ONE_EACH)
    for stage in (1, 3):
        job.several(f"zero{stage}-several", 2, f"learner.zero_stage={stage}", ONE_EACH)


OFFLOADED = (
    (1, "optimizer", "float32"),
    (3, "optimizer", "float32"),
    (3, "parameters", "bfloat16"),
)
"""(ZeRO stage, offloaded part, dtype of the model)"""
UNCLIPPED = "train.grad_clip=0"
"""No clipping, because DeepSpeed computes the norm of an offloaded gradient in another order, and
clipping would carry the difference in its last bit into the weights.
"""


def two_ranks_offloaded(job: Job) -> None:
    """Run the steps of two_ranks with and without offloading, and in ZeRO 2 and 3 with
    communication that overlaps computation, as on GPUs.
    """
    groups = uneven(job)
    for stage, offload, dtype in OFFLOADED:
        overrides = (f"learner.zero_stage={stage}", f"model.dtype={dtype}", UNCLIPPED, ONE_EACH)
        case = f"zero{stage}-{offload}"
        learner, _, values = job.two_steps(f"{case}-none", [chunk_of(0, 4)], groups, 6, *overrides)
        stats = [learner.update(plan_for(step, 6), groups, *values) for step in (2, 3)]
        job.report(f"{case}-none-after", learner, stats[1:])
        overrides = (*overrides, f"learner.offload={offload}")
        learner, _, values = job.two_steps(case, [chunk_of(0, 4)], groups, 6, *overrides)
        job.resume(case, learner, groups, values, 6, *overrides)
        job.left_out(f"{case}-left-out", learner, groups, 6, BROKEN[stage])
        job.report(f"{case}-after", learner, [learner.update(plan_for(3, 6), groups, *values)])
    for stage in (2, 3):
        with overlapping():
            zero = f"learner.zero_stage={stage}"
            job.two_steps(f"zero{stage}-overlap", [chunk_of(0, 4)], groups, 6, zero, ONE_EACH)


@contextmanager
def overlapping() -> Iterator[None]:
    """Set up learners in the `with` block with the communication settings of GPUs."""
    from hybridrl.policy import learner, training_setup

    called = []

    def of_gpu(settings: RunSettings, device: torch.device) -> dict:
        called.append(device)
        config = training_setup.deepspeed_config(settings, torch.device("cuda"))
        assert config["zero_optimization"]["overlap_comm"]
        return config

    learner.deepspeed_config = of_gpu
    try:
        yield
    finally:
        learner.deepspeed_config = training_setup.deepspeed_config
    assert called, "no learner was set up by deepspeed_config"


def two_ranks_again(job: Job) -> None:
    """Load the state of one rank with ZeRO 1 on two ranks with each stage."""
    groups, values = uneven(job), list(chunk_of(0, 4))
    for stage in (1, 2, 3):
        job.resharded(
            f"one-to-zero{stage}", "one", groups, values, 6, f"learner.zero_stage={stage}", ONE_EACH
        )
    job.resharded(
        "bf16-to-zero3",
        "bf16",
        groups,
        values,
        6,
        "learner.zero_stage=3",
        ONE_EACH,
        "model.dtype=bfloat16",
    )


def thirds(job: Job) -> tuple:
    """The groups of each of three ranks."""
    return (((0, 1),), ((2,),), ((3,),))[job.rank]


def three_ranks(job: Job) -> None:
    """Load the state of two ranks with ZeRO 3 on three ranks."""
    zero = "learner.zero_stage=3"
    values = list(chunk_of(0, 4))
    job.resharded("zero3-to-three", "zero3", thirds(job), values, 4, zero, ONE_EACH)


def one_rank(job: Job) -> None:
    everything = ((0, 1, 2, 3),)
    job.refused("opt-padded", "opt")
    for stage in (1, 3):
        zero = f"learner.zero_stage={stage}"
        job.refused(f"opt-packed-{stage}", "opt", zero, "train.packing=true")
        job.refused(f"gemma2-{stage}", "gemma2", zero)
    job.diagnosed("diagnosed", everything, 1)
    learner, groups, values = job.two_steps("one", [chunk_of(0, 4)], everything, 1)
    job.resume("one", learner, groups, values, 1)
    job.two_steps("one-each", [chunk_of(0, 4)], everything, 9, ONE_EACH)
    job.two_steps("packed", [chunk_of(0, 4)], everything, 1, "train.packing=true")
    job.two_steps("chunks", [chunk_of(0, 1), chunk_of(1, 4)], ((0,), (0, 1, 2)), 1)
    job.two_steps("first-three", [chunk_of(0, 3)], ((0, 1, 2),), 1, num_groups=3)
    job.turns("two-turns", apart=False)
    job.turns("turns-apart", apart=True)
    dropped = chunk_of(0, 4, keep=[True] * 6 + [False] * 2, values=VALUES[:6] + [float("nan")] * 2)
    learner, _, values = job.two_steps("fourth-dropped", [dropped], everything, 1, num_groups=3)
    empty = learner.update(plan_for(2, 1, 3), ((),), *values)
    job.report("nothing-left", learner, [empty])

    bf16 = ("model.dtype=bfloat16",)
    learner, groups, values = job.two_steps("bf16", [chunk_of(0, 4)], everything, 1, *bf16)
    job.resume("bf16", learner, groups, values, 1, *bf16)
    job.two_steps("bf16-packed", [chunk_of(0, 4)], everything, 1, "train.packing=true", *bf16)

    learner = job.learner()
    job.report("untouched", learner, [])
    batch, rewards, scores = chunk_of(0, 4, values=[float("nan"), *VALUES[1:]])
    try:
        learner.update(plan_for(0, 1), groups, batch, rewards, scores)
        message = "no error"
    except SkippedStep as error:
        message = str(error)
    job.report("nan", learner, [], error=message)
    job.report(
        "after-nan",
        learner,
        [learner.update(plan_for(step, 1), groups, *chunk_of(0, 4)) for step in range(2)],
    )

    with torch.no_grad():
        first, *_ = learner.weights.saved().values()
        fragment_values(first, None)[0] = float("inf")
    try:
        save(learner, job.folder / "one-state")
        message = "no error"
    except NonFiniteError as error:
        message = str(error)
    job.report("infinite", learner, [], error=message)

    job.valued("value", everything, 1)
    job.several("several", 1)
    job.several_by_hand()
    job.frozen("frozen", everything, 1)

    for saved, stage in ((1, 3), (2, 3), (3, 2)):
        job.resharded(
            f"zero{saved}-to-one",
            f"zero{saved}",
            groups,
            list(chunk_of(0, 4)),
            1,
            f"learner.zero_stage={stage}",
        )
    job.resharded(
        "zero3-bf16-to-one", "zero3-bf16", groups, list(chunk_of(0, 4)), 1, "model.dtype=bfloat16"
    )


SHARED = ("lora.rank=4", "teachers.main.path=null", "+teachers.main.share_base=true")
"""Settings of a learner that computes the scores of its teacher, the student before training."""
KINDS = {
    "hidden": (),
    "vocabulary": (),
    "support": ("algorithm.topk.source=teacher", "algorithm.topk.k=3"),
    "drawn": (),
}
"""The further settings that each kind of evidence needs."""


def scorer_of(learner) -> Scorer:
    """A scorer with the learner's settings and its own copy of the teacher's weights."""
    settings = learner.settings
    evidence, rule = scoring(settings, "main")
    return Scorer(settings, teacher="main", device="cpu", evidence=evidence, rule=rule)


def two_ranks_sharing(job: Job) -> None:
    """Take two steps with ZeRO 2 and with ZeRO 3, where a third step is taken with and without
    loading. Rank 0 scores three groups in six passes, and rank 1 one group in two.
    """
    values = chunk_of(0, 4)[:2]
    one_pass_each = "scorer.max_tokens_per_micro_batch=1"
    for stage in (2, 3):
        overrides = (f"learner.zero_stage={stage}", *SHARED, ONE_EACH, one_pass_each)
        case = f"shared-zero{stage}"
        learner, groups, _ = job.two_steps(case, [values], uneven(job), 6, *overrides)
        if stage == 3:
            job.resume(case, learner, groups, list(values), 6, *overrides)


def one_rank_sharing(job: Job) -> None:
    """Take the same two steps with the learner's own scores and with those of a scorer. For both,
    evaluate held-out data, compare the scores of each kind of evidence, and learn from two batches
    of several updates.
    """
    everything = ((0, 1, 2, 3),)
    batch, rewards, _ = chunk_of(0, 4)
    learner, *_ = job.two_steps("shared-one", [(batch, rewards)], everything, 1, *SHARED)
    heldout = learner.evaluate(plan_for(2, 1), everything, batch, rewards).metrics
    same = {}
    for kind, further in KINDS.items():
        changed = settings_for(job.folder, 1, *SHARED, f"+teachers.main.evidence={kind}", *further)
        learner.configure(changed)
        (own,) = learner.shared_scores(batch)
        other = scorer_of(learner).scores(batch)
        same[kind] = [
            int(own.rows.size + own.logprobs.any()),
            *(
                getattr(own, column).tobytes() == getattr(other, column).tobytes()
                for column in ("rows", "logprobs", "support_ids")
            ),
        ]
    learner.configure(settings_for(job.folder, 1, *SHARED))
    scores = scorer_of(learner).scores(batch)
    chunk = (batch, rewards, scores)
    apart = SHARED[:2]
    learner, *_ = job.two_steps("apart-one", [chunk], everything, 1, *apart)
    expected = learner.evaluate(plan_for(2, 1), everything, *chunk).metrics
    job.report("shared-evidence", learner, [], same=same, heldout=[heldout, expected])
    groups = tuple((own,) for own in MINI_BATCHES)
    for case, overrides, values in (
        ("shared-several", SHARED, chunk[:2]),
        ("apart-several", apart, chunk),
    ):
        several = job.learner(*overrides, *SEVERAL)
        plans = [batch_plan(ORDER, 1, step) for step in range(2)]
        job.report(case, several, [several.learn(plan, groups, *values) for plan in plans])


ADAPTED = {
    "lora-zero1": ("learner.zero_stage=1",),
    "lora-zero2": ("learner.zero_stage=2", "lora.dropout=0.25"),
    "lora-zero3": ("learner.zero_stage=3", "learner.gradient_checkpointing=true"),
    "lora-zero3-bf16": ("learner.zero_stage=3", "model.dtype=bfloat16"),
}
"""The further settings of each case of two ranks with adapters."""
RANK = "lora.rank=4"


def two_ranks_adapted(job: Job) -> None:
    """Take two steps with adapters, export, and take a third step with and without loading."""
    groups = uneven(job)
    for case, further in ADAPTED.items():
        overrides = (*further, RANK, ONE_EACH)
        learner, _, values = job.two_steps(case, [chunk_of(0, 4)], groups, 6, *overrides)
        learner.export(str(job.folder / f"{case}-export"))
        job.resume(case, learner, groups, values, 6, *overrides)


def one_rank_adapted(job: Job) -> None:
    """Take the same two steps on one rank, and the third one from the state that two ranks
    saved.
    """
    everything = ((0, 1, 2, 3),)
    job.report("lora-untouched", job.learner(RANK), [])
    learner, groups, values = job.two_steps("lora-one", [chunk_of(0, 4)], everything, 1, RANK)
    job.resume("lora-one", learner, groups, values, 1, RANK)
    job.diagnosed("lora-diagnosed", everything, 1, RANK)
    for saved, stage in ((1, 3), (3, 1)):
        case = f"lora-zero{saved}"
        zero = f"learner.zero_stage={stage}"
        job.resharded(f"{case}-to-one", case, everything, values, 1, zero, RANK)


def three_ranks_adapted(job: Job) -> None:
    """Take the third step on three ranks, from the state that two ranks saved."""
    for stage in (1, 3):
        case = f"lora-zero{stage}"
        overrides = (f"learner.zero_stage={stage}", RANK, ONE_EACH)
        job.resharded(f"{case}-to-three", case, thirds(job), list(chunk_of(0, 4)), 4, *overrides)


CASES = (
    one_rank,
    two_ranks,
    two_ranks_offloaded,
    two_ranks_again,
    three_ranks,
    two_ranks_adapted,
    one_rank_adapted,
    three_ranks_adapted,
    one_rank_sharing,
    two_ranks_sharing,
)


def main(folder: Path, groups: list[str]) -> None:
    import hybridrl.policy.learner  # noqa: F401, the ranks need not import it again

    torch.set_num_threads(1)
    functions = {function.__name__: function for function in CASES}
    for group in groups:
        size, _, cases = group.partition(":")
        port = free_port()

        def run(rank: int, world: int = int(size), cases: str = cases, port: int = port) -> None:
            functions[cases](Job(rank, world, port, folder))
            torch.distributed.barrier()

        fork_ranks(int(size), run, f"{folder}/{cases}-{{rank}}.log")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
