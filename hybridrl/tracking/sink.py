"""The protocol of sinks, which record metrics and samples, and a list of sinks that acts as one."""

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol, runtime_checkable

from hybridrl.core.plain_text import described
from hybridrl.types import RunInfo, Sample

log = logging.getLogger(__name__)


class Sink(Protocol):
    """One destination of metrics and samples. The order of calls is start, any number of log and
    samples, close.

    When a run goes back to a checkpoint, start is called again, with the step to continue from.
    """

    def start(self, info: RunInfo) -> None:
        """Begin a run, or continue one after step info.first_step."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """Record one flat row of metrics, which includes "train/step"."""

    def samples(self, rows: Sequence[Sample]) -> None:
        """Record the samples of one evaluation, all of the same step."""

    def close(self, exit_code: int) -> None:
        """End the run; an exit code of 0 means that it finished."""


@runtime_checkable
class ResumableSink(Sink, Protocol):
    """A sink that continues the same run of its tracker after a resume, by the id of that run."""

    name: str  # of the tracker; the checkpoint stores the id under this name

    def state_dict(self) -> str | None:
        """The id; None: the tracker has no run yet."""

    def load_state_dict(self, state: str | None) -> None:
        """Continue the run of that id. Called before start."""


@runtime_checkable
class RolloutSink(Sink, Protocol):
    """A sink that also receives responses of training steps."""

    def rollouts(self, rows: Sequence[Sample]) -> None:
        """Record some responses of one step; called every tracking.rollouts_every steps."""


class Sinks:
    """Several sinks that act as one.

    An error of a required sink is raised; an optional sink that fails is switched off with a
    warning.

    Each sink receives its own copy of a row, so that a sink that changes it does not affect the
    others.

    Example: Sinks(required=[JsonlSink()], optional={"the console": ConsoleSink()})

    Args:
        optional: the sinks by their names in warnings.
    """

    def __init__(
        self, *, required: Sequence[Sink], optional: Mapping[str, Sink] | None = None
    ) -> None:
        self._required = list(required)
        self._optional = dict(optional or {})
        self._given = dict(self._optional)  # including sinks that have failed
        self._ids: dict[str, str] = {}  # the ids of the trackers' runs, by _key

    def state_dict(self) -> dict[str, str]:
        """The ids of the trackers' runs for the checkpoint, by the name of the tracker, or, if
        several sinks use one tracker, by the setting of the sink.

        Ids of trackers that this run does not use, or whose sinks have failed, are kept, so that a
        later resume with these trackers continues the same runs.
        """
        self._each(self._note_id)
        return dict(self._ids)

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Continue the runs of these ids. Call it before `start`."""
        self._ids = dict(state)
        self._each(self._restore_id)

    def _note_id(self, sink: Sink) -> None:
        if isinstance(sink, ResumableSink) and (run_id := sink.state_dict()) is not None:
            self._ids[self._key(sink)] = str(run_id)

    def _restore_id(self, sink: Sink) -> None:
        if isinstance(sink, ResumableSink):
            sink.load_state_dict(self._ids.get(self._key(sink)))

    def _key(self, sink: ResumableSink) -> str:
        """The key under which the id of a sink's run is stored."""
        same = {
            name: other
            for name, other in self._given.items()
            if isinstance(other, ResumableSink) and other.name == sink.name
        }
        named = [name for name, other in same.items() if other is sink]
        return named[0] if len(same) > 1 and named else sink.name

    def start(self, info: RunInfo) -> None:
        self._each(lambda sink: sink.start(info))
        self._each(self._note_id)  # so that the id is known if the sink fails later

    def log(self, metrics: Mapping[str, float]) -> None:
        self._each(lambda sink: sink.log(dict(metrics)))

    def samples(self, rows: Sequence[Sample]) -> None:
        self._each(lambda sink: sink.samples(tuple(rows)))

    def rollouts(self, rows: Sequence[Sample]) -> None:
        """Pass responses of a training step to the sinks that record them."""

        def give(sink: Sink) -> None:
            if isinstance(sink, RolloutSink):
                sink.rollouts(tuple(rows))

        self._each(give)

    def close(self, exit_code: int) -> None:
        """Close every sink, even if closing another one fails."""
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
                    raise  # raised by Ray's handler of that signal, not by the sink
                del self._optional[name]
                log.warning(
                    "%s failed and is off for the rest of the run: %s",
                    name,
                    described(error),
                    exc_info=True,
                )


def as_code(text: str) -> str:
    """The text as a code block of Markdown: each line indented by four spaces."""
    return "\n".join(f"    {line}" for line in text.splitlines())
