"""What the rewards and lengths of the answers to a set of problems say about a model."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybridrl.controller.metrics import PASS_MARK
from hybridrl.types import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerStatistics:
    """Statistics of n problems with k responses each.

    Example: two problems with the values (1, 0) and (0, 0): average 0.25, standard error 0.25,
    passed 0.5.
    """

    problems: int  # n
    samples: int  # k
    # avg@k: mean value of the first reward function over all responses; NaN: there is none
    average: float
    # of the average, over the problems, whose k responses are not independent
    standard_error: float
    passed: float  # pass@k: share of problems with a response above PASS_MARK
    failed: float  # share of responses whose reward call failed; they count in no other number
    length: float  # mean number of tokens of a response
    truncated: float  # share of responses that were cut at rollout.max_new_tokens


def statistics_of(rows: Iterable[Mapping[str, Any]]) -> AnswerStatistics:
    """The statistics of the rows of a file of answers, at least one.

    Args:
        rows: with `lengths`, `finish_reasons` and, by the name of each function, `rewards`, [k]
            each.
    """
    means = []
    best = []
    lengths: list[int] = []
    reasons: list[str] = []
    judged = 0
    failures = 0
    problems = 0
    for row in rows:
        problems += 1
        lengths += row["lengths"]
        reasons += row["finish_reasons"]
        of_first: list[float | None] = next(iter(row.get("rewards", {}).values()), [])
        judged += len(of_first)
        values = [value for value in of_first if value is not None]
        failures += len(of_first) - len(values)
        if values:
            means.append(sum(values) / len(values))
            best.append(max(values))
    count = len(lengths)
    deviation = float(np.std(means, ddof=1)) if len(means) > 1 else math.nan
    return AnswerStatistics(
        problems=problems,
        samples=count // problems,
        average=float(np.mean(means)) if means else math.nan,
        standard_error=deviation / math.sqrt(len(means)) if means else math.nan,
        passed=float(np.mean(np.array(best) > PASS_MARK)) if best else math.nan,
        failed=failures / judged if judged else 0.0,
        length=sum(lengths) / count,
        truncated=reasons.count(FinishReason.length) / count,
    )
