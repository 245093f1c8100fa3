"""The two scores that a loss on log-probs compares, and their derivatives with respect to the
summed log-probs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridrl.objectives.pair_losses.pair_loss import PairGradient, PairScores
from hybridrl.settings.algorithm import PairConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSides:
    """The scores of P pairs; all [P]."""

    chosen: Tensor  # s_w
    rejected: Tensor  # s_l
    chosen_logp: Tensor  # log pi(w), per token with pair.average
    chosen_scale: Tensor  # d s_w / d chosen_logp: 1, or 1/|w|
    rejected_scale: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected

    def gradient(
        self,
        pair: PairConfig,
        loss: Tensor,
        d_chosen: Tensor,
        d_rejected: Tensor,
        clamped: Tensor | None = None,
    ) -> PairGradient:
        """The loss with the NLL term added, and its derivatives with respect to summed log-probs.

        Args:
            loss: [P] without the NLL term.
            d_chosen, d_rejected: [P] its derivatives with respect to s_w and s_l.
            clamped: [P] bool; None: the loss never clamps.
        """
        return PairGradient(
            loss=loss - pair.nll_weight * self.chosen_logp,
            d_chosen=(d_chosen - pair.nll_weight) * self.chosen_scale,
            d_rejected=d_rejected * self.rejected_scale,
            margin=self.margin,
            chosen_score=self.chosen,
            rejected_score=self.rejected,
            clamped=torch.zeros_like(loss, dtype=torch.bool) if clamped is None else clamped,
        )


def policy_logprobs(scores: PairScores, pair: PairConfig) -> ScoredSides:
    """The scores s = log pi, for losses without a reference model; divided by the length with
    pair.average.
    """
    chosen = scores.chosen_logp
    rejected = scores.rejected_logp
    assert chosen.ndim == 1 and chosen.shape == rejected.shape, (chosen.shape, rejected.shape)
    scales = [
        1 / length.to(chosen.dtype) if pair.average else torch.ones_like(chosen)
        for length in (scores.chosen_len, scores.rejected_len)
    ]
    return ScoredSides(
        chosen=chosen * scales[0],
        rejected=rejected * scales[1],
        chosen_logp=chosen * scales[0],
        chosen_scale=scales[0],
        rejected_scale=scales[1],
    )


def log_ratios(scores: PairScores, pair: PairConfig) -> ScoredSides:
    """The scores s = log pi - log pi_ref; divided by the length with pair.average."""
    policy = policy_logprobs(scores, pair)
    return ScoredSides(
        chosen=(scores.chosen_logp - scores.chosen_ref) * policy.chosen_scale,
        rejected=(scores.rejected_logp - scores.rejected_ref) * policy.rejected_scale,
        chosen_logp=policy.chosen_logp,
        chosen_scale=policy.chosen_scale,
        rejected_scale=policy.rejected_scale,
    )
