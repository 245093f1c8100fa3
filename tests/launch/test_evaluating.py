"""The table of `hybridrl eval`, made from rows in the form of its files."""

from typing import Any

from hybridrl.controller.set_statistics import statistics_of, statistics_of_sources
from hybridrl.launch.evaluating import table, values_of


def row(uid: str, lengths: list[int], **rewards: list[float | None]) -> dict[str, Any]:
    reasons = ["length" if length == 16 else "stop" for length in lengths]
    return {"uid": uid, "lengths": lengths, "finish_reasons": reasons, "rewards": rewards}


MIXED = [
    row("math/heldout-000000", [4, 6], exact=[1.0, 0.0], style=[0.0, 0.0]),
    row("sums/heldout-000000", [16, 2], style=[0.0, 0.0]),
    row("math/heldout-000001", [4, 6], exact=[1.0, 1.0], style=[0.0, 0.0]),
]
"""Rows of two sources; answers of math are judged by `exact`, those of sums by `style`."""


def test_each_source_of_a_set_has_statistics_of_its_own():
    of_sources = statistics_of_sources(MIXED)
    assert list(of_sources) == ["math", "sums"]
    math, sums = of_sources.values()
    assert (math.problems, math.average, math.standard_error) == (2, 0.75, 0.25)
    assert (sums.problems, sums.average, sums.truncated) == (1, 0.0, 0.5)
    assert statistics_of_sources([row("heldout-000000", [4], exact=[1.0])]) == {}


def test_the_table_has_a_row_for_each_set_and_for_each_source_beneath_it():
    statistics = {"heldout": statistics_of(MIXED)} | {
        f"heldout/{name}": of_source for name, of_source in statistics_of_sources(MIXED).items()
    }
    assert table(statistics) == [
        "set           problems  avg@k  stderr  pass@k  k  tokens  truncated  failed",
        "heldout              3  0.500   0.289   0.667  2     6.3      16.7%    0.0%",
        "heldout/math         2  0.750   0.250   1.000  2     5.0       0.0%    0.0%",
        "heldout/sums         1  0.000       -   0.000  2     9.0      50.0%    0.0%",
    ]
    assert values_of(statistics["heldout/sums"])["standard_error"] is None, "JSON has no NaN"
