"""algorithm.pair.loss=simpo."""

from hybridrl.objectives.pair_losses.pair_loss import PairGradient, PairLoss, PairScores
from hybridrl.objectives.pair_losses.scored_sides import policy_logprobs
from hybridrl.ops.preference import logistic
from hybridrl.settings.algorithm import PairConfig


class Simpo(PairLoss):
    """-log sigma(beta (log pi(w)/|w| - log pi(l)/|l|) - gamma) (arXiv 2405.14734); no reference
    model.

    gamma is algorithm.pair.target; the division by the lengths is algorithm.pair.average=true. With
    target 0, sums and nll_weight 1 the loss is CPO's.
    """

    def gradient(self, scores: PairScores, pair: PairConfig) -> PairGradient:
        sides = policy_logprobs(scores, pair)
        loss, slope = logistic(pair.beta * sides.margin - pair.target)
        return sides.gradient(pair, loss, pair.beta * slope, -pair.beta * slope)
