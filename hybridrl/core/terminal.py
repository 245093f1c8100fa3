"""The standard streams of a command: what cannot be written there is lost, and nothing else is.

A run lasts longer than its terminal. A closed pipe (`| head`), a terminal that is gone, a log on a
full disk or an encoding without a character must not end the run, and a descriptor that was closed
at the start must not be given to the next file that is opened, which would then receive the
console's lines.
"""

import io
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

STANDARD = {0: os.O_RDONLY, 1: os.O_WRONLY, 2: os.O_WRONLY}


def secure_streams() -> None:
    """Open closed standard descriptors on /dev/null, and make writing to sys.stdout and sys.stderr
    never raise.

    Call it first of all, before any file is opened.
    """
    reopen_closed()
    if not isinstance(sys.stdout, SurvivingStream):
        sys.stdout = surviving(sys.stdout, 1)
    if not isinstance(sys.stderr, SurvivingStream):
        sys.stderr = surviving(sys.stderr, 2)


def reopen_closed() -> None:
    """Descriptors 0, 1 and 2 that are closed, on /dev/null. They are taken in rising order, as
    os.open gives the lowest one.
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
    """`stream`, or where Python has none since its descriptor was closed, a new one on that
    descriptor.
    """
    if stream is None:
        stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (for the process's life)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return SurvivingStream(stream)


class SurvivingStream(io.TextIOBase):
    """A text stream whose write and flush never raise. After the first failure it writes to
    /dev/null.

    Example: SurvivingStream(sys.stdout).write("a line\\n") returns 7, also after the reader of the
    pipe has gone.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: str | None = None  # why nothing is written any more; None: it is

    def write(self, text: str) -> int:
        if self.failure is None:
            try:
                self._stream.write(text)
            except BlockingIOError:  # a slow reader of a pipe that does not block is still there
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
        """Direct the descriptor to /dev/null: the interpreter flushes what is still buffered when
        it ends, and would fail too.
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
        """Everything else, such as `buffer`, is the stream's own."""
        return getattr(self._stream, name)
