"""The interface of a loss on pairs: its input, its result and the class to inherit from."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from hybridrl.settings.algorithm import PairConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScores:
    """The input of a loss on P pairs: sums over the response tokens, including the end token. All
    [P] and of one floating dtype; log-probs in nats.
    """

    chosen_logp: Tensor  # [P] log pi(chosen); with scores_by_value: the value head's score
    rejected_logp: Tensor  # [P]
    chosen_ref: Tensor  # [P] log pi_ref(chosen); 0 unless needs_reference
    rejected_ref: Tensor  # [P]
    chosen_len: Tensor  # [P] tokens, at least 1
    rejected_len: Tensor  # [P]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairGradient:
    """The loss of P pairs and its derivatives; all [P]. Example: dpo, beta 1, s_w = s_l: loss log
    2, d_chosen -0.5, d_rejected 0.5.
    """

    loss: Tensor
    # d loss / d chosen_logp; that is a SUM over tokens, so it includes any division by the length
    d_chosen: Tensor
    d_rejected: Tensor
    margin: Tensor  # s_w - s_l; positive: the pair is ranked as labelled
    chosen_score: Tensor  # s_w, per token with pair.average
    rejected_score: Tensor  # s_l
    clamped: Tensor  # bool, s_w or s_l was above the clamp of a DIL loss; False for other losses


class PairLoss(Protocol):
    """A loss on pairs with derivatives in closed form. Inherit from this class and write
    `gradient`; the class is instantiated without arguments.

    The loss reads sums of log-probs that were computed before the update, without a graph; the
    head pass takes its derivatives as fixed coefficients.
    """

    needs_reference: ClassVar[bool] = False
    """reads PairScores.chosen_ref and rejected_ref: algorithm.pair.against is loaded and scored"""
    scores_by_value: ClassVar[bool] = False
    """compares the value head's score of each response instead of its log-prob: a reward model"""

    def check(self, pair: PairConfig) -> None:
        """Raise ConfigError if a setting has a value that this loss cannot use; the default accepts
        every value.
        """

    def gradient(self, scores: PairScores, pair: PairConfig) -> PairGradient:
        """The loss of each pair and its derivatives."""
        ...
