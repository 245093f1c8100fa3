"""algorithm.pair.loss=dil_lsif."""

from torch import Tensor

from hybridrl.objectives.pair_losses.density_ratio import density_ratio
from hybridrl.objectives.pair_losses.pair_loss import PairGradient, PairLoss, PairScores
from hybridrl.settings.algorithm import PairConfig


class DilLsif(PairLoss):
    """-exp(s_w) + E_ref[exp(2 s)] / 2: DIL with h(r) = (r - 1)^2 / 2 (arXiv 2503.05079)."""

    needs_reference = True

    def gradient(self, scores: PairScores, pair: PairConfig) -> PairGradient:
        return density_ratio(scores, pair, chosen_term, reference_term)


def chosen_term(s: Tensor) -> tuple[Tensor, Tensor]:
    """-exp(s) and its slope; [P]."""
    return -s.exp(), -s.exp()


def reference_term(s: Tensor) -> tuple[Tensor, Tensor]:
    """exp(2 s) / 2 and its slope; [P]."""
    return 0.5 * (2 * s).exp(), (2 * s).exp()
