"""An arm that trains a model once, and the numbers of its run."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from reproduction.examination import Examination, examine
from reproduction.experiment import Arm, Numbers, Setting
from reproduction.lab import Lab, Trained
from reproduction.made_models import with_made_models

SMALL: Mapping[str, Setting] = {"train.steps": 5, "eval.every": 0}
TEACHER = "builtin:countdown-teacher"
COLUMNS: Mapping[str, str] = {
    "reward": "reward",
    "greedy": "greedy accuracy",
    "divergence": "KL to the teacher, nats",
    "tokens": "tokens",
}
"""Of the table of an experiment whose arms are measured by `measure`."""
Measure: TypeAlias = Callable[[Mapping[str, Setting], int, Lab], Numbers]


def measure(settings: Mapping[str, Setting], seed: int, lab: Lab) -> Numbers:
    """Train, and examine the model against the shipped teacher. "made:NAME" as a value stands for
    a model of made_models.

    Returns:
        reward, greedy, divergence: of Examination. accuracy_N: greedy, after N steps, by the run's
        own evaluations. tokens: response tokens that were trained on.
    """
    with lab.run(with_made_models(settings, lab.folder / "made"), seed) as trained:
        return numbers_of(trained, examine(trained.model, TEACHER, problems=lab.problems))


def numbers_of(trained: Trained, found: Examination) -> Numbers:
    """As `measure`."""
    return {
        "reward": found.reward,
        "greedy": found.greedy,
        "divergence": found.divergence,
        "tokens": trained.tokens,
        **trained.accuracies,
    }


def trained_arm(
    name: str,
    settings: Mapping[str, Setting],
    small: Mapping[str, Setting] | None = None,
    measure: Measure = measure,
) -> Arm:
    """An arm of `measure`.

    Args:
        small: further changes of the small run, by which arms that run the same code share one.
    """
    return Arm(name=name, settings=settings, small={**SMALL, **(small or {})}, measure=measure)
