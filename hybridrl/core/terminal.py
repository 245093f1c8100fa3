"""Standard streams that never end a run.

A run may outlive its terminal. A closed pipe (`| head`), a closed terminal, a log on a full disk or
an encoding that lacks a character loses output and has no other effect. A standard descriptor that
was closed at the start is opened on /dev/null: otherwise the next file to be opened would get its
number and receive the console's lines.
"""

import io
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

STANDARD = {0: os.O_RDONLY, 1: os.O_WRONLY, 2: os.O_WRONLY}


def secure_streams() -> None:
    """Open closed standard descriptors, and make writes to sys.stdout and sys.stderr never raise.

    Call it before any file is opened.
    """
    reopen_closed()
    if not isinstance(sys.stdout, SurvivingStream):
        sys.stdout = surviving(sys.stdout, 1)
    if not isinstance(sys.stderr, SurvivingStream):
        sys.stderr = surviving(sys.stderr, 2)


def reopen_closed() -> None:
    """Open descriptors 0, 1 and 2 on /dev/null where they are closed.

    They are opened in ascending order, because os.open returns the lowest free number.
    """
    for number, mode in STANDARD.items():
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, mode)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)


def surviving(stream: TextIO | None, number: int) -> "SurvivingStream":
    """Wrap `stream`, or a new stream on descriptor `number` where Python has none.

    Python has none where the descriptor was closed at the start.
    """
    if stream is None:
        # It stays open until the process ends.
        stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return SurvivingStream(stream)


class SurvivingStream(io.TextIOBase):
    """A text stream whose write and flush never raise.

    After the first failure its descriptor leads to /dev/null.

    Example: SurvivingStream(sys.stdout).write("a line\\n") returns 7, even after the reader of the
    pipe has ended.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: str | None = None  # why output is discarded; None: output is written

    def write(self, text: str) -> int:
        if self.failure is None:
            try:
                self._stream.write(text)
            except BlockingIOError:  # a slow reader of a non-blocking pipe is no failure
                pass
            except (OSError, ValueError) as error:
                self._give_up(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:  # type: ignore[override]
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.failure is None:
            try:
                self._stream.flush()
            except BlockingIOError:
                pass
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Redirect the descriptor to /dev/null.

        The interpreter flushes buffered text when it ends, which would fail too.
        """
        self.failure = str(error) or type(error).__name__
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        except (OSError, ValueError):  # a stream without a descriptor, or a closed one
            pass

    def isatty(self) -> bool:
        return self.failure is None and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._stream.errors

    def writable(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        """Read every other attribute, such as `buffer`, from the wrapped stream."""
        return getattr(self._stream, name)
