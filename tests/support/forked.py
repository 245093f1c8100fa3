"""Forks ranks from a process that has imported the libraries they need, because importing DeepSpeed
and transformers takes several seconds of a core.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path


def fork_ranks(world: int, run: Callable[[int], None], logs: str) -> None:
    """Call run(rank) in a forked process for each rank, and wait for all. If a rank fails, the
    others are killed.

    Args:
        logs: the path of the file for a rank's output, in which "{rank}" stands for the rank.

    Raises:
        SystemExit: a rank failed; the message has the end of each log.
    """
    assert threading.active_count() == 1, "a fork takes no other thread along"
    pids = [_forked(rank, run, logs.format(rank=rank)) for rank in range(world)]
    ended: dict[int, int] = {}
    while len(ended) < world:
        pid, status = os.wait()
        ended[pid] = os.waitstatus_to_exitcode(status)
        if ended[pid]:
            for other in set(pids) - ended.keys():
                os.kill(other, signal.SIGKILL)
    if any(ended.values()):
        sys.exit(
            "\n".join(
                f"rank {rank} ended with {ended[pid]}: "
                + Path(logs.format(rank=rank)).read_text()[-3000:]
                for rank, pid in enumerate(pids)
            )
        )


def _forked(rank: int, run: Callable[[int], None], log: str) -> int:
    """Fork a rank; returns the id of its process."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        run(rank)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Destructors of gloo's groups sometimes abort the process ("terminate called without an
        # active exception"), even after destroy_process_group. os._exit skips them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
