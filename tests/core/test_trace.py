"""A trace has each span of each process once, in a form that Perfetto can open."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hybridrl.core import trace
from hybridrl.core.trace import Trace, read_events, trace_of_worker, whole_trace, write_trace
from hybridrl.tracking.timing import PhaseClock

FIELDS = {
    "M": {"name", "ph", "pid", "tid", "ts", "args"},
    "X": {"name", "cat", "ph", "pid", "tid", "ts", "dur"},
    "b": {"name", "cat", "ph", "pid", "tid", "ts", "id2"},
    "e": {"name", "cat", "ph", "pid", "tid", "ts", "id2"},
}
"""The fields that each kind of event has in Chrome's trace event format."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The list of times in microseconds that the readings of the clock will return."""
    times: list[int] = []
    monkeypatch.setattr(trace, "now_us", lambda: times.pop(0))
    return times


def shown(events: list[dict[str, Any]]) -> list[tuple[str, str, int, int]]:
    return [(e["ph"], e["name"], e["ts"], e.get("dur", 0)) for e in events]


def test_nested_phases_of_the_driver_are_spans_with_begin_and_length(
    tmp_path: Path, clock: list[int]
) -> None:
    clock += [100, 110, 130, 160]  # step from 100 to 160, within it learn from 110 to 130
    phases = PhaseClock(Trace(tmp_path / "driver.trace.json"))
    with phases.phase("step"), phases.phase("learn"):
        pass
    assert shown(read_events(tmp_path / "driver.trace.json")) == [
        ("X", "learn", 110, 20),
        ("X", "step", 100, 60),
    ]


def test_coroutines_that_overlap_have_tracks_of_their_own(tmp_path: Path, clock: list[int]) -> None:
    clock += [0, 1, 5, 9]  # a begins, b begins, a ends, b ends
    spans = Trace(tmp_path / "rollout-0.trace.json", coroutines=True)

    first = ExitStack()
    second = ExitStack()
    first.enter_context(spans.span("a"))
    second.enter_context(spans.span("b"))
    first.close()
    second.close()
    events = read_events(tmp_path / "rollout-0.trace.json")
    assert [(e["ph"], e["name"]) for e in events] == [
        ("b", "a"),
        ("e", "a"),
        ("b", "b"),
        ("e", "b"),
    ]
    assert [e["ts"] for e in events] == [0, 5, 1, 9]
    assert events[0]["id2"] == events[1]["id2"] != events[2]["id2"] == events[3]["id2"]


def test_the_whole_trace_names_each_process_and_counts_from_the_first_event(
    tmp_path: Path, clock: list[int]
) -> None:
    clock += [1000, 1500, 1200, 1300, 1250, 1260]
    for name, coroutines in (("learner-0", False), ("driver", False), ("rollout-0", True)):
        spans = Trace(tmp_path / "logs" / f"{name}.trace.json", coroutines=coroutines)
        with spans.span("work"):
            pass
    with (tmp_path / "logs" / "learner-0.trace.json").open("a") as file:
        file.write('{"name": "cut by the end of the proc')
    events = json.loads(write_trace(tmp_path).read_text())["traceEvents"]
    assert all(set(event) == FIELDS[event["ph"]] for event in events)
    names = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
    assert names == {"driver": 1, "learner-0": 2, "rollout-0": 3}
    work = [(e["pid"], e["tid"], e["ph"], e["ts"]) for e in events if e["name"] == "work"]
    assert work == [(2, 2, "X", 0), (1, 1, "X", 200), (3, 3, "b", 250), (3, 3, "e", 260)]


def test_every_worker_with_spans_is_a_process_of_its_own_that_has_a_name(
    tmp_path: Path, clock: list[int]
) -> None:
    """Perfetto assigns a span to a process by these rules: it shows nothing of the idle process
    (pid 0, tid 0), and overlapping spans belong to a process only if their id is local to it.
    """
    clock += [0, 1, 2, 3, 4, 5]
    for name, coroutines in (("driver", False), ("rollout-0", True), ("rollout-1", True)):
        with Trace(tmp_path / "logs" / f"{name}.trace.json", coroutines=coroutines).span("work"):
            pass
    events = json.loads(write_trace(tmp_path).read_text())["traceEvents"]
    named = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert named == {1: "driver", 2: "rollout-0", 3: "rollout-1"}
    spans = [event for event in events if event["name"] == "work"]
    assert [named[event["pid"]] for event in spans] == [
        "driver",
        *("rollout-0", "rollout-0"),
        *("rollout-1", "rollout-1"),
    ]
    assert all(event["tid"] == event["pid"] > 0 for event in events)
    assert all(set(event["id2"]) == {"local"} for event in spans if event["ph"] in "be")


def test_a_span_that_raises_is_recorded_too(tmp_path: Path, clock: list[int]) -> None:
    clock += [3, 8]
    spans = Trace(tmp_path / "a.trace.json")
    with pytest.raises(KeyError), spans.span("fails"):
        raise KeyError
    assert shown(read_events(tmp_path / "a.trace.json")) == [("X", "fails", 3, 5)]


def test_a_trace_stops_at_its_limit_and_on_a_full_disk_and_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "MOST_BYTES", 250)  # an event has about 90 bytes
    spans = Trace(tmp_path / "a.trace.json")
    for _ in range(100):
        with spans.span("work"):
            pass
    size = (tmp_path / "a.trace.json").stat().st_size
    assert 100 < size <= 250
    with Trace(tmp_path / "a.trace.json" / "no folder.trace.json").span("work"):
        pass


def test_a_worker_records_only_in_a_run_that_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = str(tmp_path / "learner-0.log")
    with trace_of_worker(log, coroutines=False).span("update"):
        pass
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(trace.VARIABLE, "1")
    with trace_of_worker(log, coroutines=False).span("update"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["learner-0.trace.json"]
    assert len(whole_trace(list(tmp_path.iterdir()))) == 4


def test_a_trace_does_not_make_a_run_directory_anew(tmp_path: Path) -> None:
    with Trace(tmp_path / "run" / "logs" / "driver.trace.json").span("step"):
        pass
    assert list(tmp_path.iterdir()) == []
