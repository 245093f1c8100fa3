"""The coefficients of each response token that the objective computes and the head pass reads."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenColumns(NamedTuple):
    """One row for each of R response tokens, from the objective to the head pass.

    A new column needs only a producer and a reader: all code in between slices, joins and moves
    whole objects of this class.

    Example: plain distillation of two tokens in a batch of 10: sparse (0, 0), token_weight (0.1,
    0.1), value_slope (0, 0).
    """

    token_ids: Tensor  # [R] int64, y_t
    token_weight: Tensor  # [R] float32, 1/normaliser; 0 excludes the token
    # [R] float32, G_{t+1} minus its baseline, a COST: a positive one lowers the token's probability
    sparse: Tensor
    value_slope: Tensor  # [R] float32, d loss / d value of the value head; 0 without one
    sampler_logprobs: Tensor  # [R] float32, log mu(y_t)
    # [R] float32, the log of the ratio's denominator: log mu(y_t), or log p_old(y_t) of the learner
    # before the batch's first update
    old_logprobs: Tensor

    def at(self, rows: slice) -> "TokenColumns":
        """The given rows of every column."""
        return TokenColumns(*(column[rows] for column in self))

    def to(self, target: torch.device | torch.dtype) -> "TokenColumns":
        """A copy on another device; or in another dtype, in which the token ids keep theirs."""
        if isinstance(target, torch.device):
            return TokenColumns(*(column.to(target) for column in self))
        return TokenColumns(self.token_ids, *(column.to(target) for column in self[1:]))

    def without_sparse(self) -> "TokenColumns":
        """A copy with only the dense term: costs and value slopes are 0."""
        return self._replace(
            sparse=torch.zeros_like(self.sparse),
            value_slope=torch.zeros_like(self.value_slope),
        )

    @staticmethod
    def join(parts: Sequence["TokenColumns"]) -> "TokenColumns":
        """The rows of all parts, one after the other; there is at least one part."""
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
