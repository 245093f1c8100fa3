"""What the learner adds up over micro-batches and ranks, and the global numbers made of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridrl.data.collate import MicroBatch
from hybridrl.objectives.credit import Credit
from hybridrl.ops.head import HeadStats
from hybridrl.types import LearnerStats, UpdatePlan

SUMS = (
    "loss", "tokens", "kl", "entropy", "bounded", "rho", "rho_sq", "gap", "dense_sq", "sparse_sq", "kl_sampled", "value_sq",
)  # fmt: skip


def micro_sums(loss: Tensor, stats: HeadStats, micro: MicroBatch) -> Tensor:
    """[len(SUMS)] float64 of one micro-batch; tokens of weight 0 count nowhere."""
    live = (micro.token_weight > 0).to(stats.logprobs.device)
    log_ratio = (stats.logprobs - micro.rollout_logprobs.to(stats.logprobs.device))[live].double()
    rho = log_ratio.exp()
    nothing = torch.zeros_like(loss, dtype=torch.float64)
    return torch.stack(
        [
            loss.double(), live.sum().double(), stats.kl[live].double().sum(), stats.entropy[live].double().sum(),
            stats.bounded[live].double().sum(), rho.sum(), rho.square().sum(), log_ratio.abs().sum(),
            stats.dense_sq, stats.sparse_sq, nothing, nothing,
        ]
    ).cpu()  # fmt: skip


def credit_sums(credits: Sequence[Credit]) -> Tensor:
    """[len(SUMS)] float64: what is known before the head pass."""
    sums = dict.fromkeys(SUMS, torch.zeros((), dtype=torch.float64))
    for credit in credits:
        live = credit.token_weight > 0
        sums["kl_sampled"] = sums["kl_sampled"] + credit.imitation_cost[live].double().sum()
        sums["value_sq"] = sums["value_sq"] + credit.value_error[live].double().square().sum()
    return torch.stack([sums[name] for name in SUMS])


def learner_stats(
    totals: dict[str, float], plan: UpdatePlan, grad_norm: float, learn_s: float, diagnostics: dict[str, float]
) -> LearnerStats:
    """Means and norms of the global batch from its sums."""
    tokens = max(totals["tokens"], 1.0)
    return LearnerStats(
        loss=totals["loss"],
        grad_norm=grad_norm,
        dense_norm=totals["dense_sq"] ** 0.5,
        sparse_norm=totals["sparse_sq"] ** 0.5,
        kl_token=totals["kl"] / tokens,
        kl_sequence=totals["kl"] / max(plan.num_sequences, 1),
        kl_sampled=totals["kl_sampled"] / tokens,
        entropy=totals["entropy"] / tokens,
        bounded_frac=totals["bounded"] / tokens,
        value_loss=totals["value_sq"] / tokens / 2,
        rho_mean=totals["rho"] / tokens,
        logprob_gap=totals["gap"] / tokens,
        ess=totals["rho"] ** 2 / (tokens * totals["rho_sq"]) if totals["rho_sq"] else 0.0,
        learn_s=learn_s,
        diagnostics=diagnostics,
    )
