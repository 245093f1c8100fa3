"""The learner's counts over micro-batches, updates and ranks, and the metrics of the global batch
that it computes from them.

Names with a slash are metrics, explained in hybridrl.tracking.glossary; the others are
intermediate sums from which metrics are computed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hybridrl.batch.micro_batch import MicroBatch
from hybridrl.kernels.head import HeadStats
from hybridrl.objectives.credit import Credit
from hybridrl.settings.choices import Source
from hybridrl.types import LearnerStats, UpdatePlan

QUARTERS = 4
TOKEN_KL = "kl/token"
SEQUENCE_KL = "kl/sequence"
LOGPROB_GAP = "policy/logprob_gap"
SPARSE_SQ = "sparse_sq"
"""A constant, so that count_micro and learner_stats use the same name."""

TOKENS = "tokens"
SUMS = ("train/loss", TOKENS, "dense_sq", SPARSE_SQ, "dense_sparse")
MEANS = (
    TOKEN_KL,
    SEQUENCE_KL,
    "kl/sampled",
    "kl/clipped_frac",
    "entropy/token",
    "advantage/mean",
    "advantage_sq",
    "advantage/positive_frac",
    "value/loss",
    "policy/rho_mean",
    "rho_sq",
    LOGPROB_GAP,
    "policy/kl_sampler",
    "policy/kl_old",
    "policy/bounded_frac",
    "nll/token",
    "pair/loss",
    "pair/accuracy",
    "pair/margin",
    "pair/chosen_score",
    "pair/rejected_score",
    "pair/rejected_ratio",
    "pair/clamped_frac",
    "pair/chosen_logprob",
    "pair/rejected_logprob",
    *(f"{name}_q{q + 1}" for name in ("entropy/token", "advantage/abs") for q in range(QUARTERS)),
)
MAXIMA = (
    "advantage/max",
    "minus_advantage",
    "policy/rho_max",
    "policy/logprob_gap_max",
    "pair/score_max",
)


HELDOUT = {
    "train/loss": "eval/loss",
    "kl/token": "eval/kl_token",
    "pair/loss": "eval/loss",
    "pair/accuracy": "eval/pair_accuracy",
    "pair/margin": "eval/pair_margin",
}
"""Total -> eval metric. If two totals map to one metric, the later wins: for pairs the real loss
replaces the surrogate loss, whose value has no meaning.
"""


class Tally:
    """Named sums, means and maxima of numbers that are spread over micro-batches and ranks.

    Example: after add("kl/token", [1, 3]) on one rank, add("kl/token", [5]) on another and
    reduce(), totals() contains {"kl/token": 3.0} on both.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums = {
            name: torch.zeros(2, dtype=torch.float64, device=device) for name in SUMS + MEANS
        }  # the sum of the values, and their number
        self.maxima = {
            name: torch.full((), -torch.inf, dtype=torch.float64, device=device) for name in MAXIMA
        }

    def add(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Count values of any shape and dtype.

        Args:
            where: bool of the same shape, which values to count; None: all.
        """
        values = values.detach().to(self.device, torch.float64).flatten()
        where = (
            torch.ones_like(values, dtype=torch.bool)
            if where is None
            else where.to(self.device).flatten()
        )
        if name not in self.maxima:
            self.sums[name] += torch.stack(
                [torch.where(where, values, 0.0).sum(), where.sum().double()]
            )
        elif len(values):
            self.maxima[name] = torch.maximum(
                self.maxima[name], torch.where(where, values, -torch.inf).max()
            )

    def reduce(self) -> None:
        """Combine the counts of all ranks; afterwards every rank has the same. All ranks call it
        together.
        """
        sums = torch.stack(list(self.sums.values()))
        maxima = torch.stack(list(self.maxima.values()))
        dist.all_reduce(sums)
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        self.sums = dict(zip(self.sums, sums, strict=True))
        self.maxima = dict(zip(self.maxima, maxima, strict=True))

    def totals(self) -> dict[str, float]:
        """The sums, means and maxima by name, without means and maxima of no values."""
        sums = torch.stack(list(self.sums.values()))
        maxima = torch.stack(list(self.maxima.values()))
        totals = {}
        for name, (total, count) in zip(self.sums, sums.tolist(), strict=True):
            if name in SUMS or count:
                totals[name] = total if name in SUMS else total / count
        return totals | {
            name: value
            for name, value in zip(self.maxima, maxima.tolist(), strict=True)
            if value > -torch.inf
        }

    @staticmethod
    def over_updates(tallies: Sequence["Tally"]) -> "Tally":
        """The counts of several updates as one Tally: a sum is the mean over the updates, except
        that numbers of tokens are added; a mean is over the tokens of all updates; a maximum is
        the largest.
        """
        joined = Tally(tallies[0].device)
        for name in joined.sums:
            of_updates = torch.stack([tally.sums[name] for tally in tallies])
            is_mean = name in SUMS and name != TOKENS
            joined.sums[name] = of_updates.mean(0) if is_mean else of_updates.sum(0)
        for name in joined.maxima:
            joined.maxima[name] = torch.stack([tally.maxima[name] for tally in tallies]).amax(0)
        return joined


@dataclass(frozen=True, slots=True, kw_only=True)
class Updated:
    """One update that was made: its mini-batch, and what was counted over all ranks."""

    plan: UpdatePlan
    tally: Tally
    grad_norm: float  # at the parameters, before clipping
    diagnostics: Mapping[str, float]  # of policy.diagnostics; empty unless the plan asked for them


def count_micro(
    tally: Tally,
    loss: Tensor,
    stats: HeadStats,
    micro: MicroBatch,
    version: int,
    *,
    has_old: bool = False,
    by_sequence: bool = False,
) -> None:
    """Count one micro-batch; means and maxima leave out tokens of weight 0.

    Args:
        version: the version of the weights that learn; NO_VERSION: no engine has these weights.
        has_old: the columns have the log-probs of the learner before the batch's first update.
        by_sequence: the ratio is that of whole sequences; the objective counts how many tokens its
            bounds affect (Credit.watched).
    """
    device = stats.logprobs.device
    live = (micro.columns.token_weight > 0).to(device)
    for name, part in {
        "train/loss": loss,
        "dense_sq": stats.dense_sq,
        SPARSE_SQ: stats.sparse_sq,
        TOKENS: live,
    }.items():
        tally.add(name, part)
    tally.add("dense_sparse", stats.dense_sparse)
    if micro.teachers:
        count_divergence(tally, stats, micro, live)
    tally.add("entropy/token", stats.entropy, live)
    by_others = torch.tensor([s is not Source.student for s in micro.sources])[micro.owner]
    tally.add("nll/token", -stats.logprobs, live & by_others.to(device))
    advantage = -micro.columns.sparse.to(device).double()
    for name, part in {
        "advantage/mean": advantage,
        "advantage_sq": advantage.square(),
        "advantage/positive_frac": advantage > 0,
        "advantage/max": advantage,
        "minus_advantage": -advantage,
    }.items():
        tally.add(name, part, live)
    quarter = quarters(micro).to(device)
    for q in range(QUARTERS):
        tally.add(f"entropy/token_q{q + 1}", stats.entropy, live & (quarter == q))
        tally.add(f"advantage/abs_q{q + 1}", advantage.abs(), live & (quarter == q))
    count_ratio(tally, stats, micro, live, version)
    if not by_sequence:
        tally.add("policy/bounded_frac", stats.bounded, live)
    if has_old:
        moved = stats.logprobs.double() - micro.columns.old_logprobs.to(device).double()
        tally.add("policy/kl_old", torch.expm1(moved) - moved, live)


def count_divergence(tally: Tally, stats: HeadStats, micro: MicroBatch, live: Tensor) -> None:
    """Count the divergence from the teachers per token that a teacher scores, and per sequence with
    such tokens. It is divided by the sum of the teacher weights, so that a schedule of these
    weights can depend on it.
    """
    total = torch.stack([teacher.weight for teacher in micro.teachers]).sum(0).to(live.device)
    compared = live & (total != 0)
    divergence = stats.kl.detach() / total
    tally.add(TOKEN_KL, divergence, compared)
    owner = micro.owner.to(live.device)
    zeros = torch.zeros(len(micro.sources), dtype=torch.float64, device=live.device)
    of_sequence = zeros.index_add(0, owner, torch.where(compared, divergence, 0.0).double())
    num_compared = zeros.index_add(0, owner, compared.double())
    tally.add(SEQUENCE_KL, of_sequence, num_compared > 0)


def count_ratio(
    tally: Tally, stats: HeadStats, micro: MicroBatch, live: Tensor, version: int
) -> None:
    """Count rho = p(y) / mu(y) over the tokens that a model sampled (not those of the data), the KL
    between sampler and learner over the student's tokens, and their gap |log p - log mu| over the
    student's tokens that were sampled with the weights that learn.
    """
    student, data = (
        torch.tensor([s is source for s in micro.sources])[micro.owner].to(live.device)
        for source in (Source.student, Source.data)
    )
    log_ratio = stats.logprobs.double() - micro.columns.sampler_logprobs.to(live.device).double()
    rho = log_ratio.exp()
    for name, part in {
        "policy/rho_mean": rho,
        "rho_sq": rho.square(),
        "policy/rho_max": rho,
    }.items():
        tally.add(name, part, live & ~data)
    tally.add("policy/kl_sampler", rho - 1 - log_ratio, live & student)
    same = (micro.oldest_versions >= version)[micro.owner].to(live.device)
    for name in (LOGPROB_GAP, "policy/logprob_gap_max"):
        tally.add(name, log_ratio.abs(), live & student & same)


def count_credits(tally: Tally, credits: Sequence[Credit]) -> None:
    """Count the numbers that the objective computed before the head pass, Credit.watched."""
    for credit in credits:
        for name, values in credit.watched.items():
            tally.add(name, values)


def quarters(micro: MicroBatch) -> Tensor:
    """[R] int64, 0 ... 3: the quarter of its response in which each token is."""
    owner = micro.owner
    lengths = torch.bincount(owner, minlength=len(micro.sources))
    position = torch.arange(len(owner)) - (lengths.cumsum(0) - lengths)[owner]
    return QUARTERS * position // lengths[owner]


def remedy(totals: Mapping[str, float]) -> str:
    """What to change after a step whose loss or gradient is not finite. The advice depends on the
    first of the batch's means that is not finite.

    Args:
        totals: of Tally.totals.
    """

    def finite(name: str) -> bool:
        return math.isfinite(totals.get(name, 0.0))

    if not finite("entropy/token"):  # the student's own distribution
        return "the student's probabilities are not finite; lower train.lr"
    if not finite("kl/token"):
        return (
            "the divergence from a teacher is not finite although the student is: the teacher "
            "gives a token probability 0, which reverse KL cannot compare, or is not finite "
            "itself; set algorithm.divergence=jsd or algorithm.log_ratio_clip, or choose another "
            "teacher"
        )
    if not finite("advantage/mean"):
        return (
            "a reward, or a teacher's log-probability of a sampled token, is not finite; look at "
            "the reward functions, or set algorithm.log_ratio_clip where a teacher gives a "
            "sampled token probability 0"
        )
    return "lower train.lr"


def batch_metrics(
    totals: dict[str, float], plans: Sequence[UpdatePlan], grad_norms: Sequence[float]
) -> dict[str, float]:
    """The metrics of a step.

    Args:
        totals: of Tally.over_updates.
        plans, grad_norms: of each update.
    """
    num_tokens = sum(plan.num_tokens for plan in plans)
    grad_norm = sum(grad_norms) / len(grad_norms)
    row = {name: value for name, value in totals.items() if "/" in name}
    row["train/updates"] = float(len(plans))
    dense = totals["dense_sq"] ** 0.5
    sparse = totals["sparse_sq"] ** 0.5
    row |= {"train/grad_norm": grad_norm, "grad/dense_norm": dense, "grad/sparse_norm": sparse}
    if dense and sparse:
        row |= {
            "grad/dense_sparse_ratio": dense / sparse,
            "grad/logit_cosine": totals["dense_sparse"] / (dense * sparse),
        }
    row["policy/kept_frac"] = totals[TOKENS] / max(num_tokens, 1)
    if totals[TOKENS]:
        row["advantage/min"] = -totals["minus_advantage"]
        row["advantage/std"] = (
            max(totals["advantage_sq"] - totals["advantage/mean"] ** 2, 0.0) ** 0.5
        )
    if totals.get("rho_sq"):
        row["policy/ess"] = totals["policy/rho_mean"] ** 2 / totals["rho_sq"]
    return row


def learner_stats(
    totals: Mapping[str, float],
    metrics: dict[str, float],
    learn_s: float,
    *,
    optimizer_steps: int,
    left_out: Sequence[str] = (),
    unlearned: Sequence[int] = (),
) -> LearnerStats:
    """The typed statistics of a batch.

    Args:
        totals: of Tally.over_updates.
        metrics: the metrics of the batch that are reported.
        learn_s: seconds that this rank took.
        optimizer_steps, left_out, unlearned: as in LearnerStats.
    """
    return LearnerStats(
        logprob_gap=totals.get(LOGPROB_GAP),
        token_kl=totals.get(TOKEN_KL),
        sparse_norm=totals[SPARSE_SQ] ** 0.5,
        metrics=metrics,
        learn_s=learn_s,
        optimizer_steps=optimizer_steps,
        left_out=tuple(left_out),
        unlearned=tuple(unlearned),
    )


def heldout_metrics(totals: dict[str, float]) -> dict[str, float]:
    """The metrics of held-out data, from the totals of Tally.totals; empty without tokens."""
    if not totals[TOKENS]:
        return {}
    return {key: totals[name] for name, key in HELDOUT.items() if name in totals}
