"""algorithm.pair.loss=dil_ukl."""

import torch
from torch import Tensor

from hybridrl.objectives.pair_losses.density_ratio import density_ratio
from hybridrl.objectives.pair_losses.pair_loss import PairGradient, PairLoss, PairScores
from hybridrl.settings.algorithm import PairConfig


class DilUkl(PairLoss):
    """-s_w + E_ref[exp(s)]: DIL with h(r) = r log r - r (arXiv 2503.05079)."""

    needs_reference = True

    def gradient(self, scores: PairScores, pair: PairConfig) -> PairGradient:
        return density_ratio(scores, pair, chosen_term, reference_term)


def chosen_term(s: Tensor) -> tuple[Tensor, Tensor]:
    """-s and its slope; [P]."""
    return -s, -torch.ones_like(s)


def reference_term(s: Tensor) -> tuple[Tensor, Tensor]:
    """exp(s) and its slope; [P]."""
    return s.exp(), s.exp()
