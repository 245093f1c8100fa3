"""A time limit for chat templates, which are programs that come with the model."""

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType

from jinja2 import Environment, TemplateSyntaxError

SECONDS = 10.0
"""Limit for one conversation; the templates that models ship take about a millisecond."""
SOON = 0.001
"""Seconds after which a timer of the caller fires if it ran out in the meantime."""


class BoundlessTemplate(Exception):
    """The template takes too long, or contains an operation that cannot be interrupted."""


@contextmanager
def bounded(
    template: str | Mapping[str, str] | None, *, seconds: float = SECONDS
) -> Iterator[None]:
    """Interrupt the `with` block, which renders `template`, after `seconds`.

    Python is interrupted between two operations, by a signal that only the main thread receives, so
    other threads have no limit. A timer of the caller is restored afterwards; if it ran out in the
    meantime, it fires at once. A power of whole numbers, such as 10**(10**8), is one operation that
    takes minutes, so a template with a power is refused beforehand.

    Args:
        template: the text of a template, or of several by their names.

    Raises:
        BoundlessTemplate: the time is over, or the template contains a power.
    """
    sources = template.values() if isinstance(template, Mapping) else [template or ""]
    if any(_has_power(source) for source in sources):
        raise BoundlessTemplate("it raises a number to a power, which could take forever")
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        raise BoundlessTemplate(f"it took longer than {seconds:g} s for one conversation")

    previous = signal.signal(signal.SIGALRM, interrupt)
    delay, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    started = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if delay:  # restore the caller's timer; never with 0 seconds, which would switch it off
            left = max(delay - (time.monotonic() - started), SOON)
            signal.setitimer(signal.ITIMER_REAL, left, interval)


@lru_cache(maxsize=16)
def _has_power(source: str) -> bool:
    """Whether `**` is used as an operator between two values. After an opening parenthesis or a
    comma it passes keyword arguments.
    """
    before = ""
    try:
        for _, kind, value in Environment().lex(source):
            if value == "**" and kind == "operator" and before not in ("(", ","):
                return True
            if kind != "whitespace":
                before = value
    except TemplateSyntaxError:  # rendering the template raises it too
        pass
    return False
