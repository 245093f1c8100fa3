"""Reward functions in child processes that can be killed, one by one, at a deadline.

The sequences go out as one task per child. When a task hangs, crashes, raises or returns a wrong length, its
sequences are called again one at a time, each with the deadline, so that only the culprits fail. Once more than
`max_timeouts` of the batch have hung, or `budget_s` has passed, the rest is not run any more and counts as timed out too: a
function that always hangs costs about (1 + max_timeouts * N / processes) deadlines, not N.

    pool.call("score", {"completions": ["a", "b"]})  ->  [1.0, Failure(kind=FailureKind.timeout, text="...")]
"""

import math
import os
import signal
import sys
import time
import types
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import TYPE_CHECKING, Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from hybridrl.errors import ConfigError
from hybridrl.redact import without_secrets
from hybridrl.rewards import child
from hybridrl.rewards.child import Raised, RewardCall

if TYPE_CHECKING:  # children import this module, and must not pay for Hydra
    from hybridrl.config import RewardConfig

LOAD_S = 120.0  # for a child to start and import what the functions need


class FailureKind(StrEnum):
    timeout = "timeout"  # killed at reward.timeout_s
    died = "died"  # its process ended
    raised = "raised"
    invalid = "invalid"  # returned something that is not one finite number per sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why one sequence has no value."""

    kind: FailureKind
    text: str


Outcome = float | Failure


