"""A call to a worker that is under way, and how to wait for it: with a deadline, ending in a typed error."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from hybridrl.errors import HybridRLError, WorkerDied, WorkerError, WorkerTimeout
from hybridrl.runtime.host import NotBuilt
from hybridrl.types import per_token_bytes


class Meter:
    """Bytes of per-token data that this process fetched: 0 in a healthy controller."""

    materialized_bytes = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """One call under way. `ref` may be handed to other calls without waiting."""

    ref: ray.ObjectRef
    worker: str
    call: str
    deadline_s: float

    def result(self) -> Any:
        return gather([self])[0]


def gather(pending: Sequence[Pending]) -> list[Any]:
    """Results in order. The first failure ends the wait at once, whatever else still runs.

    Raises:
        WorkerTimeout, WorkerDied, WorkerError: naming the worker and the call; or the worker's own HybridRLError.
    """
    started, waiting = time.monotonic(), {p.ref: p for p in pending}
    values: dict[ray.ObjectRef, Any] = {}
    while waiting:
        deadline_s = max(p.deadline_s for p in waiting.values())
        left = deadline_s - (time.monotonic() - started)
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=max(left, 0.001))
        if not ready:
            late = next(iter(waiting.values()))
            reason = f"no answer within {deadline_s:g} s; raise the matching deadlines.* if it only needed longer"
            raise WorkerTimeout(late.worker, late.call, reason)
        ready = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)[0] or ready  # all at once: a wait for each costs n^2
        for ref in ready:
            values[ref] = _fetch(waiting.pop(ref))
    return [values[p.ref] for p in pending]


def first_done(pending: Sequence[Pending], count: int) -> list[bool]:
    """Wait until `count` of the calls have ended, in whatever way; which these are, at most `count`, the first in order.

    Raises:
        WorkerTimeout: fewer ended within the longest deadline.
    """
    deadline_s = max(p.deadline_s for p in pending)
    ready, late = ray.wait([p.ref for p in pending], num_returns=count, timeout=deadline_s)
    if len(ready) < count:
        slow = next(p for p in pending if p.ref == late[0])
        raise WorkerTimeout(slow.worker, slow.call, f"only {len(ready)} of {count} answers within {deadline_s:g} s")
    return [p.ref in set(ready) for p in pending]


def is_done(pending: Pending) -> bool:
    """Whether the call has ended, in whatever way; does not wait."""
    return bool(ray.wait([pending.ref], timeout=0)[0])


def _fetch(pending: Pending) -> Any:
    try:
        value = ray.get(pending.ref, timeout=pending.deadline_s)
    except GetTimeoutError as error:
        raise WorkerTimeout(pending.worker, pending.call, f"its result was not delivered within {pending.deadline_s:g} s") from error
    except RayActorError as error:
        raise WorkerDied(pending.worker, pending.call, f"{_last_line(error)}; see {_log(pending)}") from error
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, HybridRLError):
            raise cause from error
        if isinstance(cause, NotBuilt):
            raise WorkerError(pending.worker, "its constructor", f"{cause}; see {_log(pending)}") from error
        raise WorkerError(pending.worker, pending.call, f"{type(cause).__name__}: {cause}") from error
    except RayError as error:
        raise WorkerError(pending.worker, pending.call, _last_line(error)) from error
    Meter.materialized_bytes += per_token_bytes(value)
    return value


def _last_line(error: RayError) -> str:
    """Ray's first lines are the same for every death; the last one says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _log(pending: Pending) -> str:
    return f"logs/{pending.worker.replace('/', '-')}.log"
