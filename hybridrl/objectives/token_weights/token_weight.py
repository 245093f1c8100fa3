"""The interface of a token weight: its input and the function to write."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """The response tokens of N responses, and the size of the step that they are part of; T is the
    longest response's length. The counts of the step include all learner ranks and are at least 1.

    Example: responses of 1 and 3 tokens, alone in their step: mask [[True, False, False], [True,
    True, True]], num_tokens 4, num_sequences 2, num_groups 1.
    """

    mask: Tensor
    """[N, T] bool, True on response tokens, which come first in each row"""
    group_size: int
    """K; the siblings of a prompt are adjacent rows"""
    num_tokens: int
    """response tokens in the step"""
    num_sequences: int
    """responses in the step"""
    num_groups: int
    """prompts in the step"""
    max_new_tokens: int
    """rollout.max_new_tokens"""

    @property
    def lengths(self) -> Tensor:
        """[N] float64 tokens of each response."""
        return self.mask.sum(1).double()


class TokenWeight(Protocol):
    """A function that returns the weight of each token.

    Returns:
        float64, of a shape that broadcasts to [N, T], e.g. [N, 1] for one weight per response. The
        loss is the weighted sum over all tokens of the step, so weights of about 1/num_tokens keep
        its size. Masked entries are not used.
    """

    def __call__(self, counts: TokenCounts) -> Tensor: ...
