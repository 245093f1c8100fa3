"""The mathematics that losses on pairs of responses share; P is the number of pairs."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

MAX_LOG_RATIO = 20.0
"""Above this score each term of a DIL loss is a straight line.

The slope of LSIF is then at most exp(2 * 20) = 2.4e17, whose square fp32 can still hold.
"""

Term = Callable[[Tensor], tuple[Tensor, Tensor]]
"""One term of a separable loss: maps s [P] to its value and slope, both [P]."""


def logistic(margin: Tensor) -> tuple[Tensor, Tensor]:
    """-log sigma(u) and its slope -sigma(-u) for margins u, all [P]; neither overflows."""
    return -logsigmoid(margin), -torch.sigmoid(-margin)


def bradley_terry(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-log sigma(r_w - r_l), the negative log-likelihood of the label under Bradley and Terry's
    model.

    Args:
        chosen: [P] a reward model's scores of the chosen responses.
        rejected: [P] its scores of the rejected responses.

    Returns:
        loss, d loss / d chosen, d loss / d rejected, all [P].
    """
    loss, slope = logistic(chosen - rejected)
    return loss, slope, -slope


def straightened(term: Term, s: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Value and slope, both [P], of a term that is continued by its tangent above `limit`."""
    value, slope = term(s.clamp(max=limit))
    return value + slope * (s - limit).clamp(min=0), slope
