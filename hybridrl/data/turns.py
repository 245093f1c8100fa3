"""From which source each prompt of a run comes, by the sources' weights."""

import math
from collections.abc import Mapping
from fractions import Fraction


class Turns:
    """A sequence of sources in which each has its share of every beginning of the sequence.

    After n prompts, a source with share w has had w*n of them, give or take less than one prompt
    (half a prompt with two sources; with k of them 1 - 1/(2k - 2), R. Tijdeman, The chairman
    assignment problem, Discrete Mathematics 32, 1980). No random number is drawn.

    Example: the weights {"a": 3, "b": 1} give a, a, b, a, and so on.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """
        Args:
            weights: of each source, positive; a number counts as it is written, 0.1 as a tenth.
        """
        exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
        unit = math.lcm(*(weight.denominator for weight in exact.values()))
        self.weights = {name: int(weight * unit) for name, weight in exact.items()}
        self.taken = dict.fromkeys(weights, 0)
        """The turns that each source has had."""

    def next(self) -> str:
        """The source of the next turn: of those whose share is due, the one whose turn could be
        put off for the shortest time.
        """
        total = sum(self.weights.values())
        turn = sum(self.taken.values()) + 1
        scale = max(2 * len(self.weights) - 2, 1)
        # Turns that each source is behind its share, times `total`, an integer.
        behind = {name: w * turn - self.taken[name] * total for name, w in self.weights.items()}
        due = [name for name, lag in behind.items() if scale * lag >= total]

        def time_left(name: str) -> Fraction:
            return Fraction((scale - 1) * total - scale * behind[name], self.weights[name])

        chosen = min(due, key=time_left)
        self.taken[chosen] += 1
        return chosen
