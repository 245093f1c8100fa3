"""The base class of groups whose workers hold no state that a run needs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hybridrl.core.errors import WorkerError
from hybridrl.runtime.actor_group import ActorGroup, Slot
from hybridrl.runtime.calls import Pending, watch_nothing
from hybridrl.settings.run import RunSettings


class StatelessGroup:
    """Interchangeable workers: a call may go to any of them, and one that fails is replaced."""

    worker: str  # module:class

    def __init__(
        self,
        settings: RunSettings,
        slots: Sequence[Slot],
        *,
        name: str,
        arguments: Sequence[Mapping[str, Any]],
        log_dir: str,
        unit: int = 1,
        renewed: Callable[[range], Sequence[Mapping[str, Any]]] | None = None,
    ) -> None:
        """
        Args:
            arguments: the arguments of each worker's constructor.
            unit, renewed: as in ActorGroup. The workers of a unit are called together, so no call
                to one of them may overtake another.
        """
        self.settings = settings
        self.group = ActorGroup(
            name,
            self.worker,
            slots,
            arguments,
            log_dir=log_dir,
            max_restarts=settings.cluster.max_restarts,
            any_order=unit == 1,
            unit=unit,
            renewed=renewed,
        )

    def begin_job(self, settings: RunSettings, log_dir: str) -> None:
        """Serve another job with the same workers."""
        self.settings = settings
        self.group.begin_job(settings, log_dir)

    def lose(self, error: WorkerError, watch: Callable[[], None] = watch_nothing) -> None:
        """Replace the worker that failed and its unit, and wait until the new ones are built.

        Args:
            watch: as in `await_first`.

        Raises:
            FleetExhausted: cluster.max_restarts is used up, or a new worker failed with the same
                error at once.
        """
        self.group.rebuild(error, self.settings.deadlines.start_s, watch)

    def ready(self) -> list[Pending]:
        """Submit one call per worker, which ends when the worker is built."""
        return self.group.submit_all("ping", deadline_s=self.settings.deadlines.start_s)

    def close(self) -> None:
        self.group.close()
