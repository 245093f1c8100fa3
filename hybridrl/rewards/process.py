"""The owner's side of a child process of the pool.

The child executes one call at a time and can be killed at any moment.
"""

import json
import math
from collections.abc import Mapping
from signal import SIGKILL
from typing import Any

from hybridrl.core.plain_text import plain
from hybridrl.rewards import child
from hybridrl.rewards.child import Answer, Raised, RewardCall
from hybridrl.rewards.signature import Signature
from hybridrl.rewards.spawn import BareContext, limit_waits

MAX_CHARS = 2000
"""Longest text that is accepted from a child. The child bounds it too, but a function may forge
the answer.
"""

MAX_BYTES = 64 * 1024 * 1024
"""Largest answer of one call."""

STUCK_S = 30.0
"""Longest wait, in seconds, in the middle of a message or for the guard's last message."""

FORGED = (
    "the function disturbed the pipe that carries its results; it must not write to open file "
    "descriptors"
)

UNREADABLE = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""What reading a message raises that the child's own program did not write."""

_context = BareContext()


class ProcessEnded(Exception):
    """The child has ended; the message says how."""


class RewardProcess:
    """A child process. The constructor starts it without waiting until the functions are loaded."""

    def __init__(self, calls: Mapping[str, RewardCall]) -> None:
        self.loaded: dict[str, Signature | str] | None = None
        self._names = tuple(calls)
        self._work, work = _context.Pipe()
        self._line, line = _context.Pipe()
        for connection in (self._work, self._line):
            limit_waits(connection, STUCK_S)
        self._starter = _context.Process(target=child.run, args=(line, work, dict(calls)))
        self._starter.start()
        line.close()
        work.close()

    def load(self, timeout_s: float) -> None:
        """Wait until `loaded` holds the signature of each function, or why it cannot be loaded.

        Raises:
            ProcessEnded: loading ended the process.
            TimeoutError: loading takes longer than `timeout_s`.
        """
        if self.loaded is not None:
            return
        try:
            message = json.loads(self._receive(timeout_s))
            self.loaded = {name: _signature(message[name]) for name in self._names}
        except UNREADABLE as error:
            raise ProcessEnded(FORGED) from error
        self._starter.join()  # it ended after it had started the guard

    def submit(
        self, name: str, num_sequences: int, keywords: dict[str, Any], timeout_s: float
    ) -> None:
        """Send a call and wait until the child accepts it.

        Raises:
            ProcessEnded: the child ended before it accepted the call.
            TimeoutError: the child did not accept the call in time.
        """
        try:
            self._work.send((name, num_sequences, keywords))
        except OSError as error:
            raise self._ended() from error
        if self._receive(timeout_s) != child.ACCEPTED:
            raise ProcessEnded(FORGED)

    def answer(self, num_sequences: int, timeout_s: float) -> Answer:
        """The result of the call that the child accepted.

        Raises:
            ProcessEnded: the call ended the process.
            TimeoutError: there is no answer within `timeout_s`.
        """
        message = self._receive(timeout_s)
        try:
            fields = json.loads(message)
            if "text" in fields:
                text = plain(fields["text"], limit=MAX_CHARS)
                return Raised(text=text, wrong_result=bool(fields["wrong_result"]))
            values = [_value(value) for value in fields["values"]]
        except UNREADABLE as error:
            raise ProcessEnded(FORGED) from error
        if len(values) != num_sequences:
            raise ProcessEnded(FORGED)
        return values

    def end(self) -> None:
        """Kill the child and all processes that it started, and wait until they have ended."""
        self._starter.kill()  # it has ended already if the guard is running
        self._starter.join()
        self._work.close()
        try:
            self._line.send_bytes(b"end")
            while self._line.poll(STUCK_S):
                self._line.recv_bytes(MAX_BYTES)
        except (OSError, EOFError):  # the guard closed its end, so all processes have ended
            pass
        self._line.close()

    def _receive(self, timeout_s: float) -> bytes:
        try:
            if not self._work.poll(timeout_s):
                raise TimeoutError
            return self._work.recv_bytes(MAX_BYTES)
        except TimeoutError:
            raise
        except (OSError, EOFError) as error:
            raise self._ended() from error

    def _ended(self) -> ProcessEnded:
        try:
            if self._line.poll(STUCK_S):
                code = int(self._line.recv_bytes(100))
                killed = ": it was killed, as when memory runs out" if code == -SIGKILL else ""
                return ProcessEnded(f"the process ended with exit code {code}{killed}")
        except (OSError, EOFError, ValueError):
            pass
        return ProcessEnded("the process closed its connection, or its guard was killed")


def _signature(entry: Any) -> Signature | str:
    if isinstance(entry, str):
        return plain(entry, limit=MAX_CHARS)
    return Signature(
        accepted=tuple(map(str, entry["accepted"])),
        required=tuple(map(str, entry["required"])),
        any_column=bool(entry["any_column"]),
    )


def _value(entry: Any) -> float | str | None:
    if entry is None:
        return None
    if isinstance(entry, str):
        return plain(entry, limit=MAX_CHARS)
    number = float(entry)
    return number if math.isfinite(number) else f"returned {number}, must be a finite number"
