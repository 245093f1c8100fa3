"""Which engines serve, and how those that fail are replaced."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hybridrl.core.errors import FleetExhausted, HybridRLError, WorkerError
from hybridrl.runtime.actor_group import ActorGroup
from hybridrl.runtime.calls import Pending, await_first, is_done, outcomes, watch_nothing
from hybridrl.settings.run import DeadlineConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ping:
    """A ping to an engine, and when it was sent."""

    call: Pending
    sent: float  # seconds of time.monotonic


class Fleet:
    """The engines of a rollout group, each in one of three states:

        serving --failed--> joining --ready, holds the newest weights--> serving
        serving --failed, and cluster.max_restarts is used up--> gone

    consumes errors and answers to pings / produces the set of serving engines / waits only while no
    engine serves, for those that are joining / unblocked by the first of them that is ready.

    Args:
        closed_by: the setting that prevents the replacement of engines; None: they are replaced.
        load_latest: starts loading the newest weights into an engine; returns None if the engine
            has read them from disk, or `joined` sends them.

    Attributes:
        joined: called after engines have joined, before any of them is used.
    """

    def __init__(
        self,
        group: ActorGroup,
        deadlines: DeadlineConfig,
        closed_by: str | None,
        load_latest: Callable[[int], Pending | None],
    ) -> None:
        self.group = group
        self.deadlines = deadlines
        self.closed_by = closed_by
        self.load_latest = load_latest
        self.serving = set(range(group.size))
        self.joining: dict[int, Pending] = {}  # replaced engines -> the first ping of the new one
        self.pings: dict[int, Ping] = {}
        self.joined: Callable[[], None] = do_nothing

    def silent(self) -> Pending | None:
        """Ping the engines without a pending ping. Engines also answer while they sample.

        Returns:
            A ping that an engine has not answered within deadlines.heartbeat_s; None: no ping is
            overdue.
        """
        limit = self.deadlines.heartbeat_s
        now = time.monotonic()
        for engine in self.serving:
            ping = self.pings.get(engine)
            if ping is None or ping.call.epoch != self.group.epochs[engine] or is_done(ping.call):
                call = self.group.submit(engine, "ping", deadline_s=limit)
                self.pings[engine] = Ping(call, now)
            elif now - ping.sent > limit:
                return ping.call
        return None

    def lose(self, error: WorkerError) -> None:
        """Go on without the engine that failed, and start another in its place if
        cluster.max_restarts allows it.

        Raises:
            FleetExhausted: it cannot be replaced, and no other engine serves or is joining; or
                `closed_by` is set.
        """
        if self.closed_by is not None:
            raise FleetExhausted(
                f"{error}; with {self.closed_by} a lost engine is not replaced, because the "
                "learner may hold its GPU"
            )
        try:
            engine = self.group.replace(error)
        except FleetExhausted as exhausted:
            remaining = self.serving - {self.group.names.index(error.worker)}
            if not (remaining or self.joining):
                raise
            if remaining != self.serving:
                num_engines = len(remaining) + len(self.joining)
                log.warning("%s; continuing with %d engines", exhausted, num_engines)
            self.serving = remaining
            return
        if engine is not None:
            self.serving.discard(engine)
            self.joining[engine] = self.group.submit(
                engine, "ping", deadline_s=self.deadlines.start_s
            )

    def lose_all(self, errors: Sequence[WorkerError]) -> None:
        """`lose` for several engines."""
        for error in errors:
            log.warning("%s; starting another worker in its place", error)
            self.lose(error)

    def lose_failed(self, calls: Sequence[Pending]) -> None:
        """Wait for calls, and replace the engines whose calls failed."""
        self.lose_all(failures(calls))

    def admit(self, watch: Callable[[], None] = watch_nothing) -> None:
        """Let the joining engines serve that are ready, once they have acknowledged the newest
        weights. If no engine serves, wait for the first one.

        Args:
            watch: as in `await_first`.

        Raises:
            FleetExhausted: as in `lose`.
        """
        before = set(self.serving)
        self._admit_ready(watch)
        if self.serving - before:
            self.joined()

    def _admit_ready(self, watch: Callable[[], None]) -> None:
        while self.joining:
            if not self.serving and (late := await_first(list(self.joining.values()), watch)):
                self.joining = {}
                self.lose_all(late)
                continue
            for engine, ping in list(self.joining.items()):
                if not is_done(ping):
                    continue
                del self.joining[engine]
                errors = failures([ping])
                if not errors and (load := self.load_latest(engine)) is not None:
                    errors = failures([load])
                if not errors:
                    self.serving.add(engine)
                    log.warning("%s serves again", self.group.names[engine])
                self.lose_all(errors)
            if self.serving:
                return


def do_nothing() -> None:
    """The default of Fleet.joined."""


def failures(
    calls: Sequence[Pending], watch: Callable[[], Pending | None] = watch_nothing
) -> list[WorkerError]:
    """Wait for all calls and return the errors of those that failed. An error that an engine raised
    on purpose, e.g. because it refused weights, becomes a WorkerError.
    """
    errors = []
    for call, outcome in zip(calls, outcomes(calls, watch), strict=True):
        if isinstance(outcome, WorkerError):
            errors.append(outcome)
        elif isinstance(outcome, HybridRLError):
            errors.append(WorkerError(call.worker, call.call, str(outcome), call.epoch))
    return errors
