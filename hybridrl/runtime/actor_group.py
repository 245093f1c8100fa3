"""A group of Ray actors of one kind. Only the typed groups of runtime/ use it."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hybridrl.core.errors import FleetExhausted, WorkerError, WorkerTimeout, raised
from hybridrl.runtime.calls import Meter, Pending, gather, settle, succeeded, watch_nothing
from hybridrl.runtime.host import AsyncHost, Host
from hybridrl.runtime.worker_log import STACKS
from hybridrl.settings.run import RunSettings

CALLS = 1_000_000
"""The number of calls that a worker with coroutines accepts at once. Chunks wait inside the worker
for the rest of their wave, and a ping must not wait for them.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The place and the environment of one worker."""

    group: PlacementGroup
    bundle: int
    node_id: str  # Ray's id of the node
    node_ip: str
    num_cpus: float
    num_gpus: float
    env: dict[str, str] = field(default_factory=dict)


class ActorGroup:
    """Starts workers, calls them, and replaces those that fail. `submit` and its variants start a
    call and return it as Pending; `call_all` waits for all workers.

    The driver never imports a worker's module, which may load vLLM or DeepSpeed. So a worker is
    named by its import path, and its constructor's arguments are only checked when it is built.

    Args:
        path: "module:Class" of the worker.
        arguments: the keyword arguments of each worker's constructor.
        max_restarts: how often failed workers of this group may be replaced.
        concurrent: whether the worker's methods are coroutines.
        any_order: whether a call whose arguments are ready may overtake one that waits for its own.
        unit: the number of consecutive workers that work together; if one of them fails, all of
            them are replaced.
        renewed: called before a unit is restarted, with the indices of its workers; returns their
            new constructor arguments, e.g. with a new port. None: the arguments stay the same.
    """

    def __init__(
        self,
        name: str,
        path: str,
        slots: Sequence[Slot],
        arguments: Sequence[Mapping[str, object]],
        *,
        log_dir: str,
        max_restarts: int = 0,
        concurrent: bool = False,
        any_order: bool = False,
        unit: int = 1,
        renewed: Callable[[range], Sequence[Mapping[str, object]]] | None = None,
    ) -> None:
        self.name = name
        self.path = path
        self.slots = slots
        self.arguments = list(arguments)
        self.log_dir = log_dir
        self.concurrent = concurrent
        self.any_order = any_order
        self.unit = unit
        self.renewed = renewed
        self.size = len(slots)
        self.names = [f"{name}/{i}" for i in range(self.size)]
        self.epochs = [0] * self.size  # number of earlier workers, per index
        self.restarts_left = max_restarts
        self.last_reasons: list[str | None] = [None] * self.size
        """Why the worker before this one was replaced, where it raised an error; None: it died,
        hung, or is the first.
        """
        self.first_calls: list[dict[str, Pending]] = [{} for _ in range(self.size)]
        """The first call of each method to the present worker."""
        self.actors = [self._start(i) for i in range(self.size)]
        # Requested at the start, because a worker that hangs does not answer.
        self.pid_refs = [actor.pid.remote() for actor in self.actors]
        self.driver = this_driver()
        ALIVE.add(self)

    def _start(self, index: int) -> ActorHandle:
        slot = self.slots[index]
        actor = ray.remote(AsyncHost if self.concurrent else Host).options(
            num_cpus=slot.num_cpus,
            num_gpus=slot.num_gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                slot.group, placement_group_bundle_index=slot.bundle
            ),
            runtime_env={"env_vars": slot.env},
            allow_out_of_order_execution=self.concurrent or self.any_order,
            **({"max_concurrency": CALLS} if self.concurrent else {}),
        )
        return actor.remote(self.path, self._log(self.names[index]), self.arguments[index])

    def begin_job(
        self, settings: RunSettings, log_dir: str, arguments: Mapping[str, object] | None = None
    ) -> None:
        """Use the same workers for another job, which has their logs in its folder from now on.

        Args:
            arguments: constructor arguments that change, for workers that replace these later.
        """
        self.log_dir = log_dir
        self.arguments = [{**before, **(arguments or {})} for before in self.arguments]
        calls = []
        for index, name in enumerate(self.names):
            ref = self.actors[index].begin_job.remote(settings, self._log(name))
            calls.append(self._pending(index, ref, "begin_job", settings.deadlines.start_s))
        gather(calls)

    def replace(self, error: WorkerError) -> int | None:
        """End the worker that failed and the others of its unit, and start new ones.

        Returns:
            The index of the worker; None: it has already been replaced.

        Raises:
            FleetExhausted: max_restarts is used up, or a new worker failed at once in the same way
                as the one before it. The unit has ended in either case.
            WorkerError: `error` itself, if it names no worker of this group.
        """
        if error.worker not in self.names:
            raise error
        index = self.names.index(error.worker)
        if self.epochs[index] != error.epoch:
            return None
        if isinstance(error, WorkerTimeout):
            dump_stacks()
        for member in self.members(index):
            ray.kill(self.actors[member])
        if self._fails_always(index, error):
            raise FleetExhausted(
                f"{error}; its replacement failed at once with the same error, so another one "
                "would fail too"
            )
        if self.restarts_left == 0:
            raise FleetExhausted(
                f"{error}; cluster.max_restarts is used up for {self.name} workers"
            )
        self.restarts_left -= 1
        members = self.members(index)
        if self.renewed is not None:
            self.arguments[members.start : members.stop] = self.renewed(members)
        for member in members:
            self.last_reasons[member] = None
            self.first_calls[member] = {}
            self.epochs[member] += 1
            self.actors[member] = self._start(member)
            self.pid_refs[member] = self.actors[member].pid.remote()
        self.last_reasons[index] = error.reason if raised(error) else None
        return index

    def incarnations(self, indices: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(index, epoch) of each of these workers. The value changes when one is replaced."""
        return tuple((index, self.epochs[index]) for index in indices)

    def members(self, index: int) -> range:
        """The indices of the workers in the same unit as worker `index`, which is included."""
        first = index - index % self.unit
        return range(first, first + self.unit)

    def _fails_always(self, index: int, error: WorkerError) -> bool:
        """Whether a new worker raised the error of its predecessor in its first call of the same
        method, which shows that the cause is not transient.
        """
        if not raised(error) or error.reason != self.last_reasons[index]:
            return False
        first = self.first_calls[index].get(error.call)
        return first is None or not succeeded(first)

    def rebuild(
        self, error: WorkerError, start_s: float, watch: Callable[[], None] = watch_nothing
    ) -> None:
        """Replace a worker and its unit, and wait until the new ones answer, so that the deadlines
        of later calls do not include their start.

        Args:
            watch: as in `await_first`.

        Raises:
            FleetExhausted: as in `replace`.
        """
        while (index := self.replace(error)) is not None:
            pings = [self.submit(i, "ping", deadline_s=start_s) for i in self.members(index)]
            _, failures = settle(pings, watch)
            if not failures:
                return
            error = failures[0]

    def submit(self, index: int, method: str, *args: Any, deadline_s: float) -> Pending:
        """Call one worker; refs among `args` arrive as their values."""
        Meter.calls += 1
        return self._pending(
            index, self.actors[index].call.remote(method, *args), method, deadline_s
        )

    def submit_pair(
        self, index: int, method: str, *args: Any, deadline_s: float
    ) -> tuple[Pending, Pending]:
        """Call one worker whose method returns two values; each becomes a separate object."""
        Meter.calls += 1
        refs = self.actors[index].call.options(num_returns=2).remote(method, *args)
        first, second = (self._pending(index, ref, method, deadline_s) for ref in refs)
        return first, second

    def bring(self, index: int, ref: ray.ObjectRef, *, deadline_s: float) -> Pending:
        """Copy an object to the node of a worker. A worker with coroutines answers even while it is
        busy.
        """
        Meter.calls += 1
        return self._pending(index, self.actors[index].hold.remote(ref), "hold", deadline_s)

    def _pending(self, index: int, ref: ray.ObjectRef, method: str, deadline_s: float) -> Pending:
        pending = Pending(
            ref=ref,
            worker=self.names[index],
            call=method,
            deadline_s=deadline_s,
            epoch=self.epochs[index],
        )
        self.first_calls[index].setdefault(method, pending)
        return pending

    def submit_all(self, method: str, *args: Any, deadline_s: float) -> list[Pending]:
        return [self.submit(i, method, *args, deadline_s=deadline_s) for i in range(self.size)]

    def call_all(self, method: str, *args: Any, deadline_s: float) -> list[Any]:
        return gather(self.submit_all(method, *args, deadline_s=deadline_s))

    def pids(self) -> list[int]:
        """Process ids, each on its own node."""
        return ray.get(self.pid_refs, timeout=60)

    def ask_for_stacks(self) -> list[ray.ObjectRef]:
        """Signal every worker to write its stacks to its log.

        Returns:
            One reference per worker, which resolves when the worker has been signalled.
        """
        requests = []
        for slot, pid, name in zip(self.slots, self.pid_refs, self.names, strict=True):
            same_node = PlacementGroupSchedulingStrategy(
                slot.group, placement_group_bundle_index=slot.bundle
            )
            ask = ray.remote(ask_for_stacks).options(
                num_cpus=0, scheduling_strategy=same_node, max_retries=0
            )
            requests.append(ask.remote(pid, self._log(name)))
        return requests

    def _log(self, name: str) -> str:
        return f"{self.log_dir}/{name.replace('/', '-')}.log"

    def close(self) -> None:
        ALIVE.discard(self)
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []


