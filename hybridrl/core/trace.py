"""A trace of a run: what each process did when, for Perfetto (ui.perfetto.dev).

Each process appends to a file of its own in logs/, in the JSON array format of Chrome's traces
(docs.google.com "Trace Event Format"): one event an element, and no closing bracket. The end of the
run combines these files into trace.json, which has the JSON object format.
"""

import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from hybridrl.core.files import replace_text

VARIABLE = "HYBRIDRL_TRACE"
"""Set in the environment of each worker of a run that is traced."""
SUFFIX = ".trace.json"
WHOLE = "trace.json"
"""The trace of all processes, in the run directory."""
MOST_BYTES = 2**26
"""Largest size of the file of one process, which then records nothing more."""
DRIVER = "driver"


class Trace:
    """Records the spans of one process, in microseconds since 1970.

    Spans of one thread end in the reverse of the order in which they began. Coroutines may end in
    any order, so each has a track of its own.

    Args:
        path: the file to which spans are appended; None: nothing is recorded.
        coroutines: the spans are of coroutines and may overlap.
    """

    def __init__(self, path: Path | None, *, coroutines: bool = False) -> None:
        self._path = path
        self._coroutines = coroutines
        self._file: TextIO | None = None
        self._ids = itertools.count()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record the time of a `with` block, also if it raises."""
        if self._path is None:
            yield
            return
        begin = now_us()
        try:
            yield
        finally:
            self._append(name, begin, now_us())

    def _append(self, name: str, begin: int, end: int) -> None:
        event: dict[str, Any] = {"name": name, "cat": "call", "pid": os.getpid(), "tid": 0}
        events = [{**event, "ph": "X", "ts": begin, "dur": end - begin}]
        if self._coroutines:
            # A local id: a viewer shows spans with a global "id" under no process.
            identity = {"id2": {"local": f"{os.getpid()}.{next(self._ids)}"}}
            events = [
                {**event, **identity, "ph": "b", "ts": begin},
                {**event, **identity, "ph": "e", "ts": end},
            ]
        text = "".join(f"{json.dumps(each)},\n" for each in events)
        try:
            file = self._opened()
            if file.tell() + len(text) > MOST_BYTES:
                self._path = None
                return
            file.write(text)
            file.flush()
        except OSError:  # a run does not end because its trace cannot be written
            self._path = None

    def _opened(self) -> TextIO:
        if self._file is None:
            assert self._path is not None, "only a trace with a path is written"
            self._path.parent.mkdir(exist_ok=True)  # not the run directory, if that is gone
            self._file = self._path.open("a", encoding="ascii")
            if self._file.tell() == 0:
                self._file.write("[\n")
        return self._file


def now_us() -> int:
    """Microseconds since 1970 by the wall clock, the only one that several nodes share."""
    return time.time_ns() // 1000


def trace_of_worker(log: str, *, coroutines: bool) -> Trace:
    """The trace of this worker, in a file beside its log; it records nothing where the run is not
    traced.
    """
    traced = VARIABLE in os.environ
    return Trace(Path(log).with_suffix(SUFFIX) if traced else None, coroutines=coroutines)


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of one process, without a last one that the end of the process cut off."""
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    events = []
    for line in lines:
        try:
            events.append(json.loads(line.rstrip(",")))
        except ValueError:
            continue
    return [event for event in events if isinstance(event, dict)]


def whole_trace(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The events of several processes, each under the name of its file, in the order of time.

    Processes of several nodes may have equal ids, so the number of its file replaces the process
    and thread id of an event. Numbers start at 1, because 0 is the idle process in Perfetto. Times
    are relative to the first event.
    """
    events: list[dict[str, Any]] = []
    driver = f"{DRIVER}{SUFFIX}"
    for number, path in enumerate(sorted(files, key=lambda path: (path.name != driver, path)), 1):
        name = path.name.removesuffix(SUFFIX)
        place = {"pid": number, "tid": number}
        described: dict[str, Any] = {"ph": "M", **place, "ts": 0}
        events.append({**described, "name": "process_name", "args": {"name": name}})
        events.append({**described, "name": "process_sort_index", "args": {"sort_index": number}})
        events.append({**described, "name": "thread_name", "args": {"name": "calls"}})
        events += [event | place for event in read_events(path)]
    timed = [event for event in events if event["ph"] != "M"]
    begin = min((event["ts"] for event in timed), default=0)
    for event in timed:
        event["ts"] -= begin
    return sorted(events, key=lambda event: (event["ph"] != "M", event["ts"]))


def write_trace(run_dir: Path) -> Path:
    """Put the files of all processes of a run together into trace.json."""
    files = list((run_dir / "logs").glob(f"*{SUFFIX}"))
    target = run_dir / WHOLE
    replace_text(target, json.dumps({"traceEvents": whole_trace(files)}))
    return target
