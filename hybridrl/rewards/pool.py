"""Reward functions in child processes, which can be killed one by one at a deadline.

The sequences are sent as one task per child. If a task hangs, crashes, raises or returns a list of
the wrong length, its sequences are sent again one at a time, each with the deadline, so that only
the sequences that cause the failure fail; the first such failure of each function is logged. When
more than `max_timeouts` of the batch have timed out, or `budget_s` has passed, the others are not
run and count as timed out too. So a function that always hangs costs about (1 + max_timeouts * N /
processes) deadlines, not N.

    pool.call("score", {"completions": ["a", "b"]})
    -> [1.0, Failure(kind=FailureKind.timeout, text="...")]
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from hybridrl.core.errors import ConfigError
from hybridrl.rewards.child import Raised, RewardCall
from hybridrl.rewards.load import BUILT_IN
from hybridrl.rewards.process import ProcessEnded, RewardProcess
from hybridrl.rewards.signature import Signature

if TYPE_CHECKING:  # child processes import this package and must not load Hydra
    from hybridrl.settings.rewards import RewardConfig

log = logging.getLogger(__name__)

LOAD_S = 120.0
"""Default time limit for a child to start and load the functions."""


class FailureKind(StrEnum):
    timeout = "timeout"  # killed at reward.timeout_s, or not run because of earlier timeouts
    died = "died"  # its process ended
    raised = "raised"  # an exception
    invalid = "invalid"  # did not return one finite number or None per sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why one sequence has no value."""

    kind: FailureKind
    text: str


Outcome = float | None | Failure
"""The value of one sequence; None: the function does not apply to it."""


