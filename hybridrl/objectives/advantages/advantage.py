"""The interface of an advantage estimator: its input and the class to inherit from."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from hybridrl.settings.algorithm import AlgorithmConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ReturnGrid:
    """The returns of N responses in whole groups of K siblings; T is the longest response's length.

    Groups that are dropped, e.g. because a reward function failed, are not in it.

    All returns are costs: the objective is minimised, so a reward of 1 is a return of -lambda.

    Example: two siblings with rewards 1 and 0 of one and two tokens, lambda 2, gamma 0: returns
    [[-2, -2], [0, 0]], mask [[True, False], [True, True]], group_size 2.
    """

    returns: Tensor
    """[N, T] G of each token; after the end of a response its row contains -lambda R, so that
    siblings can be compared at every position
    """
    values: Tensor
    """[N, T] the value head's outputs, 0 where masked, and 0 everywhere unless `needs_values`"""
    mask: Tensor
    """[N, T] bool, True on response tokens, which come first in each row"""
    group_size: int
    """K; the siblings of a prompt are adjacent rows"""


class Advantage(Protocol):
    """An estimator of the advantage of each token. Inherit from this class and write `advantages`;
    the class is instantiated without arguments.
    """

    needs_values: ClassVar[bool] = False
    """reads ReturnGrid.values: the run has a value head, which is trained on the advantages"""
    needs_siblings: ClassVar[bool] = False
    """compares the responses of a prompt: train.samples_per_prompt must be at least 2"""

    def advantages(self, grid: ReturnGrid, algorithm: AlgorithmConfig) -> Tensor:
        """The cost of each token above its baseline, which multiplies grad log p of the token.

        Returns:
            [N, T] of the dtype of grid.returns; masked entries are not used.
        """
        ...
