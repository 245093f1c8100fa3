"""What the objective makes of each response token, and the head pass reads."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenColumns(NamedTuple):
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
    sampler_logprobs: Tensor  # [R] float32, log mu(y_t)
    # [R] float32, the denominator of the ratio: log mu(y_t), or that of the learner before the
    # batch's first update
    old_logprobs: Tensor

    def at(self, rows: slice) -> "TokenColumns":
        """The given rows of every column."""
        return TokenColumns(*(column[rows] for column in self))

    def to(self, target: torch.device | torch.dtype) -> "TokenColumns":
        """On another device; or in another dtype, but for the token ids."""
        if isinstance(target, torch.device):
            return TokenColumns(*(column.to(target) for column in self))
        return TokenColumns(self.token_ids, *(column.to(target) for column in self[1:]))

    def without_sparse(self) -> "TokenColumns":
        """Only the dense term remains."""
        return self._replace(
            sparse=torch.zeros_like(self.sparse),
            value_slope=torch.zeros_like(self.value_slope),
        )

    @staticmethod
    def join(parts: Sequence["TokenColumns"]) -> "TokenColumns":
        """The rows of all parts, one after the other. At least one part."""
        return TokenColumns(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    @staticmethod
    def unlearned(token_ids: Tensor, sampler_logprobs: Tensor) -> "TokenColumns":
        """Tokens that have no part in the loss."""
        zero = torch.zeros_like(sampler_logprobs)
        return TokenColumns(
            token_ids=token_ids,
            token_weight=zero,
            sparse=zero,
            value_slope=zero,
            sampler_logprobs=sampler_logprobs,
            old_logprobs=sampler_logprobs,
        )
