"""Steps that teach nothing: how their metrics show it, and the setting to change."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Row = Mapping[str, float]

ROUNDING = 1e-6  # relative standard error of rewards that are equal up to fp32 rounding
OFTEN = 0.1  # share of the steps from which a symptom belongs into the summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Symptom:
    shows: Callable[[Row], bool]
    what: str
    remedy: str


def _most_cut(row: Row) -> bool:
    return row.get("rollout/truncated_frac", 0.0) > 0.5


def _most_empty(row: Row) -> bool:
    """The end token alone."""
    short = row.get("rollout/length_mean", math.inf) < 1.5
    return short and row.get("rollout/eos_frac", 0.0) > 0.5


def _rewards_equal(row: Row) -> bool:
    """Of a reward that is learned from."""
    spread = row.get("reward/stderr", math.nan)
    size = max(1.0, abs(row.get("reward/mean", 0.0)))
    return row.get("schedule/lambda", 0.0) != 0 and spread <= ROUNDING * size


def _no_gradient(row: Row) -> bool:
    return row.get("train/grad_norm") == 0


SYMPTOMS = (
    Symptom(
        shows=_most_cut,
        what="most responses were cut at rollout.max_new_tokens",
        remedy="raise it and rollout.max_model_len",
    ),
    Symptom(
        shows=_most_empty,
        what="most responses were empty",
        remedy="see in the report how a prompt ends, and set data.chat_template or "
        "data.instruction",
    ),
    Symptom(
        shows=_rewards_equal,
        what="all rewards were equal",
        remedy="see in the report what reward.functions makes of the responses, or choose "
        "problems of which the model solves some",
    ),
    Symptom(
        shows=_no_gradient,
        what="the gradient was 0",
        remedy="raise algorithm.imitation_weight, algorithm.reward_weight, "
        "train.samples_per_prompt or algorithm.temperature",
    ),
)
"""Causes before what follows from them."""


class Watch:
    """Counts the steps that show each symptom.

    Example: the first row with {"train/step": 3, "train/grad_norm": 0} makes see() return "in step
    3 the gradient was 0 (raise ...)", later ones None; after 20 steps, 18 of them such, summary()
    is "the gradient was 0 in 18 of 20 steps (raise ...)".
    """

    def __init__(self) -> None:
        self._counts = dict.fromkeys(SYMPTOMS, 0)
        self._steps = 0

    def see(self, row: Row) -> str | None:
        """Count one step's row; a sentence about what none before it showed."""
        step = row["train/step"]
        if step == 0:  # an evaluation before training
            return None
        self._steps += 1
        new = []
        for symptom in SYMPTOMS:
            if symptom.shows(row):
                self._counts[symptom] += 1
                if self._counts[symptom] == 1:
                    new.append(f"{symptom.what} ({symptom.remedy})")
        return f"in step {step:.0f} {', '.join(new)}" if new else None

    def summary(self) -> str | None:
        """One sentence about what at least a tenth of the steps showed; None where nothing did."""
        often = [
            f"{symptom.what} in {count} of {self._steps} steps ({symptom.remedy})"
            for symptom, count in self._counts.items()
            if count and count >= OFTEN * self._steps
        ]
        return ", ".join(often) or None


def watch(rows: Iterable[Row]) -> Watch:
    """A watch that has seen `rows`."""
    seen = Watch()
    for row in rows:
        seen.see(row)
    return seen
