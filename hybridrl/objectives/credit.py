"""What an objective gives each response token before the head pass, and what it may ask for
first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from hybridrl.types import RolloutBatch, ScoredBatch, UpdatePlan


class Signal(StrEnum):
    """What a configuration needs from the other workers, or from the learner before its update."""

    teacher_hidden = "teacher_hidden"  # the teacher's last hidden states
    teacher_vocabulary = "teacher_vocabulary"  # its log-probs over the vocabulary
    teacher_support = "teacher_support"  # its log-probs at K tokens
    teacher_logprobs = "teacher_logprobs"  # log q(y_t), one head pass of the scorer
    sampler_support = "sampler_support"  # the sampler's K most likely tokens
    rewards = "rewards"
    learner_logprobs = "learner_logprobs"  # log p(y_t) before the update, one more forward
    learner_values = "learner_values"  # the value head's outputs before the update


ROWS = frozenset({Signal.teacher_hidden, Signal.teacher_vocabulary, Signal.teacher_support})
"""Those of more than a number a token: with one of them the student is compared over more than the
drawn token.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerView:
    """What the learner itself says of the tokens before an update; R response tokens in batch
    order.
    """

    logprobs: Tensor  # [R] log p(y_t)
    values: Tensor  # [R] the value head before each token; 0 without one


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """Per response token, in batch order."""

    token_weight: Tensor  # [R] 1/normaliser, times the sequence's ratio; 0 takes the token out
    sparse: Tensor  # [R] cost minus baseline, multiplies grad log p(y)
    value_slope: Tensor  # [R] d loss / d value, token_weight included; 0 without a value head
    watched: Mapping[
        str, Tensor
    ]  # metric -> the numbers, of any shape, of which a step's row has the mean or maximum
    nll: float = 0.0  # weight of -log p(y) itself
    has_returns: bool = (
        True  # False: text of the data, whose sparse term is 0 and not to be standardised
    )

    @property
    def cost(self) -> Tensor:
        """[R] what multiplies grad log p(y) in all."""
        return self.sparse - self.nll

    def standardised(self, mean: Tensor, std: Tensor) -> "Credit":
        return (
            replace(self, sparse=(self.sparse - mean) / (std + 1e-8)) if self.has_returns else self
        )


class Objective(Protocol):
    """Turns a scored batch into credit. It never sees logits."""

    signals: frozenset[Signal]
    standardises: (
        bool  # the sparse term is to be standardised over all live tokens of the global batch
    )

    def credit(self, batch: ScoredBatch, plan: UpdatePlan, learner: LearnerView | None) -> Credit:
        """learner: None unless the signals ask for it."""
        ...


def moments(credits: Sequence[Credit]) -> Tensor:
    """[3] float64 over live tokens that have returns: count, sum and sum of squares of the sparse
    term; they add up over ranks.
    """
    parts = [c.sparse[c.token_weight > 0] for c in credits if c.has_returns]
    live = torch.cat([torch.zeros(0), *parts]).double()  # a rank may have no group
    return torch.stack(
        [torch.tensor(float(len(live)), dtype=torch.float64), live.sum(), live.square().sum()]
    )


def no_credit(batch: ScoredBatch) -> Credit:
    """Nothing is learned from any token."""
    zero = torch.zeros(int(batch.rollout.response_lengths.sum()))
    return Credit(token_weight=zero, sparse=zero, value_slope=zero, watched={})


def response_grid(batch: RolloutBatch) -> Tensor:
    """[N, T] bool: response tokens left-aligned, T the longest response; row-major order is batch
    order.
    """
    lengths = torch.from_numpy(batch.response_lengths.copy())
    return torch.arange(int(lengths.max()))[None, :] < lengths[:, None]


def per_token(per_sequence: Tensor, batch: RolloutBatch) -> Tensor:
    """[N] -> [R], each sequence's number at each of its response tokens."""
    return per_sequence.repeat_interleave(torch.from_numpy(batch.response_lengths.copy()))
