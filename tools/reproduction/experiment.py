"""An experiment: a claim, the runs that test it, and the rule that turns their numbers into a
verdict.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

from matplotlib.axes import Axes

if TYPE_CHECKING:
    from reproduction.lab import Lab

Setting: TypeAlias = float | str | bool | Sequence[float]
Numbers: TypeAlias = Mapping[str, float]


class Verdict(StrEnum):
    """What the numbers say of a claim."""

    confirmed = "confirmed"
    refuted = "refuted"
    undecided = "undecided"  # at this scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A verdict and the numbers that it rests on."""

    verdict: Verdict
    effect: str  # the size of the effect with its interval, in a few words
    reason: str  # one sentence or more: which part of the rule decided


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One line of runs.jsonl: what was run, and what came of it."""

    arm: str
    seed: int
    key: str  # Arm.key of this seed
    settings: Mapping[str, Setting]
    numbers: Numbers  # empty if the run failed
    error: str  # empty if it did not fail
    seconds: float
    machine: str  # processor and cores
    commit: str
    digest: str = ""  # of the arm's small run; "" in lines from before there was this field


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A line of runs.jsonl without a run: which code the tool found in a later call, so that runs
    of other code do not count from here on.
    """

    digests: Mapping[str, str]  # of the small run of each arm, by the arm's name


Runs: TypeAlias = Mapping[str, Sequence[Run]]
"""The finished runs of each arm, in the order of the seeds; those that failed are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One condition of an experiment."""

    name: str
    settings: Mapping[str, Setting]  # all that decides its numbers but the seed
    small: Mapping[str, Setting]
    """what the small run changes in the settings, to end within a few seconds; arms whose small
    runs have the same settings share one"""
    measure: Callable[[Mapping[str, Setting], int, "Lab"], Numbers]
    """the numbers of a run by settings and a seed; it may train in the lab"""
    step_s: float | None = None
    """seconds of a step, measured earlier; None: that of the small run, which has the same model"""

    @property
    def small_settings(self) -> Mapping[str, Setting]:
        return {**self.settings, **self.small}

    @property
    def trains(self) -> bool:
        """Whether it trains a model in the lab; then it takes minutes."""
        return "train.steps" in self.settings

    def numbers(self, seed: int, lab: "Lab") -> Numbers:
        return self.measure(self.settings, seed, lab)

    def small_numbers(self, lab: "Lab") -> Numbers:
        """Of the small run, with seed 0."""
        return self.measure(self.small_settings, 0, lab)

    def key(self, seed: int, digest: str) -> str:
        """By which a finished run is recognised."""
        return hashed({"settings": dict(self.settings), "seed": seed, "digest": digest})


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """Written before its first run; the git history shows it."""

    id: str
    title: str
    claim: str
    source: str  # paper and place
    design: str
    rule: str  # the words for what `judge` computes
    columns: Mapping[str, str]  # the numbers of the table: name in Run.numbers -> heading
    arms: Sequence[Arm]
    seeds: Sequence[int]
    judge: Callable[[Runs], Judgement]
    draw: Callable[[Axes, Runs], None]
    cuts: str = ""
    """what the budget left out, decided before any result was seen, and what else limits what the
    verdict says"""
    budget_s: float = 3600.0  # for all runs together; only of experiments that train


def digest(numbers: Numbers) -> str:
    """Of what the code computes: the numbers of a small run, to four digits and six decimals, so
    that rounding errors of another processor are no difference.

    So a run counts as finished although the text of a file has changed, and does not if the change
    alters results.
    """
    return hashed({name: f"{round(value, 6) + 0.0:.4g}" for name, value in numbers.items()})


def hashed(value: object) -> str:
    """16 hexadecimal digits that stand for a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
