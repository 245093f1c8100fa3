"""algorithm.pair.loss=ipo."""

from hybridrl.core.errors import ConfigError
from hybridrl.objectives.pair_losses.pair_loss import PairGradient, PairLoss, PairScores
from hybridrl.objectives.pair_losses.scored_sides import log_ratios
from hybridrl.settings.algorithm import PairConfig


class Ipo(PairLoss):
    """(s_w - s_l - 1/(2 tau))^2, tau being algorithm.pair.target (arXiv 2310.12036)."""

    needs_reference = True

    def check(self, pair: PairConfig) -> None:
        if not pair.target > 0:
            raise ConfigError(
                f"algorithm.pair.target={pair.target}: with pair.loss={pair.loss} it must be "
                "positive, the margin is 1/(2 target)"
            )

    def gradient(self, scores: PairScores, pair: PairConfig) -> PairGradient:
        sides = log_ratios(scores, pair)
        error = sides.margin - 1 / (2 * pair.target)
        return sides.gradient(pair, error.square(), 2 * error, -2 * error)
