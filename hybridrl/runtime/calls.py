"""A call to a worker that is under way, and how to wait for it: with a deadline, and with a typed
error if it fails.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from hybridrl.core.errors import HybridRLError, WorkerDied, WorkerError, WorkerTimeout
from hybridrl.runtime.head_node import HEAD, check_own_node
from hybridrl.runtime.host import NotBuilt
from hybridrl.runtime.ray_internals import cause_of, what_happened
from hybridrl.types import per_token_bytes


class Meter:
    """Counts of this process."""

    materialized_bytes = 0
    """Bytes of per-token data that it fetched: 0 in a healthy controller."""
    calls = 0
    """Calls to workers that it started."""


Reference: TypeAlias = ray.ObjectRef
"""Names a value in the object store; the controller passes references on without fetching the
values.
"""
WATCH_S = 1.0
"""Between two calls of `watch` while waiting."""
WAIT_SHARE = 1 / 32
"""One `ray.wait` returns when this part of the open calls has finished, or after WATCH_S. It
examines all of them, so that waiting for each call singly would cost quadratic time.
"""
DELIVERY_S = 5.0
"""For fetching a result that is there when the time of its call is used up: what comes to the
caller is small.
"""
SETTINGS = {
    "start_s": ("free_port", "configure", "connect_engines"),
    "rollout_s": ("generate",),
    "score_s": ("follow",),
    "reward_s": ("rank", "samples"),
    "learn_s": ("learn", "evaluate", "release", "acquire", "logprob_gaps", "shared_scores"),
    "sync_s": (
        *("hold", "pack_weights", "send_weights", "load_weights", "leave_channel"),
        *("abort", "sleep", "wake_up"),
    ),
    "save_s": (
        *("state_bytes", "save_state", "load_state", "keep_start", "begin_save", "saved_file"),
        "export",
    ),
}
"""Of deadlines: the calls whose deadline they are, where it depends on the call alone."""
OBJECT_STORE = "the object store"
"""Named as the failed worker where no worker is at fault, so that none is replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """One call under way. `ref` may be handed to other calls without waiting."""

    ref: ray.ObjectRef
    worker: str
    call: str
    deadline_s: float
    epoch: int = 0  # how many workers of that name there were before the one that was called

    @property
    def incarnation(self) -> tuple[str, int]:
        """The worker that was called, as distinct from others of its name before and after it."""
        return self.worker, self.epoch

    def result(self) -> Any:
        """Wait for the result.

        Raises:
            WorkerTimeout, WorkerDied, WorkerError, HybridRLError: as `gather`.
        """
        return gather([self])[0]


class ResultStore(Protocol):
    """Where the results of calls arrive."""

    def check(self) -> None:
        """Raises:
        ClusterLost: no result can arrive any more.
        """

    def wait(self, refs: Sequence[Reference], count: int, timeout_s: float) -> list[Reference]:
        """All of `refs` that have arrived, once `count` have or `timeout_s` has passed."""

    def fetch(self, pending: Pending, timeout_s: float) -> Any:
        """A result that has arrived.

        Raises:
            WorkerTimeout, WorkerDied, WorkerError: naming the worker and the call.
            HybridRLError: what the worker raised on purpose.
        """


def watch_nothing() -> None:
    """The default `watch`."""


def gather(
    pending: Sequence[Pending], watch: Callable[[], Pending | None] = watch_nothing
) -> list[Any]:
    """Results in order. The first failure ends the wait at once, whatever else is under way.

    Args:
        watch: as in `settle`.

    Raises:
        WorkerTimeout, WorkerDied, WorkerError: naming the worker and the call.
        HybridRLError: what a worker raised on purpose.
        ClusterLost: Ray's head is gone.
    """
    results, failures = settle(pending, watch)
    if failures:
        raise failures[0]
    return results


