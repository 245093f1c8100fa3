"""Checks three optimizer steps under each ZeRO stage and with offloading, with a checkpoint between
the second and the third, and the scorer's evidence against the learner's own log-probs.
"""

import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from benchmarks.planned_worker import rewards_of

from gpu_checks.check import Check, holds, not_run, within
from gpu_checks.ground import Ground
from gpu_checks.rounding import (
    CHAIN,
    GAP_REASON,
    SUBLAYERS,
    WORDS,
    largest,
    logprob_gap,
    of_layers,
    of_sums,
)
from hybridrl.batch.balance import micro_batches
from hybridrl.core.free_port import free_port
from hybridrl.models.arithmetic import with_arithmetic
from hybridrl.objectives import make_objective
from hybridrl.objectives.head_rule import head_rule
from hybridrl.policy.learner import Learner
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.scorer import Scorer
from hybridrl.types import (
    FinishReason,
    Prompt,
    Rewards,
    RolloutBatch,
    TokenScores,
    Trajectory,
    UpdatePlan,
)

LR = 1e-3
STEPS = 3
GROUPS = 8
SAMPLES = 4
EVIDENCE = ("hidden", "vocabulary", "support", "drawn")
Chunk = tuple[RolloutBatch, Rewards, TokenScores]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A ZeRO stage and the part of the learner that is offloaded."""

    stage: int
    offload: str

    def name(self, dtype: str) -> str:
        offloaded = "" if self.offload == "none" else f", {self.offload} offloaded"
        return f"ZeRO {self.stage}{offloaded}, {dtype}"

    @property
    def overrides(self) -> tuple[str, ...]:
        return f"learner.zero_stage={self.stage}", f"learner.offload={self.offload}"


ON_GPU = (
    Case(stage=1, offload="none"),
    Case(stage=2, offload="none"),
    Case(stage=3, offload="none"),
    Case(stage=1, offload="optimizer"),
    Case(stage=3, offload="optimizer"),
    Case(stage=3, offload="parameters"),
)
ON_CPU = {
    "float32": (ON_GPU[0], ON_GPU[5]),
    "bfloat16": (ON_GPU[1],),
}


def checks(ground: Ground, dtype: str, expected: Mapping[str, list[float]]) -> Iterator[Check]:
    """All checks of one dtype.

    Args:
        expected: the result of `reference_steps` on a CPU.
    """
    for case in ON_GPU if ground.on_gpu else ON_CPU[dtype]:
        yield from case_checks(ground, dtype, case, expected)
    for kind in EVIDENCE:
        yield from scorer_checks(ground, dtype, kind)
    loaded = {"ray", "vllm"} & set(sys.modules)
    yield holds(f"neither Ray nor vLLM is needed, {dtype}", not loaded, "learner and scorer alone")


# -- steps -----------------------------------------------------------------------------------------


def case_checks(
    ground: Ground, dtype: str, case: Case, expected: Mapping[str, list[float]]
) -> Iterator[Check]:
    """Check three steps against the reference, and the third step again from a checkpoint."""
    name = case.name(dtype)
    settings = settings_of(ground, dtype, *case.overrides)
    learner = new_learner(settings, ground)
    chunk = scored(settings, ground)
    start = weights_of(learner)
    stats = [step(learner, i, chunk) for i in range(STEPS - 1)]
    folder = ground.root / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save(learner, folder)
    saved = digest(learner)
    stats.append(step(learner, STEPS - 1, chunk))
    found = {key: [row[key] for row in stats] for key in ("train/loss", "train/grad_norm")}
    yield from step_checks(name, dtype, found, moved(start, weights_of(learner)), expected)
    straight = digest(learner)
    del learner
    again = [resumed(settings, ground, folder, chunk) for _ in range(2)]
    yield from resume_checks(name, saved, straight, again)


def step_checks(
    name: str,
    dtype: str,
    found: Mapping[str, list[float]],
    distance: float,
    expected: Mapping[str, list[float]],
) -> Iterator[Check]:
    for key, what in {"train/loss": "losses", "train/grad_norm": "gradient norms"}.items():
        errors = [abs(a - b) / abs(b) for a, b in zip(found[key], expected[key], strict=True)]
        yield within(
            f"{what}, {name}",
            largest(errors),
            high=of_layers(dtype),
            unit="relative error",
            reason=f"three steps against float32 with ZeRO 1 on a CPU: {CHAIN} roundings in each "
            f"of {SUBLAYERS} sublayers",
        )
    yield within(
        f"distance that the weights moved, {name}",
        abs(distance / expected["distance"][0] - 1),
        high=of_layers(dtype),
        unit="relative error",
        reason="as far as on the CPU: every weight is stepped, by this learning rate",
    )


def resume_checks(
    name: str, saved: str, straight: str, again: Sequence[tuple[str, str]]
) -> Iterator[Check]:
    """Check that the loaded state and the step after it are bit-equal to the original ones.

    Args:
        saved: digest of the weights when the checkpoint was written.
        straight: their digest after the next step.
        again: for each of two learners that loaded the checkpoint, the digests after loading and
            after the next step.
    """
    (loaded, first), (_, second) = again
    yield holds(f"weights that are loaded equal those saved, {name}", loaded == saved, "by digest")
    yield holds(
        f"a step repeats itself bit by bit, {name}",
        first == second,
        "the same step twice from one checkpoint; kernels that add in no fixed order would differ",
    )
    resumes = f"a resumed step equals the uninterrupted one, {name}"
    if first == second:
        yield holds(resumes, first == straight, "by digest of the weights after it")
    else:
        yield not_run(resumes, "a step does not repeat itself, so two of them cannot be compared")


def reference_steps(ground: Ground) -> dict[str, list[float]]:
    """Losses, gradient norms and the distance that the weights moved, in float32 with ZeRO 1."""
    settings = settings_of(ground, "float32", *ON_GPU[0].overrides)
    learner = new_learner(settings, ground)
    chunk = scored(settings, ground)
    start = weights_of(learner)
    stats = [step(learner, i, chunk) for i in range(STEPS)]
    return {
        "train/loss": [row["train/loss"] for row in stats],
        "train/grad_norm": [row["train/grad_norm"] for row in stats],
        "distance": [moved(start, weights_of(learner))],
    }


def resumed(settings: RunSettings, ground: Ground, folder: Path, chunk: Chunk) -> tuple[str, str]:
    """The digests of the weights of a new learner after loading, and after its next step."""
    learner = new_learner(settings, ground)
    learner.load_state(str(folder), STEPS - 1)
    loaded = digest(learner)
    step(learner, STEPS - 1, chunk)
    return loaded, digest(learner)


def step(learner: Learner, number: int, chunk: Chunk) -> dict[str, float]:
    groups = (tuple(range(GROUPS)),)
    return learner.update(plan_of(learner.settings, number, chunk[0]), groups, *chunk).metrics


def plan_of(settings: RunSettings, number: int, batch: RolloutBatch) -> UpdatePlan:
    lengths = np.diff(batch.offsets).tolist()
    most = settings.train.max_tokens_per_micro_batch
    return UpdatePlan(
        step=number,
        num_tokens=int(batch.response_mask.sum()),
        num_sequences=batch.num_sequences,
        num_groups=GROUPS,
        num_micro_batches=len(micro_batches(lengths, most)),
        lr=LR,
        teacher_weights=(1.0,),
        teacher_routes=({},),
        reward_weight=1.0,
    )


# -- scorer ----------------------------------------------------------------------------------------


def scorer_checks(ground: Ground, dtype: str, kind: str) -> Iterator[Check]:
    """Check the evidence of a teacher that is the student itself, which the learner can compute."""
    settings = settings_of(
        ground,
        dtype,
        "teachers.main.path=builtin:countdown-student",
        f"++teachers.main.evidence={kind}",
        "algorithm.topk.k=8",
        "algorithm.topk.source=teacher",
        "algorithm.gamma=0.5",  # so that every kind sends log q of the drawn token
    )
    learner = new_learner(settings, ground)
    batch, rewards, scores = scored(settings, ground)
    by_teacher = replace(batch, rollout_logprobs=scores.logprobs)
    yield within(
        f"scorer and learner on the drawn tokens, evidence {kind}, {dtype}",
        learner.logprob_gaps(by_teacher)[0],
        high=logprob_gap(dtype),
        unit="nats",
        reason=GAP_REASON,
    )
    if kind == "drawn":
        return
    plan = plan_of(settings, 0, batch)
    stats = learner.evaluate(plan, (tuple(range(GROUPS)),), batch, rewards, scores)
    yield within(
        f"divergence of the student from itself, evidence {kind}, {dtype}",
        abs(stats.metrics["eval/kl_token"]),
        high=logprob_gap(dtype) ** 2 + of_sums(WORDS) * math.log(WORDS),
        unit="nats a token",
        reason="it is quadratic in the differences of log-probs, and a sum of float32",
    )


# -- parts -----------------------------------------------------------------------------------------


def settings_of(ground: Ground, dtype: str, *overrides: str) -> RunSettings:
    settings = load_config(
        [
            f"run.dir={ground.root / 'learner'}",
            "experiment=quickstart",
            "tracking.wandb=disabled",
            f"cluster.device={ground.device}",
            f"model.dtype={dtype}",
            f"++teachers.main.dtype={dtype}",
            f"train.prompts_per_step={GROUPS}",
            f"train.samples_per_prompt={SAMPLES}",
            "train.max_tokens_per_micro_batch=512",
            "train.head_chunk=100",
            "checkpoint.background=false",
            *overrides,
        ]
    )
    return with_arithmetic(settings, None)


def new_learner(settings: RunSettings, ground: Ground) -> Learner:
    master = ("127.0.0.1", free_port())
    return Learner(settings, rank=0, master=master, device=ground.device)


def scored(settings: RunSettings, ground: Ground) -> Chunk:
    """Random responses, with rewards of 0 and 1 and the scores of a real scorer."""
    batch = random_batch()
    scorer = Scorer(
        settings,
        teacher="main",
        device=ground.device,
        evidence=make_objective(settings).needs.evidence[0],
        rule=head_rule(settings),
    )
    _, scores = scorer.score(batch)
    return batch, rewards_of(batch), scores


def random_batch() -> RolloutBatch:
    """A batch of prompts with 4 to 20 random tokens, and responses with 1 to 16."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(4, WORDS, count).astype(np.int32)

    prompts = []
    trajectories = []
    for i in range(GROUPS):
        ids = tokens(int(rng.integers(4, 21)))
        prompts.append(Prompt(uid=f"p{i}", input_ids=tuple(ids.tolist()), text="", columns={}))
        for _ in range(SAMPLES):
            response = tokens(int(rng.integers(1, 17)))
            mask = np.arange(len(ids) + len(response)) >= len(ids)
            trajectories.append(
                Trajectory(
                    uid=f"p{i}",
                    prompt_length=len(ids),
                    input_ids=np.concatenate([ids, response]),
                    response_mask=mask,
                    rollout_logprobs=np.where(mask, -math.log(WORDS), 0.0).astype(np.float32),
                    policy_versions=np.where(mask, 0, -1).astype(np.int32),
                    support_ids=np.zeros((len(response), 0), np.int32),
                    finish_reason=FinishReason.length,
                )
            )
    return RolloutBatch.pack(prompts, SAMPLES, trajectories)


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    return {n: w.detach().float().cpu().clone() for n, w in learner.publisher.stream}


def moved(start: Mapping[str, torch.Tensor], end: Mapping[str, torch.Tensor]) -> float:
    """The norm of the difference of two sets of weights, over all tensors together."""
    return math.sqrt(sum(float((end[n] - start[n]).double().square().sum()) for n in start))


def digest(learner: Learner) -> str:
    manifest, _ = learner.pack_weights(0)
    assert manifest is not None, "rank 0 packs the weights"
    return manifest.digest


def save(learner: Learner, folder: Path) -> None:
    learner.begin_save(str(folder))
    ends = time.monotonic() + learner.settings.deadlines.learn_s
    while learner.saved_file() is None:
        if time.monotonic() > ends:
            raise TimeoutError(f"the checkpoint in {folder} is not on disk")
        time.sleep(0.01)
