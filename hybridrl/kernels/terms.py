"""What the objective asks of each response token, and the factors of a row's gradient that follow
from it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridrl.ops.divergence import Measure
from hybridrl.ops.ratio import RatioBounds


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTerms:
    """What the objective asks of each response token, one row each.

    Example: plain distillation of two tokens in a batch of 10: sparse (0, 0), token_weight (0.1,
    0.1).
    """

    token_ids: Tensor  # [R] int64, y_t
    token_weight: Tensor  # [R] float32, 1/normaliser; 0 takes the token out
    sparse: (
        Tensor  # [R] float32, G_{t+1} minus its baseline, a COST: positive pushes the token down
    )
    sampler_logprobs: Tensor  # [R] float32, log mu(y_t), the denominator of rho

    def rows(self, at: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.token_ids[at], self.token_weight[at], self.sparse[at], self.sampler_logprobs[at]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRule:
    """The settings that the work on a row depends on."""

    temperature: float = 1.0  # of student and teacher alike
    measure: Measure = field(default_factory=Measure)
    ratio: RatioBounds = field(default_factory=RatioBounds)


def coefficients(
    rule: RowRule,
    drawn: Tensor,
    values: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    terms: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...], Tensor]:
    """What multiplies the parts of the gradient, exactly 0 where a part is not asked for: there it
    may hold anything.

    Args:
        drawn: [c] log p(y).
        values, weights: D_i and w_i of each teacher, [c].

    Returns:
        sum_i w_i D_i; the row's loss; bounded (bool); the factor of each teacher's gradient; that
        of the sparse part: [c] each.
    """
    _, weight, cost, sampler = (t.to(drawn.dtype) if t.is_floating_point() else t for t in terms)
    live = weight > 0
    kl, scales = torch.zeros_like(drawn), []
    for value, w in zip(values, weights, strict=True):
        w = w.to(drawn.dtype)
        kl = kl + torch.where(w != 0, w * value, 0.0)  # 0 * inf is not 0
        scales.append(torch.where(live, w * weight / rule.temperature, 0.0))
    factor, bounded = rule.ratio.factor(drawn - sampler, cost)
    cost = torch.where(live, cost * factor, 0.0)
    loss = torch.where(live, weight * (kl + cost * drawn), 0.0)
    return (
        kl,
        loss,
        bounded,
        tuple(scales),
        torch.where(live, weight * cost / rule.temperature, 0.0),
    )
