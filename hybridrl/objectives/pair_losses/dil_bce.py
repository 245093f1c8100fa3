"""algorithm.pair.loss=dil_bce."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from hybridrl.objectives.pair_losses.density_ratio import density_ratio
from hybridrl.objectives.pair_losses.pair_loss import PairGradient, PairLoss, PairScores
from hybridrl.ops.preference import logistic
from hybridrl.settings.algorithm import PairConfig


class DilBce(PairLoss):
    """-log sigma(s_w) - E_ref[log sigma(-s)]: DIL with h(r) = r log r - (1 + r) log(1 + r) (arXiv
    2503.05079).
    """

    needs_reference = True

    def gradient(self, scores: PairScores, pair: PairConfig) -> PairGradient:
        return density_ratio(scores, pair, logistic, reference_term)


def reference_term(s: Tensor) -> tuple[Tensor, Tensor]:
    """-log sigma(-s) and its slope; [P]."""
    return -logsigmoid(-s), s.sigmoid()
