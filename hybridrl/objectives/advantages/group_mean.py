"""algorithm.baseline=group_mean: the siblings' mean, the response itself included."""

from torch import Tensor

from hybridrl.objectives.advantages.advantage import Advantage, ReturnGrid
from hybridrl.ops.returns import sibling_mean
from hybridrl.settings.algorithm import AlgorithmConfig


class GroupMean(Advantage):
    """GRPO's baseline (arXiv 2402.03300). A response is part of its own baseline, which shrinks the
    gradient by 1/K.
    """

    needs_siblings = True

    def advantages(self, grid: ReturnGrid, algorithm: AlgorithmConfig) -> Tensor:
        return grid.returns - sibling_mean(grid.returns, grid.group_size, leave_one_out=False)
