"""Named places where a test makes something go wrong. Nothing at all while HYBRIDRL_FAILPOINTS is
unset.

    HYBRIDRL_FAILPOINTS="learner.update:step=2:do=kill:once=/tmp/fired;rollout.generate:do=raise"

Each point is a place, conditions on what the place tells of itself, what to do there, and a file
that lets it happen once only, however many processes come by.
"""

import errno
import os
import signal
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

VARIABLE = "HYBRIDRL_FAILPOINTS"


class Do(StrEnum):
    kill = "kill"  # SIGKILL to this process
    stop = "stop"  # SIGSTOP: the process hangs, its connections stay open
    fail = "raise"  # RuntimeError
    enospc = "enospc"  # OSError: no space left on device


@dataclass(frozen=True, slots=True, kw_only=True)
class Failpoint:
    place: str
    where: dict[str, str]
    do: Do
    once: Path | None  # made when the point fires; None: it fires every time

    def fires(self, place: str, where: dict[str, object]) -> bool:
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
    """Tell that the program is at `place`; does what a point set there says.

    Raises:
        RuntimeError, OSError: a point says so.
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
    """Example: "rollout.generate:wave=train-1:do=kill" -> one point."""
    points = []
    for part in filter(None, text.split(";")):
        place, *pairs = part.split(":")
        where = dict(pair.split("=", 1) for pair in pairs)
        do, once = Do(where.pop("do")), where.pop("once", None)
        points.append(Failpoint(place=place, where=where, do=do, once=Path(once) if once else None))
    return points
