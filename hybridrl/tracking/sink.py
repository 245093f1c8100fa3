"""Where metrics and samples go: the protocol, and a list of sinks that acts as one."""

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol, runtime_checkable

from hybridrl.core.plain_text import described
from hybridrl.types import RunInfo, Sample

log = logging.getLogger(__name__)


class Sink(Protocol):
    """One destination. Calls come in the order start, any number of log and samples, close.

    A run that goes back to a checkpoint calls start again, with the step that it goes on from.
    """

    def start(self, info: RunInfo) -> None: ...

    def log(self, metrics: Mapping[str, float]) -> None:
        """Take one flat row; it holds "train/step"."""

    def samples(self, rows: Sequence[Sample]) -> None:
        """Take the kept rollouts of one evaluation, all of one step."""

    def close(self, exit_code: int) -> None:
        """End the run; 0: it finished."""


@runtime_checkable
class ResumableSink(Sink, Protocol):
    """A sink that continues the same run of its tracker after a resume, by the id of that run."""

    name: str  # of the tracker; a checkpoint holds the id under it

    def state_dict(self) -> str | None:
        """The id; None: the tracker has no run yet."""

    def load_state_dict(self, state: str | None) -> None:
        """Continue the run of that id. Called before start."""


class Sinks:
    """Sinks that act as one. A required sink's errors propagate; an optional one that fails is
    switched off with a warning.

    Each sink receives a row of its own, so that what one of them does to it does not reach the
    others.

    Example: Sinks(required=[JsonlSink()], optional={"the console": ConsoleSink()})

    Args:
        optional: the sinks by the names that warnings call them.
    """

    def __init__(
        self, *, required: Sequence[Sink], optional: Mapping[str, Sink] | None = None
    ) -> None:
        self._required = list(required)
        self._optional = dict(optional or {})
        every = (*self._required, *self._optional.values())
        self._resumable = [sink for sink in every if isinstance(sink, ResumableSink)]
        self._ids: dict[str, str] = {}  # of the trackers, as the checkpoint holds them

    def state_dict(self) -> dict[str, str]:
        """The ids of the trackers' runs by the trackers' names, for the checkpoint.

        The id of a tracker that this run does not use, or whose sink has failed, is retained: a
        later resume with it continues the same run.
        """
        ids = dict(self._ids)
        for sink in self._resumable:
            try:
                run_id = sink.state_dict()
            except Exception as error:  # of a user's class: the checkpoint is worth more
                log.warning("%s has no id for the checkpoint: %s", sink.name, described(error))
                continue
            if isinstance(run_id, str):
                ids[sink.name] = run_id
        return ids

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Continue the runs of these ids. Call it before `start`."""
        self._ids = dict(state)

        def load(sink: Sink) -> None:
            if isinstance(sink, ResumableSink):
                sink.load_state_dict(state.get(sink.name))

        self._each(load)

    def start(self, info: RunInfo) -> None:
        self._each(lambda sink: sink.start(info))

    def log(self, metrics: Mapping[str, float]) -> None:
        self._each(lambda sink: sink.log(dict(metrics)))

    def samples(self, rows: Sequence[Sample]) -> None:
        self._each(lambda sink: sink.samples(tuple(rows)))

    def close(self, exit_code: int) -> None:
        """Close every sink, also when one fails to."""
        with ExitStack() as stack:
            for sink in self._required:
                stack.callback(sink.close, exit_code)
            self._each_optional(lambda sink: sink.close(exit_code))

    def _each(self, act: Callable[[Sink], None]) -> None:
        for sink in self._required:
            act(sink)
        self._each_optional(act)

    def _each_optional(self, act: Callable[[Sink], None]) -> None:
        for name, sink in list(self._optional.items()):
            try:
                act(sink)
            except (Exception, SystemExit) as error:
                if isinstance(error, SystemExit) and error.code == signal.SIGTERM:
                    raise  # from Ray's handler of that signal, and not from the sink
                del self._optional[name]
                log.warning(
                    "%s failed and is off for the rest of the run: %s",
                    name,
                    described(error),
                    exc_info=True,
                )
