"""The coefficients that an objective computes for each response token before the head pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.objectives.needs import Needs
from hybridrl.types import ScoredBatch, UpdatePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """The coefficients of the R response tokens of a batch, in batch order."""

    # R rows; its sparse column is cost minus baseline, before standardisation and nll
    columns: TokenColumns
    teacher_weights: tuple[Tensor, ...]  # of each scored teacher [N], w_i of each sequence
    # metric -> numbers of any shape, whose mean or maximum over the step is reported
    watched: Mapping[str, Tensor]
    nll: float = 0.0  # weight of -log p(y) itself
    # False: responses of the data, whose sparse term is 0 and must not be standardised
    has_returns: bool = True

    def standardised(self, mean: Tensor, std: Tensor) -> "Credit":
        """A copy whose sparse column x is (x - mean) / std; unchanged without returns."""
        if not self.has_returns:
            return self
        sparse = (self.columns.sparse - mean) / (std + 1e-8)
        return replace(self, columns=self.columns._replace(sparse=sparse))

    def learned(self, dtype: torch.dtype) -> TokenColumns:
        """The columns as the head pass reads them: in `dtype`, with the weight of -log p(y)
        subtracted from the sparse column.
        """
        return self.columns._replace(sparse=self.columns.sparse - self.nll).to(dtype)


class Objective(Protocol):
    """Turns a scored batch into credit, without logits."""

    needs: Needs
    # Whether the sparse column is standardised over all live tokens of the global batch.
    standardises: bool

    def credit(self, batch: ScoredBatch, plan: UpdatePlan) -> Credit:
        """The credit of a batch, which has the learner's log-probs or values if `needs` says so."""
        ...


class SumOverRanks(Protocol):
    def __call__(self, sums: Tensor) -> Tensor:
        """The sum of this tensor over all ranks of the learner, on the CPU."""
        ...


def assign_credit(
    objective: Objective,
    batches: Sequence[ScoredBatch],
    plan: UpdatePlan,
    sum_over_ranks: SumOverRanks = lambda sums: sums,
) -> list[Credit]:
    """The credit of one rank's batches, standardised over the global batch if the objective says
    so.

    Every rank must call this, even one without a batch.
    """
    credits = [objective.credit(batch, plan) for batch in batches]
    if not objective.standardises:
        return credits
    count, total, squares = sum_over_ranks(moments(credits))
    mean = total / count.clamp_min(1)
    std = (squares / count.clamp_min(1) - mean.square()).clamp_min(0).sqrt()
    return [c.standardised(mean, std) for c in credits]


def moments(credits: Sequence[Credit]) -> Tensor:
    """[3] float64: count, sum and sum of squares of the sparse column over live tokens that have
    returns. The moments of all ranks are the sum of each rank's.
    """
    parts = [c.columns.sparse[c.columns.token_weight > 0] for c in credits if c.has_returns]
    live = torch.cat([torch.zeros(0), *parts]).double()  # a rank may have no group
    return torch.stack(
        [torch.tensor(float(len(live)), dtype=torch.float64), live.sum(), live.square().sum()]
    )