ALIVE: WeakSet[ActorGroup] = WeakSet()
"""The groups of this process that are not closed."""
DUMP_S = 5.0
"""The longest wait for signalling all workers; one whose node is gone cannot be signalled."""


def this_driver() -> tuple[str, str]:
    """(node id, worker id) of this process in the Ray that it is connected to.

    The worker id does not suffice, since a driver has the same one in every new Ray.
    """
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_worker_id()


def dump_stacks() -> None:
    """Signal all workers to write the stacks of their threads to their logs. Waits until they are
    signalled, because the caller may end one of them next.
    """
    driver = this_driver()  # the workers of an earlier connection are gone
    requests = [ref for group in ALIVE if group.driver == driver for ref in group.ask_for_stacks()]
    if requests:
        ray.wait(requests, num_returns=len(requests), timeout=DUMP_S)


def ask_for_stacks(pid: int, log: str) -> None:
    """Signal a worker process of this node to write its stacks; see runtime.worker_log. Does
    nothing if the process is gone, or another one has its pid now.
    """
    with suppress(OSError):
        if os.readlink(f"/proc/{pid}/fd/1") == os.path.realpath(log):
            os.kill(pid, STACKS)


@dataclass(frozen=True, slots=True)
class EngineCall:
    """A function that calls a method of some engines and waits for them. The learner's sending rank
    gets it, so it is picklable.
    """

    group: ActorGroup
    engines: tuple[int, ...]
    deadline_s: float

    def __call__(self, method: str, arguments: Sequence[tuple]) -> None:
        gather(
            [
                self.group.submit(i, method, *args, deadline_s=self.deadline_s)
                for i, args in zip(self.engines, arguments, strict=True)
            ]
        )
