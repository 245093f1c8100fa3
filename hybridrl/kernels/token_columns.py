"""What the objective makes of each response token, and the head pass reads."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor


class RowColumns(NamedTuple):
    """The columns of TokenColumns that the work on a row of logits reads, of c tokens."""

    token_ids: Tensor  # [c] int64
    token_weight: Tensor  # [c]
    sparse: Tensor  # [c]
    sampler_logprobs: Tensor  # [c]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenColumns:
    """One row for each of R response tokens, from the objective to the head pass.

    A column that is added here needs one producer and one reader; everything between slices, joins
    and moves whole values of this class.

    Example: plain distillation of two tokens in a batch of 10: sparse (0, 0), token_weight (0.1,
    0.1), value_slope (0, 0).
    """

    token_ids: Tensor  # [R] int64, y_t
    token_weight: Tensor  # [R] float32, 1/normaliser; 0 takes the token out
    # [R] float32, G_{t+1} minus its baseline, a COST: positive pushes the token down
    sparse: Tensor
    value_slope: Tensor  # [R] float32, d loss / d value of the value head; 0 without one
    sampler_logprobs: Tensor  # [R] float32, log mu(y_t), the denominator of rho

    def __len__(self) -> int:
        return len(self.token_ids)

    def at(self, rows: slice) -> "TokenColumns":
        """The given rows of every column."""
        return TokenColumns(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device: torch.device) -> "TokenColumns":
        return TokenColumns(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def rows(self, at: slice) -> RowColumns:
        return RowColumns(*(getattr(self, name)[at] for name in RowColumns._fields))

    def without_sparse(self) -> "TokenColumns":
        """Only the dense term remains."""
        return replace(
            self,
            sparse=torch.zeros_like(self.sparse),
            value_slope=torch.zeros_like(self.value_slope),
        )

    @classmethod
    def join(cls, parts: Sequence["TokenColumns"]) -> "TokenColumns":
        """The rows of all parts, one after the other. At least one part."""
        return cls(
            **{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)}
        )

    @classmethod
    def unlearned(cls, token_ids: Tensor, sampler_logprobs: Tensor) -> "TokenColumns":
        """Tokens that have no part in the loss."""
        zero = torch.zeros_like(sampler_logprobs)
        return cls(
            token_ids=token_ids,
            token_weight=zero,
            sparse=zero,
            value_slope=zero,
            sampler_logprobs=sampler_logprobs,
        )
