"""Statistics of the rewards and lengths of a model's responses to a set of problems."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybridrl.controller.metrics import PASS_MARK
from hybridrl.data.problem import source_of
from hybridrl.settings.held_out import pass_sizes
from hybridrl.types import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class SetStatistics:
    """Statistics of n problems with k responses each.

    Example: two problems with the values (1, 0) and (0, 0): average 0.25, standard error 0.25,
    pass_at {1: 0.25, 2: 0.5}.
    """

    problems: int  # n
    samples: int  # k
    # avg@k: mean over the problems of the mean value of their responses; NaN: nothing judges them
    average: float
    # of the average, computed over problems, since the k responses to one are not independent
    standard_error: float
    pass_at: dict[int, float]  # pass@k for each k of pass_sizes; empty: nothing judges them
    failed: float  # share of responses whose reward call failed; only the accuracies omit them
    length: float  # mean number of tokens of a response
    truncated: float  # share of responses that were cut at rollout.max_new_tokens

    @property
    def passed(self) -> float:
        """pass@k for k = `samples`; NaN: nothing judges the responses."""
        return self.pass_at.get(self.samples, math.nan)

    def metrics(self, name: str) -> dict[str, float]:
        """The statistics as metrics of an evaluation, eval/NAME/...

        Args:
            name: the name of the set.
        """
        row = {
            "accuracy": self.average,
            "accuracy_stderr": self.standard_error,
            **{f"pass_at_{k}": share for k, share in self.pass_at.items()},
            "error_rate": self.failed,
            "length_mean": self.length,
            "truncated_frac": self.truncated,
        }
        return {f"eval/{name}/{metric}": value for metric, value in row.items()}


def pass_at(values: np.ndarray, k: int) -> float:
    """Probability that at least one of k responses passes, which are drawn without replacement from
    the responses to a problem; averaged over the problems.

    This is the unbiased estimator 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374),
    where c of n responses pass.

    Args:
        values: [n problems, K] rewards. NaN entries are left out; if fewer than k remain for a
            problem, all of them are drawn.

    Returns:
        The mean; NaN if no problem has a reward.
    """
    judged = np.isfinite(values).sum(axis=1).tolist()  # [n]
    passed = (values > PASS_MARK).sum(axis=1).tolist()  # [n]
    shares = [
        1 - math.comb(n - c, min(k, n)) / math.comb(n, min(k, n))
        for n, c in zip(judged, passed, strict=True)
        if n
    ]
    return float(np.mean(shares)) if shares else math.nan


def set_statistics(
    values: np.ndarray | None, lengths: Sequence[int], truncated: Sequence[bool], samples: int
) -> SetStatistics:
    """The statistics of the responses to at least one problem, in the order of the problems.

    Args:
        values: [n, k] values of the reward function, NaN where its call failed; None: there is no
            function.
        lengths: [n * k] tokens.
        truncated: [n * k].
        samples: k.
    """
    count = len(lengths)
    if values is None:
        means = np.zeros(0)
        passes: dict[int, float] = {}
        failed = 0.0
    else:
        judged = np.isfinite(values)
        any_judged = judged.any(axis=1)
        sums = np.where(judged, values, 0.0).sum(axis=1)
        means = sums[any_judged] / judged.sum(axis=1)[any_judged]
        passes = {k: pass_at(values, k) for k in pass_sizes(samples)}
        failed = float(1 - judged.mean())
    deviation = float(means.std(ddof=1)) if len(means) > 1 else math.nan
    return SetStatistics(
        problems=count // samples,
        samples=samples,
        average=float(means.mean()) if len(means) else math.nan,
        standard_error=deviation / math.sqrt(len(means)) if len(means) else math.nan,
        pass_at=passes,
        failed=failed,
        length=float(np.mean(lengths)),
        truncated=float(np.mean(truncated)),
    )


def statistics_of(rows: Iterable[Mapping[str, Any]], reward: str | None = None) -> SetStatistics:
    """The statistics of the rows of a file of answers.

    Args:
        rows: at least one; each has `lengths` [k], `finish_reasons` [k] and, by the name of each
            reward function, `rewards` [k].
        reward: the function whose values count; None: the first one of each row. A row that it does
            not judge counts as one whose calls failed.
    """
    values: list[list[float]] = []
    lengths: list[int] = []
    truncated: list[bool] = []
    samples = 1
    for row in rows:
        samples = len(row["lengths"])
        lengths += row["lengths"]
        truncated += [reason == FinishReason.length for reason in row["finish_reasons"]]
        rewards = row.get("rewards", {})
        if rewards:
            of_function = rewards.get(reward or next(iter(rewards)), [None] * samples)
            values.append([math.nan if value is None else value for value in of_function])
    return set_statistics(np.array(values) if values else None, lengths, truncated, samples)


def statistics_of_sources(
    rows: Iterable[Mapping[str, Any]], reward: str | None = None
) -> dict[str, SetStatistics]:
    """As statistics_of, for the rows of each of data.sources; empty if there is only one source.

    Args:
        rows: as in statistics_of, with a `uid`.
    """
    by_source: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = source_of(row["uid"])
        if name is not None:
            by_source.setdefault(name, []).append(row)
    return {name: statistics_of(of_source, reward) for name, of_source in by_source.items()}
