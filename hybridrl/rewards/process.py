"""A child process of the pool as its owner sees it: it takes one call at a time and can be ended at
any moment.
"""

import json
import math
import os
import socket
import struct
import sys
import types
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from hybridrl.core.plain_text import plain
from hybridrl.core.redact import without_secrets
from hybridrl.rewards import child
from hybridrl.rewards.child import Answer, Raised, RewardCall
from hybridrl.rewards.signature import Signature

MAX_CHARS = (
    2000  # of a text from a child, which has bounded it itself unless a function forged the answer
)
MAX_BYTES = 64 * 1024 * 1024  # of one answer
STUCK_S = 30.0  # on a connection in the middle of a message, or for the guard's last word


class ProcessEnded(Exception):
    """The child has ended; the message says how."""


class RewardProcess:
    """Started by the constructor, which does not wait for the functions to load."""

    def __init__(self, calls: Mapping[str, RewardCall]) -> None:
        self.loaded: dict[str, Signature | str] | None = None
        self._work, work = _context.Pipe()
        self._line, line = _context.Pipe()
        for connection in (self._work, self._line):
            _limit_waits(connection)
        self._starter = _context.Process(target=child.run, args=(line, work, dict(calls)))
        self._starter.start()
        line.close()
        work.close()

    def load(self, timeout_s: float) -> None:
        """Wait until `loaded` says of each function how it is called, or why it cannot be loaded.

        Raises:
            ProcessEnded: loading ended the process.
            TimeoutError: it takes longer.
        """
        if self.loaded is not None:
            return
        try:
            message = json.loads(self._receive(timeout_s))
            self.loaded = {name: _signature(given) for name, given in message.items()}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ProcessEnded("it wrote into the connection to its owner") from error
        self._starter.join()  # it ended when the guard began

    def take(
        self, name: str, num_sequences: int, keywords: dict[str, Any], timeout_s: float
    ) -> None:
        """Hand a call over.

        Raises:
            ProcessEnded: the child ended before it took the call.
            TimeoutError: it did not take it in time.
        """
        try:
            self._work.send((name, num_sequences, keywords))
        except OSError as error:
            raise self._ended() from error
        if self._receive(timeout_s) != child.TAKEN:
            raise ProcessEnded("it wrote into the connection to its owner")

    def answer(self, num_sequences: int, timeout_s: float) -> Answer:
        """What the call that it has taken comes to.

        Raises:
            ProcessEnded: the call ended the process.
            TimeoutError: there is no answer yet.
        """
        message = self._receive(timeout_s)
        try:
            fields = json.loads(message)
            if "text" in fields:
                text = plain(fields["text"], limit=MAX_CHARS)
                return Raised(text=text, wrong_result=bool(fields["wrong_result"]))
            values = [_value(value) for value in fields["values"]]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ProcessEnded("it wrote into the connection to its owner") from error
        if len(values) != num_sequences:
            raise ProcessEnded("it wrote into the connection to its owner")
        return values

    def end(self) -> None:
        """Kill the child and all that it started; wait until that is done."""
        self._starter.kill()  # where there is no guard yet; else it has ended
        self._starter.join()
        self._work.close()
        try:
            self._line.send_bytes(b"end")
            while self._line.poll(STUCK_S):
                self._line.recv_bytes(MAX_BYTES)
        except (OSError, EOFError):  # the guard has closed its end: it is done
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
                return ProcessEnded(
                    f"the process ended with exit code {int(self._line.recv_bytes(100))}"
                )
        except (OSError, EOFError, ValueError):
            pass
        return ProcessEnded("the process closed its connection, or its guard was killed")


def _signature(given: Any) -> Signature | str:
    if isinstance(given, str):
        return plain(given, limit=MAX_CHARS)
    return Signature(
        accepted=tuple(given["accepted"]),
        required=tuple(given["required"]),
        any_column=given["any_column"],
    )


def _value(given: Any) -> float | str | None:
    if given is None:
        return None
    if isinstance(given, str):
        return plain(given, limit=MAX_CHARS)
    number = float(given)
    return number if math.isfinite(number) else f"returned {number}, must be a finite number"


def _limit_waits(connection: Connection) -> None:
    """No read or write of the connection waits longer than STUCK_S for its other end."""
    limit = struct.pack("ll", int(STUCK_S), 0)  # a struct timeval
    with socket.socket(fileno=os.dup(connection.fileno())) as shared:
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


class _BareProcess(SpawnProcess):
    """A spawned process that inherits no secret variable and does not run the parent's main script
    again, which may import torch or ray.
    """

    @staticmethod
    def _Popen(process: SpawnProcess) -> object:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")  # spawn finds no file to run in it
        try:
            with without_secrets():
                return SpawnProcess._Popen(process)
        finally:
            sys.modules["__main__"] = main


class _BareContext(SpawnContext):
    Process = _BareProcess


_context = _BareContext()