class RayStore:
    """Ray's object store, as this process reaches it."""

    def check(self) -> None:
        HEAD.check()

    def wait(self, refs: Sequence[Reference], count: int, timeout_s: float) -> list[Reference]:
        first, others = ray.wait(list(refs), num_returns=count, timeout=timeout_s)
        more = ray.wait(others, num_returns=len(others), timeout=0)[0] if first and others else []
        return [*first, *more]

    def fetch(self, pending: Pending, timeout_s: float) -> Any:
        try:
            value = ray.get(pending.ref, timeout=max(timeout_s, DELIVERY_S))
        except GetTimeoutError as error:
            raise WorkerTimeout(
                pending.worker,
                pending.call,
                f"its result was not delivered within {pending.deadline_s:g} s",
                pending.epoch,
            ) from error
        except ObjectLostError as error:
            # A value was lost, not the worker that needed it; restarting that worker would not
            # help.
            reason = (
                f"what {pending.worker} was to give or to be given in {pending.call} is gone "
                "with its node"
            )
            raise WorkerDied(OBJECT_STORE, "keeping values", reason) from error
        except RayActorError as error:
            if not HEAD.is_silent:
                check_own_node()
            reason = f"{what_happened(error)}; see {_log(pending)}"
            raise WorkerDied(pending.worker, pending.call, reason, pending.epoch) from error
        except RayTaskError as error:
            raise _raised_by_worker(pending, error) from error
        except RayError as error:
            raise WorkerError(
                pending.worker, pending.call, what_happened(error), pending.epoch
            ) from error
        Meter.materialized_bytes += per_token_bytes(value)
        return value


RAY_STORE = RayStore()


