"""Settings of named held-out sets, by which an evaluation judges the student."""

from dataclasses import dataclass, field
from typing import Any

HELDOUT = "heldout"
"""The name of the held-out problems of data.* among the names of sets."""


@dataclass(kw_only=True, slots=True)
class HeldOutSetConfig:
    """A set has either a path or a task. Chat template and instruction are those of data.*."""

    path: str | None = None
    """rows, as data.path; where the run learns from data, the responses of the rows give a held-out
    loss, and pairs the share that is ranked correctly
    """
    columns: dict[str, Any] = field(default_factory=dict)
    """with path: as data.columns; empty: those of data.columns"""
    revision: str | None = None
    """with path: hub revision; null: the newest"""
    task: str | None = None
    """countdown or reasoning_gym (dataset), instead of a path"""
    dataset: str | None = None
    """with task=reasoning_gym: name of the generator"""
    options: dict[str, Any] = field(default_factory=dict)
    """with task: options of the generator, as data.options"""
    num_problems: int = 512
    """largest number of problems; of the rows at a path the first ones are used"""
    samples: int = 1
    """responses to each prompt, for avg@k and pass@k"""
    temperature: float | None = None
    """0: always the most likely token; null: as eval.greedy says, and algorithm.temperature where
    there are several samples
    """
    reward: str | None = None
    """name of the reward function that judges the responses, and the only one that is called for
    them; null: all are called, and the first one judges
    """

    def temperature_of(self, *, greedy: bool, sampled: float) -> float:
        """The temperature, with null resolved.

        Args:
            greedy: eval.greedy.
            sampled: algorithm.temperature.
        """
        if self.temperature is not None:
            return self.temperature
        return 0.0 if greedy and self.samples == 1 else sampled


def pass_sizes(samples: int) -> list[int]:
    """The values of k for which pass@k is reported: 1, 2, 4, ... and the number of responses.

    Example: pass_sizes(6) == [1, 2, 4, 6].
    """
    return sorted({2**i for i in range(samples.bit_length())} | {samples})