class RewardPool:
    """A pool of children, each with every function loaded; a child that ends is replaced.

    Args:
        calls: the reward functions by name.
        processes: number of children.
        timeout_s: deadline of one task, which is all sequences of a child or a single one.
        max_timeouts: share of a batch in [0, 1]; if more time out, the others are not run.
        budget_s: time of one `call` after which no further task is started, nor a child waited for
            that loads; the first task of each child is always run.
        load_s: time limit for a child to start and load the functions.

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
        load_s: float = LOAD_S,
    ) -> None:
        self._calls = dict(calls)
        self._timeout_s = timeout_s
        self._max_timeouts = max_timeouts
        self._budget_s = budget_s
        self._load_s = load_s
        self._reported: set[str] = set()  # functions of which a failed call was logged
        self._processes = [RewardProcess(self._calls) for _ in range(processes)]
        try:
            self.signatures = self._load()
        except ConfigError:
            self.close()
            raise

    def call(self, name: str, columns: Mapping[str, list[Any]]) -> list[Outcome]:
        """One outcome per sequence, for columns that are lists of length N >= 1.

        Only the columns that the function takes are passed. A required column that `columns` lacks
        is passed as N times None.
        """
        num_sequences = len(columns["completions"])
        end = time.monotonic() + self._budget_s  # no task is started later
        passed = self.signatures[name].passed(dict(columns))
        size = -(-num_sequences // len(self._processes))
        parts = [range(i, min(i + size, num_sequences)) for i in range(0, num_sequences, size)]
        outcomes: dict[int, Outcome] = {}
        retried: list[int] = []
        for part, answer in zip(parts, self._answers(name, passed, parts), strict=True):
            if isinstance(answer, Failure) and len(part) > 1:
                retried += part
                self._report(name, len(part), answer)
            else:
                outcomes |= _spread(part, answer)
        max_timeouts = self._max_timeouts * num_sequences
        outcomes |= self._one_by_one(name, passed, retried, max_timeouts=max_timeouts, end=end)
        return [outcomes[i] for i in range(num_sequences)]

    def _report(self, name: str, num_sequences: int, failure: Failure) -> None:
        """Log, only once for each function, that the sequences of a failed task are sent again."""
        if name not in self._reported:
            self._reported.add(name)
            log.warning(
                "reward.functions.%s failed in its call for %d responses: %s: %s; these "
                "responses, and those of later failed calls, are scored one by one",
                name,
                num_sequences,
                failure.kind,
                failure.text,
            )

    def describe(self, name: str) -> str:
        """The setting that names the function, for a message."""
        return f"reward.functions.{name}.function={self._calls[name].function}"

    def close(self) -> None:
        """Kill the children and everything that they started."""
        for process in self._processes:
            process.end()
        self._processes = []

    def _one_by_one(
        self,
        name: str,
        columns: dict[str, list[Any]],
        retried: list[int],
        *,
        max_timeouts: float,
        end: float,
    ) -> dict[int, Outcome]:
        """Call the function with one sequence at a time, in all children at once.

        Stops when more than `max_timeouts` sequences have timed out, or the monotonic clock has
        passed `end`.
        """
        outcomes: dict[int, Outcome] = {}
        reason = (
            f"not run: more than {self._max_timeouts:.0%} of the batch had timed out, or "
            f"{self._budget_s:g} s had passed"
        )
        skipped = Failure(kind=FailureKind.timeout, text=reason)
        for start in range(0, len(retried), len(self._processes)):
            parts = [range(i, i + 1) for i in retried[start : start + len(self._processes)]]
            num_timeouts = sum(
                isinstance(o, Failure) and o.kind is FailureKind.timeout for o in outcomes.values()
            )
            answers: list[list[Outcome] | Failure] = [skipped] * len(parts)
            if num_timeouts <= max_timeouts and time.monotonic() < end:
                answers = self._answers(name, columns, parts, end)
            for part, answer in zip(parts, answers, strict=True):
                outcomes |= _spread(part, answer)
        return outcomes

    def _answers(
        self,
        name: str,
        columns: dict[str, list[Any]],
        parts: list[range],
        end: float = math.inf,
    ) -> list[list[Outcome] | Failure]:
        """The answer to each part, computed by the child of the same index; parts <= processes.

        Args:
            end: the monotonic time until which the replacement of an ended child may load.
        """
        refused = [self._send(i, name, columns, part, end) for i, part in enumerate(parts)]
        deadline = time.monotonic() + self._timeout_s
        return [
            failure or self._receive(i, len(parts[i]), deadline)
            for i, failure in enumerate(refused)
        ]

    def _send(
        self, i: int, name: str, columns: dict[str, list[Any]], part: range, end: float
    ) -> Failure | None:
        """Submit a part to process i, or to its replacement if it ended between two calls.

        Returns:
            None if the process accepted it, else why neither process did.
        """
        keywords = {k: v[part.start : part.stop] for k, v in columns.items()}
        reason = ""
        for _ in range(2):
            process = self._processes[i]
            remaining = max(end - time.monotonic(), 0.0)
            try:
                process.load(min(self._load_s, remaining))
                process.submit(name, len(part), keywords, self._timeout_s)
                return None
            except ProcessEnded as error:
                reason = f"the process ended before it accepted the call, twice: {error}"
            except TimeoutError:
                if process.loaded is None and remaining < self._load_s:
                    text = f"its process was still loading when {self._budget_s:g} s had passed"
                    return Failure(kind=FailureKind.timeout, text=text)  # it goes on loading
                reason = "the process did not accept the call, twice"
            self._replace(i)
        return Failure(kind=FailureKind.died, text=reason)

    def _receive(self, i: int, num_sequences: int, end: float) -> list[Outcome] | Failure:
        """The answer of process i to the part that it accepted."""
        try:
            answer = self._processes[i].answer(num_sequences, max(end - time.monotonic(), 0.0))
        except TimeoutError:
            self._replace(i)
            reason = f"no answer within reward.timeout_s={self._timeout_s:g}"
            return Failure(kind=FailureKind.timeout, text=reason)
        except ProcessEnded as error:
            self._replace(i)
            return Failure(kind=FailureKind.died, text=str(error))
        if isinstance(answer, Raised):
            kind = FailureKind.invalid if answer.wrong_result else FailureKind.raised
            return Failure(kind=kind, text=answer.text)
        return [
            Failure(kind=FailureKind.invalid, text=value) if isinstance(value, str) else value
            for value in answer
        ]

    def _replace(self, i: int) -> None:
        self._processes[i].end()
        self._processes[i] = RewardProcess(self._calls)

    def _load(self) -> dict[str, Signature]:
        field = ", ".join(self.describe(name) for name in self._calls)
        signatures: dict[str, Signature] = {}
        for process in self._processes:
            try:
                process.load(self._load_s)
            except TimeoutError as error:
                raise ConfigError(
                    f"{field}: a process with all reward functions must load within "
                    f"{self._load_s:g} s; import less, or raise deadlines.start_s"
                ) from error
            except ProcessEnded as error:
                own = any(call.function not in BUILT_IN for call in self._calls.values())
                remedy = (
                    "run the file by itself to see why"
                    if own
                    else "see its output, and lower reward.processes if memory ran out"
                )
                raise ConfigError(
                    f"{field}: loading the reward functions ended their process ({error}); {remedy}"
                ) from error
            assert process.loaded is not None
            for name, signature in process.loaded.items():
                if isinstance(signature, str):
                    raise ConfigError(signature)
                signatures[name] = signature
        return signatures


def reward_calls(config: "RewardConfig", device: str = "cpu") -> dict[str, RewardCall]:
    """The reward functions of the settings as arguments of a pool.

    Args:
        device: of the reward models.
    """
    return {
        name: RewardCall(
            function=f.function,
            options=dict(f.options) | ({"device": device} if name in config.models else {}),
        )
        for name, f in config.functions.items()
    }


def _spread(part: range, answer: list[Outcome] | Failure) -> dict[int, Outcome]:
    """The outcome by sequence of a part; a failure of the whole part counts for each sequence."""
    if isinstance(answer, Failure):
        return dict.fromkeys(part, answer)
    return dict(zip(part, answer, strict=True))
