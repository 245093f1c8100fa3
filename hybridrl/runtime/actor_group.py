"""N actors of one kind. The typed groups in groups.py are its only callers."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hybridrl.core.errors import FleetExhausted, WorkerError, WorkerTimeout, raised
from hybridrl.runtime.calls import Pending, gather, settle, succeeded
from hybridrl.runtime.host import STACKS, AsyncHost, Host

CALLS = 1_000_000
"""That a worker of coroutines takes at once. Chunks wait in it for the rest of their wave, and a
ping must not wait for them.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where one worker runs."""

    group: PlacementGroup
    bundle: int
    node_ip: str
    num_cpus: float
    num_gpus: float
    env: dict[str, str] = field(default_factory=dict)


class ActorGroup:
    """submit_*: start and return Pending; call_all: wait for everyone.

    Args:
        max_restarts: how often lost workers of this group may be replaced.
        concurrent: the worker's methods are coroutines.
        any_order: a call whose arguments are ready overtakes one that still waits for its own.
    """

    def __init__(
        self,
        name: str,
        path: str,
        slots: Sequence[Slot],
        kwargs: Sequence[dict[str, Any]],
        *,
        log_dir: str,
        max_restarts: int = 0,
        concurrent: bool = False,
        any_order: bool = False,
    ) -> None:
        self.name, self.path, self.slots, self.kwargs, self.log_dir = (
            name,
            path,
            slots,
            kwargs,
            log_dir,
        )
        self.size, self.concurrent, self.any_order = len(slots), concurrent, any_order
        self.names = [f"{name}/{i}" for i in range(self.size)]
        self.epochs = [0] * self.size  # how many workers were there before
        self.restarts_left = max_restarts
        self.last_reasons: list[str | None] = [None] * self.size
        """Why the worker before this one was replaced, where it raised an error; None: it died,
        hung, or is the first.
        """
        self.first_calls: list[dict[str, Pending]] = [{} for _ in range(self.size)]
        """The first call of each method to the present worker."""
        self.actors = [self._start(i) for i in range(self.size)]
        self.pid_refs = [
            actor.pid.remote() for actor in self.actors
        ]  # asked now: a worker that hangs does not answer
        self.driver = ray.get_runtime_context().get_worker_id()
        ALIVE.add(self)

    def _start(self, index: int) -> ActorHandle:
        slot, log = self.slots[index], self._log(self.names[index])
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
        return actor.remote(self.path, log, self.kwargs[index])

    def replace(self, lost: WorkerError) -> int | None:
        """End the worker that is told of and start another in its place; its index, or None: that
        was done before.

        Raises:
            FleetExhausted: there were too many, or a fresh worker failed at once as the one before
                it; the worker is ended all the same.
            WorkerError: `lost` itself, where it is no worker of this group that was lost.
        """
        if lost.worker not in self.names:
            raise lost
        index = self.names.index(lost.worker)
        if self.epochs[index] != lost.epoch:
            return None
        if isinstance(lost, WorkerTimeout):
            dump_stacks()
        ray.kill(self.actors[index])
        if self._fails_always(index, lost):
            raise FleetExhausted(
                f"{lost}; the worker that replaced another one after this error failed with it at "
                "once, so a further one would too"
            )
        if self.restarts_left == 0:
            raise FleetExhausted(f"{lost}; cluster.max_restarts is used up for {self.name} workers")
        self.last_reasons[index] = lost.reason if raised(lost) else None
        self.first_calls[index] = {}
        self.restarts_left -= 1
        self.epochs[index] += 1
        self.actors[index] = self._start(index)
        self.pid_refs[index] = self.actors[index].pid.remote()
        return index

    def _fails_always(self, index: int, lost: WorkerError) -> bool:
        """Whether a fresh worker raised its predecessor's error at its first such call: nothing
        that passes could be the reason.
        """
        if not raised(lost) or lost.reason != self.last_reasons[index]:
            return False
        first = self.first_calls[index].get(lost.call)
        return first is None or not succeeded(first)

    def rebuild(self, lost: WorkerError, start_s: float) -> None:
        """Replace a worker and wait until the new one answers, so that the deadline of a call does
        not count its start.

        Raises:
            FleetExhausted: as in `replace`.
        """
        while (index := self.replace(lost)) is not None:
            _, again = settle([self.submit(index, "ping", deadline_s=start_s)])
            if not again:
                return
            lost = again[0]

    def submit(self, index: int, method: str, *args: Any, deadline_s: float) -> Pending:
        """Call one worker; refs among `args` arrive as their values."""
        return self._pending(
            index, self.actors[index].call.remote(method, *args), method, deadline_s
        )

    def submit_pair(
        self, index: int, method: str, *args: Any, deadline_s: float
    ) -> tuple[Pending, Pending]:
        """Call one worker whose method returns two values; each is an object of its own."""
        refs = self.actors[index].call.options(num_returns=2).remote(method, *args)
        first, second = (self._pending(index, ref, method, deadline_s) for ref in refs)
        return first, second

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
        """Of every worker that can write them into its log; one reference each, there when it was
        asked.
        """
        asked = []
        for slot, pid, name in zip(self.slots, self.pid_refs, self.names, strict=True):
            there = PlacementGroupSchedulingStrategy(
                slot.group, placement_group_bundle_index=slot.bundle
            )
            ask = ray.remote(ask_for_stacks).options(
                num_cpus=0, scheduling_strategy=there, max_retries=0
            )
            asked.append(ask.remote(pid, self._log(name)))
        return asked

    def _log(self, name: str) -> str:
        return f"{self.log_dir}/{name.replace('/', '-')}.log"

    def close(self) -> None:
        ALIVE.discard(self)
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []


ALIVE: WeakSet[ActorGroup] = WeakSet()
"""The groups of this process that were not closed."""
DUMP_S = 5.0
"""For the stacks of all workers; one whose node is gone writes none."""


def dump_stacks() -> None:
    """Have all workers write the stacks of their threads into their logs; waits a moment, for one
    of them is ended next.
    """
    here = ray.get_runtime_context().get_worker_id()  # groups of an earlier Ray are gone with it
    asked = [ref for group in ALIVE if group.driver == here for ref in group.ask_for_stacks()]
    if asked:
        ray.wait(asked, num_returns=len(asked), timeout=DUMP_S)


def ask_for_stacks(pid: int, log: str) -> None:
    """Ask a process of this node for its stacks; see runtime.host. Where another process has that
    number by now: nothing.
    """
    with suppress(OSError):
        if os.readlink(f"/proc/{pid}/fd/1") == os.path.realpath(log):
            os.kill(pid, STACKS)


@dataclass(frozen=True, slots=True)
class EngineCall:
    """Lets the learner's sending rank call every engine, with a deadline; picklable."""

    group: ActorGroup
    deadline_s: float

    def __call__(self, method: str, arguments: Sequence[tuple]) -> None:
        gather(
            [
                self.group.submit(i, method, *args, deadline_s=self.deadline_s)
                for i, args in enumerate(arguments)
            ]
        )
