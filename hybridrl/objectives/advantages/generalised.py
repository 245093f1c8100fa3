"""algorithm.baseline=value: generalised advantage estimation over a learned value head."""

from torch import Tensor

from hybridrl.objectives.advantages.advantage import Advantage, ReturnGrid
from hybridrl.ops.returns import generalised_advantage
from hybridrl.settings.algorithm import AlgorithmConfig


class GeneralisedAdvantage(Advantage):
    """PPO's advantages (arXiv 1506.02438): unbiased for algorithm.value.gae_lambda=1, or with exact
    values.
    """

    needs_values = True

    def advantages(self, grid: ReturnGrid, algorithm: AlgorithmConfig) -> Tensor:
        return generalised_advantage(
            grid.returns, grid.values, grid.mask, algorithm.value.gae_lambda
        )
