"""Ranks that are forked from a process which has imported what they need: DeepSpeed and
transformers take several seconds of a core, once for all of them.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path


def fork_ranks(world: int, run: Callable[[int], None], logs: str) -> None:
    """Call run(rank) in a process of its own for each rank, and wait for all; when one fails, the
    others are killed.

    Args:
        logs: "{rank}" in it stands for the rank; what a rank prints is written there.

    Raises:
        SystemExit: a rank failed; with the end of each log.
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
    """The id of the process of a rank."""
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
        # Destructors of gloo's groups abort now and then ("terminate called without an active
        # exception"), also after destroy_process_group; a rank that has done its work skips them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
