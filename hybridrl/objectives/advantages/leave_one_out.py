"""algorithm.baseline=leave_one_out: the mean of the other siblings."""

from torch import Tensor

from hybridrl.objectives.advantages.advantage import Advantage, ReturnGrid
from hybridrl.ops.returns import sibling_mean
from hybridrl.settings.algorithm import AlgorithmConfig


class LeaveOneOut(Advantage):
    """RLOO's baseline (arXiv 2402.14740) at each position: unbiased, because the other responses do
    not depend on the token.
    """

    needs_siblings = True

    def advantages(self, grid: ReturnGrid, algorithm: AlgorithmConfig) -> Tensor:
        return grid.returns - sibling_mean(grid.returns, grid.group_size, leave_one_out=True)
