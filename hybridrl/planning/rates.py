"""The seconds of each phase of a step, from stated rates of a device.

They are the time that the arithmetic needs at those rates if every response is as long as it may
be. Gaps between operations, waiting and loading are not included.
"""

import math
import os
from dataclasses import dataclass

from hybridrl.kernels.products import RATES, processor
from hybridrl.planning.edges import weight_bytes
from hybridrl.planning.sizes import ScoredTeacher, Sizes
from hybridrl.teachers.evidence import Hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The rates that one device sustains."""

    flops: float  # operations of matrix products a second
    memory: float  # bytes a second
    link: float  # bytes of weights a second, to all engines at once
    source: str

    def __str__(self) -> str:
        return (
            f"{self.flops / 1e12:.3g} TFLOP/s, memory at {self.memory / 1e12:.3g} TB/s, weights at "
            f"{self.link / 1e9:.3g} GB/s ({self.source})"
        )


H100 = Rates(
    flops=400e12,
    memory=3.0e12,
    link=8.0e9,
    source="assumed for an H100; not measured here",
)


def cpu_rates(dtype: str) -> Rates:
    """The rates of this machine, from the table of kinds of processors in kernels.products."""
    known = RATES.get(processor())
    gflops = 100.0 if known is None else getattr(known, dtype)
    return Rates(
        flops=gflops * 1e9 * (os.cpu_count() or 2) / 2,
        memory=10e9,
        link=1.6e9,
        source="products by the table of kernels/products.py, the others assumed",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSeconds:
    """Seconds of one step, by phase."""

    rollout: float
    score: float
    learn: float
    sync: float

    def step(self, *, overlaps: bool) -> float:
        """Seconds of a step; where sampling and scoring of later steps overlap with learning, the
        slowest of the three determines them.
        """
        if overlaps:
            return max(self.rollout, self.score, self.learn) + self.sync
        return self.rollout + self.score + self.learn + self.sync


def phase_seconds(sizes: Sizes, rates: Rates) -> PhaseSeconds:
    settings = sizes.settings
    tokens = sizes.sequences * sizes.tokens
    rows = sizes.sequences * sizes.response
    learner = sizes.settings.learner
    passes = 8 if learner.gradient_checkpointing else 6  # forward 2, backward 4, recomputing 2
    if settings.lora.rank is not None:  # no gradients of the large matrices
        passes -= 2
    head = 2 * rows * sizes.student.vocabulary * head_width(sizes)
    update = passes * sizes.student.multiplied * tokens + head  # of all mini-batches once
    logits = 2 * rows * sizes.student.vocabulary * sizes.student.hidden
    view = 2 * sizes.student.multiplied * tokens + logits
    bases = sum(view if t.reads_logits else view - logits for t in sizes.shared)
    operations = settings.train.epochs_per_batch * update + views(sizes) * view + bases
    learn = operations / (learner.ranks * rates.flops)
    return PhaseSeconds(
        rollout=rollout_seconds(sizes, rates),
        score=max(
            (score_seconds(sizes, t, rates) for t in sizes.teachers if not t.shares_base),
            default=0.0,
        ),
        learn=learn,
        sync=weight_bytes(sizes) / rates.link if settings.algorithm.data_fraction < 1 else 0.0,
    )


def views(sizes: Sizes) -> float:
    """The number of forward passes over a whole batch in which the learner computes its own
    log-probs and values. Each mini-batch has one before its update where the objective needs them.
    Where the clip's ratio needs them, the batch has one before its first update, which then serves
    that update too.

    Example: two updates in each of two epochs of ppo: 1 + 2 - 1/2 = 2.5.
    """
    train = sizes.settings.train
    before_each = float(train.epochs_per_batch) if sizes.needs.learner_view else 0.0
    if not sizes.needs.old_logprobs:
        return before_each
    return 1 + max(before_each - 1 / train.updates_per_batch, 0.0)


def head_width(sizes: Sizes) -> int:
    """The sum of the widths of the products over [R, V] in one head pass: the student's logits and
    both gradients (with adapters only one), and the logits of each hidden teacher. With one such
    teacher the pass takes 2 R V (3 Hs + Ht) operations.
    """
    hidden = [t.shape.hidden for t in sizes.teachers if isinstance(t.evidence, Hidden)]
    products = 3 if sizes.trained_head else 2
    return products * sizes.student.hidden + sum(hidden)


def score_seconds(sizes: Sizes, teacher: ScoredTeacher, rates: Rates) -> float:
    """Seconds of a forward pass over the step's tokens, shared by the devices of all replicas.

    Example: 1e6 tokens of Qwen2.5-32B at 400 TFLOP/s: 2 x 31.2e9 x 1e6 / 400e12 = 156 s.
    """
    tokens = sizes.sequences * sizes.tokens
    config = sizes.settings.teachers[teacher.name]
    devices = sizes.settings.scorer.replicas * config.devices * config.gpus
    return 2 * teacher.shape.multiplied * tokens / (devices * rates.flops)


def rollout_seconds(sizes: Sizes, rates: Rates) -> float:
    """Seconds of sampling in waves of rollout.max_num_seqs sequences: first the prompts, then token
    by token. A token takes the longer of two times: that of reading the weights and each sequence's
    cache, of its prompt and half of the response on average, and that of the arithmetic.
    """
    rollout = sizes.settings.rollout
    if sizes.settings.algorithm.data_fraction == 1:
        return 0.0
    devices = rollout.tensor_parallel
    response = rollout.response_limit
    shape = sizes.student
    at_once = sizes.of_decoding
    waves = math.ceil(math.ceil(sizes.sequences / rollout.engines) / at_once)
    cache = at_once * shape.kv_numbers * (sizes.tokens - response / 2) * sizes.width
    weights = (shape.multiplied + shape.head) * sizes.width
    flop = 2 * (shape.multiplied + shape.head) * at_once
    decode = max((weights + cache) / rates.memory, flop / rates.flops) / devices
    prompts = at_once * (sizes.tokens - response)
    prefill = 2 * shape.multiplied * prompts / rates.flops / devices
    return waves * (prefill + response * decode)
