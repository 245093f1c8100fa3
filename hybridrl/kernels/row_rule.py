"""The factors of a row's gradient, from the columns of its token and the rule of the head pass."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.ops.divergence import Measure
from hybridrl.ops.ratio import RatioBounds


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRule:
    """The settings that the computation of a row depends on."""

    temperature: float = 1.0  # of student and teacher alike
    measure: Measure = field(default_factory=Measure)
    ratio: RatioBounds = field(default_factory=RatioBounds)  # of p(y) / p_old(y)
    # of p_old(y) / mu(y), by which the ratio is multiplied
    correction: RatioBounds = field(default_factory=RatioBounds)


class Coefficients(NamedTuple):
    """The factors of the parts of the gradient of c rows, and the rows' values."""

    kl: Tensor  # [c] sum_i w_i D_i
    loss: Tensor  # [c] the row's loss
    bounded: Tensor  # [c] bool, whether the importance ratio was bounded
    dense: tuple[Tensor, ...]  # [c] the factor of each teacher's gradient
    sparse: Tensor  # [c] the factor of grad log p(y)


def coefficients(
    rule: RowRule,
    drawn: Tensor,
    values: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    columns: TokenColumns,
) -> Coefficients:
    """The factors and values of c rows.

    A part with weight 0 gets the factor 0, and its value is left out of the sums, because it may be
    inf or NaN, and 0 * NaN is NaN.

    Args:
        drawn: [c] log p(y).
        values, weights: D_i and w_i of each teacher, [c].
    """
    weight = columns.token_weight.to(drawn.dtype)
    cost = columns.sparse.to(drawn.dtype)
    sampler = columns.sampler_logprobs.to(drawn.dtype)
    old = columns.old_logprobs.to(drawn.dtype)
    live = weight > 0
    kl = torch.zeros_like(drawn)
    dense = []
    for value, w in zip(values, weights, strict=True):
        w = w.to(drawn.dtype)
        kl = kl + torch.where(w != 0, w * value, 0.0)  # 0 * inf is not 0
        dense.append(torch.where(live, w * weight / rule.temperature, 0.0))
    factor, bounded = rule.ratio.factor(drawn - old, cost)
    correction, _ = rule.correction.factor(old - sampler, cost)
    cost = torch.where(live, cost * factor * correction, 0.0)
    loss = torch.where(live, weight * (kl + cost * drawn), 0.0)
    return Coefficients(
        kl=kl,
        loss=loss,
        bounded=bounded,
        dense=tuple(dense),
        sparse=torch.where(live, weight * cost / rule.temperature, 0.0),
    )
