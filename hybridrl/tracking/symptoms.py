"""Detects, from the metrics, steps from which nothing is learned or that do work twice, and names
the settings to change.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Row = Mapping[str, float]

ROUNDING = 1e-6  # relative standard error of rewards that are equal up to fp32 rounding
PREEMPTIONS = re.compile(r"engine/[^/]+/preemptions")
OFTEN = 0.1  # the summary names a symptom that at least this share of the steps has


@dataclass(frozen=True, slots=True, kw_only=True)
class Symptom:
    """One reason why nothing is learned from a step, or why it takes longer than it must."""

    shows: Callable[[Row], bool]  # whether the metrics of a step show the symptom
    what: str  # a clause that names the symptom
    remedy: str  # a clause in the imperative, for the user


def _most_cut(row: Row) -> bool:
    return row.get("rollout/truncated_frac", 0.0) > 0.5


def _most_empty(row: Row) -> bool:
    """Whether most responses are only an end token."""
    short = row.get("rollout/length_mean", math.inf) < 1.5
    return short and row.get("rollout/eos_frac", 0.0) > 0.5


def _rewards_equal(row: Row) -> bool:
    """Whether all rewards are equal, in a run that learns from them."""
    spread = row.get("reward/stderr", math.nan)
    size = max(1.0, abs(row.get("reward/mean", 0.0)))
    return row.get("schedule/lambda", 0.0) != 0 and spread <= ROUNDING * size


def _no_gradient(row: Row) -> bool:
    return row.get("train/grad_norm") == 0


def _preempted(row: Row) -> bool:
    """Whether an engine restarted a request."""
    return any(value > 0 for key, value in row.items() if PREEMPTIONS.fullmatch(key))


SYMPTOMS = (
    Symptom(
        shows=_most_cut,
        what="most responses were cut at rollout.max_new_tokens",
        remedy="raise it and rollout.max_model_len",
    ),
    Symptom(
        shows=_most_empty,
        what="most responses were empty",
        remedy="check in the report how a prompt ends, and set data.chat_template or "
        "data.instruction",
    ),
    Symptom(
        shows=_rewards_equal,
        what="all rewards were equal",
        remedy="check in the report how reward.functions score the responses, or choose "
        "problems of which the model solves some",
    ),
    Symptom(
        shows=_no_gradient,
        what="the gradient was 0",
        remedy="raise algorithm.imitation_weight, algorithm.reward_weight, "
        "train.samples_per_prompt or algorithm.temperature",
    ),
    Symptom(
        shows=_preempted,
        what="responses were begun again because an engine's KV cache was full",
        remedy="lower rollout.max_num_seqs, or raise rollout.kv_cache_bytes or "
        "rollout.gpu_memory_utilization; for engine/scorer-NAME, the same in teachers.NAME.engine",
    ),
)
"""All symptoms, in the order in which a sentence names them: causes before their consequences."""


class Watch:
    """Counts the steps that show each symptom.

    Example: for the first row with {"train/step": 3, "train/grad_norm": 0}, see() returns "in step
    3 the gradient was 0 (raise ...)", and for later such rows None. If 18 of 20 steps had this
    symptom, summary() returns "the gradient was 0 in 18 of 20 steps (raise ...)".
    """

    def __init__(self) -> None:
        self._counts = dict.fromkeys(SYMPTOMS, 0)
        self._steps = 0

    def see(self, row: Row) -> str | None:
        """Count the row of one step.

        Returns:
            A sentence about symptoms that occur for the first time; None: there are none.
        """
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
        """A sentence about the symptoms of at least a tenth of the steps; None: there are none."""
        often = [
            f"{symptom.what} in {count} of {self._steps} steps ({symptom.remedy})"
            for symptom, count in self._counts.items()
            if count and count >= OFTEN * self._steps
        ]
        return ", ".join(often) or None


def watch(rows: Iterable[Row]) -> Watch:
    """A Watch that has counted `rows`."""
    counted = Watch()
    for row in rows:
        counted.see(row)
    return counted
