"""Named places in the program where a test can inject a fault.

They do nothing while HYBRIDRL_FAILPOINTS is unset.

    HYBRIDRL_FAILPOINTS="learner.update:step=2:do=kill:once=/tmp/fired;rollout.generate:do=raise"

A failpoint has a place, conditions on the values that the place passes, an action, and optionally a
marker file that limits it to one firing over all processes.
"""

import errno
import os
import signal
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

VARIABLE = "HYBRIDRL_FAILPOINTS"


class Do(StrEnum):
    """The action of a failpoint."""

    kill = "kill"  # SIGKILL to this process
    stop = "stop"  # SIGSTOP: the process hangs, its connections stay open
    fail = "raise"  # RuntimeError
    enospc = "enospc"  # OSError: no space left on device


@dataclass(frozen=True, slots=True, kw_only=True)
class Failpoint:
    """One entry of the variable."""

    place: str
    where: dict[str, str]  # conditions: the values, as text, that the place must pass
    do: Do
    once: Path | None  # marker file, created when the point fires; None: it fires every time

    def fires(self, place: str, where: dict[str, object]) -> bool:
        """Whether place and conditions match and the marker file did not exist; creates it."""
        if place != self.place or any(
            str(where.get(key)) != value for key, value in self.where.items()
        ):
            return False
        try:
            if self.once is not None:
                self.once.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def hit(place: str, **where: object) -> None:
    """Perform the actions of the failpoints that are set at `place` under these conditions.

    Args:
        place: where the program is, e.g. "learner.update".
        where: the values that conditions are compared with, as text.

    Raises:
        RuntimeError, OSError: the action of a failpoint.
    """
    if VARIABLE not in os.environ:
        return
    for point in parse(os.environ[VARIABLE]):
        if not point.fires(place, where):
            continue
        match point.do:
            case Do.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            case Do.stop:
                os.kill(os.getpid(), signal.SIGSTOP)
            case Do.fail:
                raise RuntimeError(f"failpoint {place}")
            case Do.enospc:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)


def parse(text: str) -> list[Failpoint]:
    """Read the variable's text.

    Example: "rollout.generate:wave=train-1:do=kill" gives one failpoint.
    """
    points = []
    for part in filter(None, text.split(";")):
        place, *pairs = part.split(":")
        where = dict(pair.split("=", 1) for pair in pairs)
        do = Do(where.pop("do"))
        once = where.pop("once", None)
        points.append(Failpoint(place=place, where=where, do=do, once=Path(once) if once else None))
    return points
