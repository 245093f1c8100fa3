"""algorithm.pair.loss=slic."""

from hybridrl.objectives.pair_losses.pair_loss import PairGradient, PairLoss, PairScores
from hybridrl.objectives.pair_losses.scored_sides import policy_logprobs
from hybridrl.settings.algorithm import PairConfig


class Slic(PairLoss):
    """max(0, d - log pi(w) + log pi(l)) - l log pi(w) (arXiv 2305.10425); no reference model.

    d, the margin above which a pair has no hinge loss, is algorithm.pair.target; l is
    algorithm.pair.nll_weight.
    """

    def gradient(self, scores: PairScores, pair: PairConfig) -> PairGradient:
        sides = policy_logprobs(scores, pair)
        missing = pair.target - sides.margin
        slope = -(missing > 0).to(missing.dtype)
        return sides.gradient(pair, missing.clamp(min=0), slope, -slope)
