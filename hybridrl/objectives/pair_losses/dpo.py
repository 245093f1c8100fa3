"""algorithm.pair.loss=dpo."""

from hybridrl.objectives.pair_losses.pair_loss import PairGradient, PairLoss, PairScores
from hybridrl.objectives.pair_losses.scored_sides import log_ratios
from hybridrl.ops.preference import logistic
from hybridrl.settings.algorithm import PairConfig


class Dpo(PairLoss):
    """-log sigma(beta (s_w - s_l)) (arXiv 2305.18290, equation 7)."""

    needs_reference = True

    def gradient(self, scores: PairScores, pair: PairConfig) -> PairGradient:
        sides = log_ratios(scores, pair)
        loss, slope = logistic(pair.beta * sides.margin)
        return sides.gradient(pair, loss, pair.beta * slope, -pair.beta * slope)
