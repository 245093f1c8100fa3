"""A call to a worker that is under way, and how to wait for it: with a deadline, ending in a typed
error.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from hybridrl.core.errors import HybridRLError, WorkerDied, WorkerError, WorkerTimeout
from hybridrl.runtime.head_node import HEAD, check_own_node
from hybridrl.runtime.host import NotBuilt
from hybridrl.types import per_token_bytes


class Meter:
    """Bytes of per-token data that this process fetched: 0 in a healthy controller."""

    materialized_bytes = 0


Reference = ray.ObjectRef
"""Names a value in the object store; the controller passes references on without fetching the
values.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """One call under way. `ref` may be handed to other calls without waiting."""

    ref: ray.ObjectRef
    worker: str
    call: str
    deadline_s: float
    epoch: int = 0  # how many workers of that name there were before the one that was called

    def result(self) -> Any:
        return gather([self])[0]


def nobody() -> None:
    """Watches nothing."""


def gather(pending: Sequence[Pending], watch: Callable[[], Pending | None] = nobody) -> list[Any]:
    """Results in order. The first failure ends the wait at once, whatever else still runs.

    Args:
        watch: as in `settle`.

    Raises:
        WorkerTimeout, WorkerDied, WorkerError: naming the worker and the call; or the worker's own
            HybridRLError.
    """
    values, lost = settle(pending, watch)
    if lost:
        raise lost[0]
    return values


def settle(
    pending: Sequence[Pending],
    watch: Callable[[], Pending | None] = nobody,
    count: int | None = None,
) -> tuple[list[Any], list[WorkerError]]:
    """(results in order, workers lost). A lost worker ends the wait: its error stands for each of
    its calls, None for what is under way. The deadline, the longest of theirs, is of silence: one
    worker may have many calls to answer, one after the other.

    Args:
        watch: called every WATCH_S; a call that should have been answered by now, or None: its
            worker counts as lost.
        count: results to wait for, at least; None: all.

    Raises:
        HybridRLError: what a worker raised on purpose.
        ClusterLost: Ray's head is gone.
    """
    heard, waiting = time.monotonic(), {p.ref: p for p in pending}
    next_watch = heard + WATCH_S
    deadline_s = max((p.deadline_s for p in pending), default=0.0)
    values: dict[ray.ObjectRef, Any] = {}
    lost: dict[tuple[str, int], WorkerError] = {}
    enough = len(waiting) if count is None else count
    while len(values) < enough and not lost:
        HEAD.check()
        left = heard + deadline_s - time.monotonic()
        for ref in _ready(list(waiting), max(min(left, next_watch - time.monotonic()), 0.001)):
            done, heard = waiting.pop(ref), time.monotonic()
            try:
                values[ref] = _fetch(done, left)
            except WorkerError as error:
                values[ref] = lost[done.worker, done.epoch] = error
        if waiting and time.monotonic() >= next_watch:  # not with each answer: it asks every engine
            next_watch = time.monotonic() + WATCH_S
            if (silent := watch()) is not None:
                lost[silent.worker, silent.epoch] = _late(silent, silent.deadline_s)
        if len(values) < enough and time.monotonic() >= heard + deadline_s:
            lost |= {(p.worker, p.epoch): _late(p, deadline_s) for p in waiting.values()}
    for ref, p in waiting.items():
        values[ref] = lost.get((p.worker, p.epoch))
    return [values[p.ref] for p in pending], list(lost.values())


def outcomes(pending: Sequence[Pending], watch: Callable[[], Pending | None] = nobody) -> list[Any]:
    """Of every call its result or its HybridRLError, in order; none waits longer than the longest
    deadline.

    Args:
        watch: as in `settle`; whose ping is not answered is not waited for.

    Raises:
        ClusterLost: Ray's head is gone.
    """
    limit = max((p.deadline_s for p in pending), default=0.0)
    end, done, silent = time.monotonic() + limit, set(), set()
    while waiting := [
        p.ref for p in pending if p.ref not in done and (p.worker, p.epoch) not in silent
    ]:
        HEAD.check()
        done |= set(
            ray.wait(
                waiting,
                num_returns=len(waiting),
                timeout=max(min(end - time.monotonic(), WATCH_S), 0),
            )[0]
        )
        if time.monotonic() >= end:
            break
        if (ping := watch()) is not None:
            silent.add((ping.worker, ping.epoch))
    found = []
    for p in pending:
        try:
            found.append(_fetch(p, DELIVERY_S) if p.ref in done else _late(p, limit))
        except HybridRLError as error:
            found.append(error)
    return found


WATCH_S = 1.0
DELIVERY_S = 5.0
"""For a result that is there, when the time of its call is used up: what comes to the caller is
small.
"""
OBJECT_STORE = "the object store"
"""In the place of a worker that nobody can replace."""


def _ready(refs: list[ray.ObjectRef], timeout_s: float) -> list[ray.ObjectRef]:
    """All that are there once one is."""
    first, others = ray.wait(refs, num_returns=1, timeout=timeout_s)
    more = ray.wait(others, num_returns=len(others), timeout=0)[0] if first and others else []
    return [*first, *more]


def _late(pending: Pending, deadline_s: float) -> WorkerTimeout:
    reason = (
        f"no answer within {deadline_s:g} s; raise the matching deadlines.* if it only "
        "needed longer"
    )
    return WorkerTimeout(pending.worker, pending.call, reason, pending.epoch)


def is_done(pending: Pending) -> bool:
    """Whether the call has ended, in whatever way; does not wait."""
    return bool(ray.wait([pending.ref], timeout=0)[0])


def succeeded(pending: Pending) -> bool:
    """Whether the call has ended with a result; does not wait for it, but for the delivery of a
    result that is there.
    """
    if not is_done(pending):
        return False
    try:
        _fetch(pending, DELIVERY_S)
    except HybridRLError:
        return False
    return True


def _fetch(pending: Pending, left_s: float) -> Any:
    try:
        value = ray.get(pending.ref, timeout=max(left_s, DELIVERY_S))
    except GetTimeoutError as error:
        raise WorkerTimeout(
            pending.worker,
            pending.call,
            f"its result was not delivered within {pending.deadline_s:g} s",
            pending.epoch,
        ) from error
    except (
        ObjectLostError
    ) as error:  # not the fault of whom it was handed to, who would only be replaced and fail again
        reason = (
            f"what {pending.worker} was to give or to be given in {pending.call} is gone "
            "with its node"
        )
        raise WorkerDied(OBJECT_STORE, "keeping values", reason) from error
    except RayActorError as error:
        if not HEAD.is_silent:
            check_own_node()
        raise WorkerDied(
            pending.worker, pending.call, f"{_last_line(error)}; see {_log(pending)}", pending.epoch
        ) from error
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, HybridRLError):
            raise cause from error
        if isinstance(cause, NotBuilt):
            raise WorkerError(
                pending.worker, "its constructor", f"{cause}; see {_log(pending)}", pending.epoch
            ) from error
        raise WorkerError(
            pending.worker, pending.call, f"{type(cause).__name__}: {cause}", pending.epoch
        ) from error
    except RayError as error:
        raise WorkerError(pending.worker, pending.call, _last_line(error), pending.epoch) from error
    Meter.materialized_bytes += per_token_bytes(value)
    return value


def _last_line(error: RayError) -> str:
    """Ray's first lines are the same for every death; the last one says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _log(pending: Pending) -> str:
    return f"logs/{pending.worker.replace('/', '-')}.log"
