"""N actors of one kind. The typed groups in groups.py are its only callers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hybridrl.runtime.calls import Pending, gather
from hybridrl.runtime.host import AsyncHost, Host


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
        concurrent: bool = False,
        any_order: bool = False,
    ) -> None:
        self.name, self.size = name, len(slots)
        self.names = [f"{name}/{i}" for i in range(self.size)]
        self.actors = []
        for worker, slot, arguments in zip(self.names, slots, kwargs, strict=True):
            actor = ray.remote(AsyncHost if concurrent else Host).options(
                num_cpus=slot.num_cpus,
                num_gpus=slot.num_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(slot.group, placement_group_bundle_index=slot.bundle),
                runtime_env={"env_vars": slot.env},
                allow_out_of_order_execution=concurrent or any_order,
                **({"max_concurrency": 1000} if concurrent else {}),
            )
            self.actors.append(actor.remote(path, f"{log_dir}/{worker.replace('/', '-')}.log", arguments))

    def submit(self, index: int, method: str, *args: Any, deadline_s: float) -> Pending:
        """Call one worker; refs among `args` arrive as their values."""
        return Pending(ref=self.actors[index].call.remote(method, *args), worker=self.names[index], call=method, deadline_s=deadline_s)

    def submit_pair(self, index: int, method: str, *args: Any, deadline_s: float) -> tuple[Pending, Pending]:
        """Call one worker whose method returns two values; each is an object of its own."""
        refs = self.actors[index].call.options(num_returns=2).remote(method, *args)
        first, second = (Pending(ref=ref, worker=self.names[index], call=method, deadline_s=deadline_s) for ref in refs)
        return first, second

    def submit_all(self, method: str, *args: Any, deadline_s: float) -> list[Pending]:
        return [self.submit(i, method, *args, deadline_s=deadline_s) for i in range(self.size)]

    def call_all(self, method: str, *args: Any, deadline_s: float) -> list[Any]:
        return gather(self.submit_all(method, *args, deadline_s=deadline_s))

    def pids(self) -> list[int]:
        """Process ids, each on its own node."""
        return [ray.get(actor.pid.remote(), timeout=60) for actor in self.actors]

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []


@dataclass(frozen=True, slots=True)
class EngineCall:
    """Lets the learner's sending rank call every engine, with a deadline; picklable."""

    group: ActorGroup
    deadline_s: float

    def __call__(self, method: str, arguments: Sequence[tuple]) -> None:
        gather([self.group.submit(i, method, *args, deadline_s=self.deadline_s) for i, args in enumerate(arguments)])
