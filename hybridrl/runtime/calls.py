"""Pending calls to workers, and waiting for them: every wait has a deadline, and a call that fails
gives a typed error.
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
    """Counters of this process."""

    materialized_bytes = 0
    """Bytes of per-token data that this process fetched: 0 in a healthy controller."""
    calls = 0
    """Calls to workers that this process started."""


Reference: TypeAlias = ray.ObjectRef
"""A reference to a value in the object store. The controller passes references on without fetching
the values.
"""
WATCH_S = 1.0
"""Seconds between two calls of `watch` during a wait."""
WAIT_SHARE = 1 / 32
"""One `ray.wait` returns when this share of the pending calls has finished, or after WATCH_S. It
examines all of them, so waiting for one call at a time would take quadratic time.
"""
DELIVERY_S = 5.0
"""The least time for fetching a result that has arrived, even if the deadline of its call has
passed. Results that the caller fetches are small.
"""
SETTINGS = {
    "start_s": ("free_port", "configure", "connect_engines", "begin_job"),
    "rollout_s": ("generate",),
    "score_s": ("follow",),
    "reward_s": ("rank", "samples"),
    "learn_s": ("learn", "evaluate", "release", "acquire", "logprob_gaps", "shared_scores"),
    "sync_s": (
        *("hold", "pack_weights", "send_weights", "load_weights", "leave_channel"),
        *("abort", "sleep", "wake_up", "begin_job"),
    ),
    "save_s": (
        *("state_bytes", "save_state", "load_state", "keep_start", "begin_save", "saved_file"),
        "export",
    ),
}
"""The settings of `deadlines`, each with the calls that it limits. Calls whose setting also depends
on the worker are not listed.
"""
OBJECT_STORE = "the object store"
"""The name that an error has in place of a worker's if no worker failed, so that none is replaced.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """One call under way. `ref` may be passed to other calls without waiting."""

    ref: ray.ObjectRef
    worker: str
    call: str
    deadline_s: float
    epoch: int = 0  # number of earlier workers with the name of the one that was called

    @property
    def incarnation(self) -> tuple[str, int]:
        """Identifies the worker that was called among all that have had its name."""
        return self.worker, self.epoch

    def result(self) -> Any:
        """Wait for the result.

        Raises:
            WorkerTimeout, WorkerDied, WorkerError, HybridRLError: as `gather`.
        """
        return gather([self])[0]


class ResultStore(Protocol):
    """The place where the results of calls arrive."""

    def check(self) -> None:
        """Raises:
        ClusterLost: no result can arrive any more.
        """

    def wait(self, refs: Sequence[Reference], count: int, timeout_s: float) -> list[Reference]:
        """Wait until `count` of `refs` have arrived or `timeout_s` has passed; returns all that
        have arrived.
        """

    def fetch(self, pending: Pending, timeout_s: float) -> Any:
        """The result of a call that has ended.

        Raises:
            WorkerTimeout, WorkerDied, WorkerError: the call failed; names the worker and the call.
            HybridRLError: the worker raised it on purpose.
        """


def watch_nothing() -> None:
    """The default `watch`."""


def gather(
    pending: Sequence[Pending], watch: Callable[[], Pending | None] = watch_nothing
) -> list[Any]:
    """Wait for all results and return them in order. The first failure ends the wait at once, even
    if other calls are under way.

    Args:
        watch: as in `settle`.

    Raises:
        WorkerTimeout, WorkerDied, WorkerError: a call failed; names the worker and the call.
        HybridRLError: a worker raised it on purpose.
        ClusterLost: Ray's head is gone.
    """
    results, failures = settle(pending, watch)
    if failures:
        raise failures[0]
    return results


class RayStore:
    """The ResultStore of a run: Ray's object store."""

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
                f"a value that {pending.worker} returned or needed in {pending.call} was lost "
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
    """Wait for results until enough have arrived or a worker fails.

    consumes calls / produces results in order, and the errors of failed workers / waits for
    `count` results / unblocked by the failure of a worker, by `watch`, and by the deadline. The
    deadline is the longest among the calls, and limits the time since the last answer, because one
    worker may answer many calls one after the other.

    Args:
        watch: called every WATCH_S; returns a call that is overdue, whose worker then counts as
            failed, or None.
        count: how many results to wait for, at least; None: all.
        store: where the results arrive.
        clock: returns seconds, which never decrease.

    Returns:
        For each call its result, the error of its worker if that failed, or None if the call is
        still under way; and one error per failed worker.

    Raises:
        HybridRLError: a worker raised it on purpose.
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
        if waiting and clock() >= next_watch:  # not after each answer, since watch pings engines
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
    """Wait until all calls have ended or failed, at most as long as the longest deadline.

    Args:
        watch: as in `settle`; the wait ends for all calls to the worker of the call it returns.

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
        watch: called every WATCH_S; an exception from it ends the wait.

    Returns:
        Empty, or one timeout per call if none has ended.

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
    """The names of the settings that may decide the deadline of a call, for an error message."""
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
    """The references in `refs` whose calls have ended, with a result or an error. Does not wait."""
    return set(ray.wait(list(refs), num_returns=len(refs), timeout=0)[0]) if refs else set()


def succeeded(pending: Pending) -> bool:
    """Whether the call has ended with a result. Does not wait for the call, only for fetching a
    result that has arrived.
    """
    if not is_done(pending):
        return False
    try:
        RAY_STORE.fetch(pending, DELIVERY_S)
    except HybridRLError:
        return False
    return True


def _raised_by_worker(pending: Pending, error: RayTaskError) -> HybridRLError:
    """The worker's own HybridRLError, or a WorkerError that describes any other exception."""
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