class RewardPool:
    """`processes` children, each with every function loaded; a child that dies is replaced.

    Args:
        calls: reward name -> function and options.
        processes: number of children.
        timeout_s: deadline of one task, be it all sequences of a child or a single one.
        max_timeouts: share of a batch, in [0, 1].
        budget_s: of a call, after which no further task is begun.

    Raises:
        ConfigError: a function cannot be loaded.
    """

    def __init__(
        self,
        calls: Mapping[str, RewardCall],
        *,
        processes: int,
        timeout_s: float,
        max_timeouts: float,
        budget_s: float = math.inf,
    ) -> None:
        self._calls, self._processes, self._timeout_s, self._max_timeouts = (
            dict(calls),
            processes,
            timeout_s,
            max_timeouts,
        )
        self._budget_s = budget_s
        self._pool = self._fresh()
        try:
            self._accepted = {name: self._load(name) for name in calls}
        except ConfigError:
            self.close()
            raise

    def call(self, name: str, columns: Mapping[str, list[Any]]) -> list[Outcome]:
        """One outcome per sequence, for lists of length N >= 1; passes only the columns that the function takes."""
        num_sequences, end = len(columns["completions"]), time.monotonic() + self._budget_s
        accepted = self._accepted[name]
        passed = {k: v for k, v in columns.items() if accepted is None or k in accepted}
        size = -(-num_sequences // self._processes)
        parts = [range(i, min(i + size, num_sequences)) for i in range(0, num_sequences, size)]
        outcomes: dict[int, Outcome] = {}
        retried: list[int] = []
        for part, answer in zip(parts, self._answers(name, passed, parts), strict=True):
            if isinstance(answer, Failure) and len(part) > 1:
                retried += part
            else:
                outcomes |= _spread(part, answer)
        outcomes |= self._alone(
            name, passed, retried, most=self._max_timeouts * num_sequences, end=end
        )
        return [outcomes[i] for i in range(num_sequences)]

    def close(self) -> None:
        """Kill the children, and all that they started."""
        self._pool.stop()
        self._pool.join()

    def _alone(
        self, name: str, columns: dict[str, list[Any]], retried: list[int], most: float, end: float
    ) -> dict[int, Outcome]:
        """One call a sequence, as many at once as there are children, until more than `most` have timed out or time is up."""
        outcomes: dict[int, Outcome] = {}
        told = f"not run: more than {self._max_timeouts:.0%} of the batch had timed out, or {self._budget_s:g} s were over"
        skipped = Failure(kind=FailureKind.timeout, text=told)
        for start in range(0, len(retried), self._processes):
            parts = [range(i, i + 1) for i in retried[start : start + self._processes]]
            hung = sum(
                isinstance(o, Failure) and o.kind is FailureKind.timeout for o in outcomes.values()
            )
            answers = (
                self._answers(name, columns, parts)
                if hung <= most and time.monotonic() < end
                else [skipped] * len(parts)
            )
            for part, answer in zip(parts, answers, strict=True):
                outcomes |= _spread(part, answer)
        return outcomes

    def _answers(
        self, name: str, columns: dict[str, list[Any]], parts: list[range]
    ) -> list[list[Outcome] | Failure]:
        answers = [
            self._wait(future) for future in [self._send(name, columns, part) for part in parts]
        ]
        for i, answer in enumerate(answers):
            if (
                answer is None
            ):  # the pool broke under it, by another's fault perhaps: once more, alone
                answers[i] = self._wait(self._send(name, columns, parts[i]))
        died = Failure(
            kind=FailureKind.died, text="the process ended before it took the call, twice"
        )
        return [died if answer is None else answer for answer in answers]

    def _send(self, name: str, columns: dict[str, list[Any]], part: range) -> ProcessFuture:
        keywords = {k: v[part.start : part.stop] for k, v in columns.items()}
        arguments = (name, len(part), keywords)
        try:
            return self._pool.schedule(child.call, arguments, timeout=self._timeout_s)
        except (
            RuntimeError
        ):  # pebble gives up when a child dies between calls, e.g. for lack of memory
            self.close()
            self._pool = self._fresh()
            return self._pool.schedule(child.call, arguments, timeout=self._timeout_s)

    def _wait(self, future: ProcessFuture) -> list[Outcome] | Failure | None:
        """What the call came to; None: the pool broke and does not say which call did it."""
        try:
            result = future.result()
        except TimeoutError:
            return Failure(
                kind=FailureKind.timeout,
                text=f"no answer within reward.timeout_s={self._timeout_s:g}",
            )
        except ProcessExpired as error:
            return Failure(
                kind=FailureKind.died, text=f"the process ended with exit code {error.exitcode}"
            )
        except BrokenProcessPool:
            return None
        if isinstance(result, Raised):
            return Failure(
                kind=FailureKind.invalid if result.wrong_result else FailureKind.raised,
                text=result.text,
            )
        return [
            Failure(kind=FailureKind.invalid, text=value) if isinstance(value, str) else value
            for value in result
        ]

    def _load(self, name: str) -> frozenset[str] | None:
        field = f"reward.functions.{name}.function={self._calls[name].function}"
        try:
            accepted = self._pool.schedule(child.loaded, (name,)).result(timeout=LOAD_S)
        except TimeoutError as error:
            raise ConfigError(
                f"{field}: a process with all reward functions must load within {LOAD_S:g} s; import less"
            ) from error
        except (ProcessExpired, RuntimeError) as error:
            raise ConfigError(
                f"{field}: loading the reward functions ended their process; run the file by itself"
            ) from error
        if isinstance(accepted, str):
            raise ConfigError(accepted)
        return accepted

    def _fresh(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self._processes,
            initializer=child.start,
            initargs=(self._calls,),
            context=_BareContext(),
        )


def reward_calls(config: "RewardConfig") -> dict[str, RewardCall]:
    """`reward.functions` as the pool takes it."""
    return {
        name: RewardCall(function=f.function, options=dict(f.options))
        for name, f in config.functions.items()
    }


def check_rewards(config: "RewardConfig") -> None:
    """Load every configured function once, in a child, before any worker starts.

    Raises:
        ConfigError: one sentence on the first that cannot be loaded.
    """
    if config.functions:
        RewardPool(
            reward_calls(config),
            processes=1,
            timeout_s=config.timeout_s,
            max_timeouts=config.max_error_rate,
        ).close()


def _spread(part: range, answer: list[Outcome] | Failure) -> dict[int, Outcome]:
    return (
        dict.fromkeys(part, answer)
        if isinstance(answer, Failure)
        else dict(zip(part, answer, strict=True))
    )


class _BareProcess(SpawnProcess):
    """A spawned process that inherits no secret variable and does not run the parent's main script again, which may import torch or ray.

    It ends together with all that it started, be it killed or dead by itself; what left its session on purpose excepted.
    """

    _swept = False

    @staticmethod
    def _Popen(process: SpawnProcess) -> object:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")  # spawn finds no file to run in it
        try:
            with without_secrets():
                return SpawnProcess._Popen(process)
        finally:
            sys.modules["__main__"] = main

    def terminate(self) -> None:
        """SIGKILL at once: a late child has nothing to tidy up."""
        self._sweep()
        self.kill()  # where it has no session of its own yet

    def is_alive(self) -> bool:
        alive = super().is_alive()
        if not alive and not self._swept:  # once: its number may belong to another one day
            self._sweep()
        return alive

    def _sweep(self) -> None:
        self._swept = True
        if self.pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


class _BareContext(SpawnContext):
    Process = _BareProcess
