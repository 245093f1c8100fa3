"""algorithm.baseline=none: nothing is subtracted."""

from torch import Tensor

from hybridrl.objectives.advantages.advantage import Advantage, ReturnGrid
from hybridrl.settings.algorithm import AlgorithmConfig


class WholeReturn(Advantage):
    """The return itself: unbiased, with the largest variance."""

    def advantages(self, grid: ReturnGrid, algorithm: AlgorithmConfig) -> Tensor:
        return grid.returns
