"""The checkpoint that is being written while the run goes on, and the errors after which a last one
is saved.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from hybridrl.core.errors import (
    CheckpointError,
    FleetExhausted,
    Preempted,
    RewardError,
    RunDirectoryError,
    ServerError,
    WorkerError,
)

log = logging.getLogger(__name__)

SAVED_ENDS = (Preempted, RunDirectoryError, RewardError, ServerError, FleetExhausted)
"""Errors that end a run and usually leave its learner intact, so that what it learned can be saved.
If the learner is lost too, saving fails, and the message names both errors.
"""


class Saving:
    """Finishes one checkpoint at a time in a separate thread."""

    def __init__(self) -> None:
        self.saved_step = 0  # step of the newest committed checkpoint
        self._write_s: float | None = None  # seconds, until `take` returns them; None: reported
        self._step = 0  # step of the checkpoint that was begun last
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[float] | None = None

    def start(self, step: int, finish: Callable[[], object]) -> None:
        """Call `finish`, which commits the checkpoint of `step`, in the thread. The previous
        checkpoint must be settled.
        """
        assert self._under_way is None, self._step
        began = time.monotonic()

        def committed() -> float:
            finish()
            return time.monotonic() - began

        self._step = step
        self._under_way = self._threads.submit(committed)

    def settle(self) -> None:
        """Wait for the checkpoint that is under way, if there is one.

        Raises:
            CheckpointError, WorkerError: it could not be written.
        """
        under_way = self._under_way
        if under_way is None:
            return
        self._under_way = None
        self._write_s = under_way.result()
        self.saved_step = self._step

    def settle_logged(self) -> None:
        """As `settle`, but a checkpoint that could not be written is reported in the log: the older
        ones are undamaged, and the next one may succeed.
        """
        try:
            self.settle()
        except (CheckpointError, WorkerError) as error:
            log.error("step %d has no checkpoint (older ones are intact): %s", self._step, error)

    def take(self) -> dict[str, float]:
        """Settle the checkpoint if it is finished, without waiting. Returns the metric of its time,
        once per checkpoint; otherwise nothing.
        """
        if self._under_way is not None and self._under_way.done():
            self.settle_logged()
        seconds = self._write_s
        self._write_s = None
        return {} if seconds is None else {"time/checkpoint_s": seconds}
