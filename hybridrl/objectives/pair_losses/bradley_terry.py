"""algorithm.pair.loss=bradley_terry: a reward model."""

import torch

from hybridrl.objectives.pair_losses.pair_loss import PairGradient, PairLoss, PairScores
from hybridrl.ops.preference import bradley_terry
from hybridrl.settings.algorithm import PairConfig


class BradleyTerry(PairLoss):
    """-log sigma(r_w - r_l) of the value head's scores r; no other setting of algorithm.pair is
    read.
    """

    scores_by_value = True

    def gradient(self, scores: PairScores, pair: PairConfig) -> PairGradient:
        chosen = scores.chosen_logp
        rejected = scores.rejected_logp
        loss, d_chosen, d_rejected = bradley_terry(chosen, rejected)
        return PairGradient(
            loss=loss,
            d_chosen=d_chosen,
            d_rejected=d_rejected,
            margin=chosen - rejected,
            chosen_score=chosen,
            rejected_score=rejected,
            clamped=torch.zeros_like(loss, dtype=torch.bool),
        )
