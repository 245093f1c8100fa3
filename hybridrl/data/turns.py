"""Decides, by the weights of the sources, from which source each prompt of a run comes."""

import math
from collections.abc import Mapping
from fractions import Fraction


class Turns:
    """A sequence of sources in which each has its share at every point of the sequence.

    After n prompts, the number of prompts from a source with share w differs from w*n by less than
    one prompt (by at most 1 - 1/(2k - 2) with k sources, so half a prompt with two; R. Tijdeman,
    The chairman assignment problem, Discrete Mathematics 32, 1980). No random number is drawn.

    Example: the weights {"a": 3, "b": 1} give a, a, b, a, and so on.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """
        Args:
            weights: of each source, positive; decimals are exact, e.g. 0.1 is a tenth.
        """
        exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
        unit = math.lcm(*(weight.denominator for weight in exact.values()))
        self.weights = {name: int(weight * unit) for name, weight in exact.items()}
        self.taken = dict.fromkeys(weights, 0)
        """The turns that each source has had."""

    def next(self) -> str:
        """The source of the next turn: of those whose turn is due, the one with the earliest
        deadline.
        """
        total = sum(self.weights.values())
        turn = sum(self.taken.values()) + 1
        scale = max(2 * len(self.weights) - 2, 1)
        # The turns by which each source is behind its share, times `total`: integers.
        behind = {name: w * turn - self.taken[name] * total for name, w in self.weights.items()}
        due = [name for name, lag in behind.items() if scale * lag >= total]

        def time_left(name: str) -> Fraction:
            return Fraction((scale - 1) * total - scale * behind[name], self.weights[name])

        chosen = min(due, key=time_left)
        self.taken[chosen] += 1
        return chosen
