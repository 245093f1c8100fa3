"""Keeps Ray and the workers between the jobs of a sweep."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridrl.core.errors import ConfigError
from hybridrl.launch.worker_conditions import (
    alone,
    differences,
    needs_room,
    worker_conditions,
)
from hybridrl.runtime.cluster import Cluster
from hybridrl.runtime.workers import Slots, Workers
from hybridrl.settings.run import RunSettings

SHOWN = 3  # differing conditions that a notice lists


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The workers of a job that is done, their places and its run directory."""

    run_dir: Path
    slots: Slots
    workers: Workers
    conditions: Mapping[str, Any]  # worker_conditions of the job


class WarmWorkers:
    """Holds Ray and the workers of the last job for the next one. Use as a context manager.

    A job gets these workers where its conditions equal those of the job before; otherwise they end,
    and others start. They also end where a job fails, is interrupted, or has replaced a worker.
    Kept workers have the environment variables that this process had when Ray started for them; a
    variable that was set later does not reach them.

    Example:
        with hybridrl.WarmWorkers() as warm:
            for lr in (1e-4, 1e-3):
                hybridrl.train([f"run.dir=runs/{lr}", f"train.lr={lr}"], warm=warm)
    """

    def __init__(self) -> None:
        self._running = ExitStack()
        self._cluster: Cluster | None = None
        self._kept: Kept | None = None
        self._in_job = False

    def __enter__(self) -> "WarmWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def run_dir(self) -> Path | None:
        """The run directory of the job whose workers are kept; None: no workers are."""
        return None if self._kept is None else self._kept.run_dir

    def close(self) -> None:
        """End the workers and this process's own Ray."""
        self._kept = None
        self._cluster = None
        self._running.close()

    @contextmanager
    def job(
        self,
        settings: RunSettings,
        inputs: Mapping[str, str],
        *,
        measures: bool,
        say: Callable[[str], None],
    ) -> Iterator[Kept | None]:
        """Yield the kept workers that a job may use, or None. The job lasts as long as the block;
        at its end Ray and all workers end, unless `keep` was called.

        Args:
            inputs: run_dir.inputs.digests.
            measures: the job begins with measuring its teachers.
            say: prints a line about workers that end.

        Raises:
            ConfigError: another job that has not ended uses this object.
        """
        if self._in_job:
            raise ConfigError(
                "train(warm=...): a job that has not ended uses these WarmWorkers; begin the next "
                "one after its end"
            )
        self._in_job = True
        kept, self._kept = self._kept, None
        try:
            if kept is not None:
                reason = self._reason(kept, settings, inputs, measures=measures)
                if reason is not None:
                    say(f"the workers of the previous job end and new ones start: {reason}")
                    self.close()
                    kept = None
            yield kept
        except BaseException:
            self.close()
            raise
        finally:
            self._in_job = False
        if self._kept is None:
            self.close()

    def cluster(self, settings: RunSettings) -> Cluster:
        """The cluster of the present job; it is connected if it is not yet.

        Raises:
            PlacementError, ConfigError: as Cluster.
        """
        if self._cluster is None:
            self._cluster = self._running.enter_context(Cluster(settings))
        self._cluster.settings = settings
        return self._cluster

    def keep(
        self,
        settings: RunSettings,
        inputs: Mapping[str, str],
        run_dir: Path,
        slots: Slots,
        workers: Workers,
    ) -> None:
        """Keep the workers of the present job, which is done, if a later job may use them."""
        if workers.intact and alone(settings) is None:
            conditions = worker_conditions(settings, inputs)
            self._kept = Kept(run_dir=run_dir, slots=slots, workers=workers, conditions=conditions)

    def _reason(
        self, kept: Kept, settings: RunSettings, inputs: Mapping[str, str], *, measures: bool
    ) -> str | None:
        """Why a job may not use these workers; None: it may."""
        different = differences(kept.conditions, worker_conditions(settings, inputs))
        if different:
            more = len(different) - SHOWN
            names = ", ".join(different[:SHOWN]) + (f" and {more} more" if more > 0 else "")
            return f"{names} {'differs' if len(different) == 1 else 'differ'}"
        assert self._cluster is not None, "the workers run in it"
        return alone(settings) or needs_room(self._cluster.device, measures=measures)