def settle(
    pending: Sequence[Pending],
    watch: Callable[[], Pending | None] = watch_nothing,
    count: int | None = None,
    *,
    store: ResultStore = RAY_STORE,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[list[Any], list[WorkerError]]:
    """Wait for results until enough are there or a worker fails.

    consumes calls / produces results in order, and the errors of failed workers / waits for
    `count` results / unblocked by the failure of a worker, by `watch`, and by the deadline: it
    bounds the time since the last answer, because one worker may have many calls to answer one
    after the other, and is the longest among the calls.

    Args:
        watch: called every WATCH_S; returns a call that should have been answered by now, whose
            worker then counts as failed, or None.
        count: results to wait for, at least; None: all.
        store: where the results arrive.
        clock: seconds, never going back.

    Returns:
        For each call its result, the error of its worker if that failed, or None if it is still
        under way; and one error per failed worker.

    Raises:
        HybridRLError: what a worker raised on purpose.
        ClusterLost: Ray's head is gone.
    """
    last_answer = clock()
    next_watch = last_answer + WATCH_S
    waiting = {p.ref: p for p in pending}
    deadline_s = max((p.deadline_s for p in pending), default=0.0)
    values: dict[Reference, Any] = {}
    failures: dict[tuple[str, int], WorkerError] = {}
    enough = len(waiting) if count is None else count
    while len(values) < enough and not failures:
        store.check()
        time_left = last_answer + deadline_s - clock()
        timeout_s = max(min(time_left, next_watch - clock()), 0.001)
        next_count = max(min(enough - len(values), int(WAIT_SHARE * len(waiting))), 1)
        for ref in store.wait(list(waiting), next_count, timeout_s):
            answered = waiting.pop(ref)
            last_answer = clock()
            try:
                values[ref] = store.fetch(answered, time_left)
            except WorkerError as error:
                values[ref] = error
                failures[answered.incarnation] = error
        if waiting and clock() >= next_watch:  # not after each answer: it pings every engine
            next_watch = clock() + WATCH_S
            if (unanswered := watch()) is not None:
                failures[unanswered.incarnation] = _timeout(unanswered, unanswered.deadline_s)
        if len(values) < enough and clock() >= last_answer + deadline_s:
            failures |= {p.incarnation: _timeout(p, deadline_s) for p in waiting.values()}
    for ref, p in waiting.items():
        values[ref] = failures.get(p.incarnation)
    return [values[p.ref] for p in pending], list(failures.values())


def outcomes(
    pending: Sequence[Pending], watch: Callable[[], Pending | None] = watch_nothing
) -> list[Any]:
    """Wait for all calls, the failed ones too, at most as long as the longest deadline.

    Args:
        watch: as in `settle`; calls to the worker that it names are not waited for any more.

    Returns:
        For each call its result or its HybridRLError, in order.

    Raises:
        ClusterLost: Ray's head is gone.
    """
    limit = max((p.deadline_s for p in pending), default=0.0)
    end = time.monotonic() + limit
    done: set[Reference] = set()
    silent: dict[tuple[str, int], Pending] = {}  # the calls that `watch` returned
    while waiting := [p.ref for p in pending if p.ref not in done and p.incarnation not in silent]:
        RAY_STORE.check()
        timeout_s = max(min(end - time.monotonic(), WATCH_S), 0)
        done |= set(ray.wait(waiting, num_returns=len(waiting), timeout=timeout_s)[0])
        if time.monotonic() >= end:
            break
        if (unanswered := watch()) is not None:
            silent[unanswered.incarnation] = unanswered
    results: list[Any] = []
    for p in pending:
        unanswered = silent.get(p.incarnation)
        try:
            if p.ref in done:
                results.append(RAY_STORE.fetch(p, DELIVERY_S))
            elif unanswered is not None:
                results.append(_timeout(unanswered, unanswered.deadline_s))
            else:
                results.append(_timeout(p, limit))
        except HybridRLError as error:
            results.append(error)
    return results


def await_first(
    pending: Sequence[Pending], watch: Callable[[], None] = watch_nothing
) -> list[WorkerTimeout]:
    """Wait until one of the calls has ended, at most as long as the longest deadline.

    Args:
        watch: called every WATCH_S; what it raises ends the wait.

    Returns:
        Empty, or the errors of all calls if none has ended.

    Raises:
        ClusterLost: Ray's head is gone.
    """
    refs = [p.ref for p in pending]
    limit = max((p.deadline_s for p in pending), default=0.0)
    end = time.monotonic() + limit
    while refs:
        RAY_STORE.check()
        left = end - time.monotonic()
        if ray.wait(refs, num_returns=1, timeout=max(min(left, WATCH_S), 0))[0]:
            break
        if left <= 0:
            return [_timeout(p, limit) for p in pending]
        watch()
    return []


def _timeout(pending: Pending, deadline_s: float) -> WorkerTimeout:
    reason = (
        f"no answer within {deadline_s:g} s; if it only needed longer, raise {_settings(pending)}"
    )
    return WorkerTimeout(pending.worker, pending.call, reason, pending.epoch)


def _settings(pending: Pending) -> str:
    """The setting, or the settings, that decide the deadline of a call."""
    if pending.call == "score":
        names = ["reward_s" if pending.worker.startswith("reward/") else "score_s"]
    elif pending.call == "ping":  # of a worker that starts, or of an engine that serves
        names = ["start_s", "heartbeat_s"]
    else:
        names = [name for name, calls in SETTINGS.items() if pending.call in calls]
    return " or ".join(f"deadlines.{name}" for name in names) or "the deadline of such calls"


def is_done(pending: Pending) -> bool:
    """Whether the call has ended, with a result or an error; does not wait."""
    return bool(ended([pending.ref]))


def ended(refs: Sequence[Reference]) -> set[Reference]:
    """Those of `refs` whose calls have ended, with a result or an error; does not wait."""
    return set(ray.wait(list(refs), num_returns=len(refs), timeout=0)[0]) if refs else set()


def succeeded(pending: Pending) -> bool:
    """Whether the call has ended with a result. Does not wait for the call, but for the delivery of
    a result that is there.
    """
    if not is_done(pending):
        return False
    try:
        RAY_STORE.fetch(pending, DELIVERY_S)
    except HybridRLError:
        return False
    return True


def _raised_by_worker(pending: Pending, error: RayTaskError) -> HybridRLError:
    """The worker's own HybridRLError, or a WorkerError about what it raised."""
    cause = cause_of(error)
    if isinstance(cause, HybridRLError):
        return cause
    if isinstance(cause, NotBuilt):
        reason = f"{cause}; see {_log(pending)}"
        return WorkerError(pending.worker, "its constructor", reason, pending.epoch)
    reason = f"{type(cause).__name__}: {cause}"
    return WorkerError(pending.worker, pending.call, reason, pending.epoch)


def _log(pending: Pending) -> str:
    return f"logs/{pending.worker.replace('/', '-')}.log"
