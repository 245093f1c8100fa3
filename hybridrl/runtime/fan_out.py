"""Copying one object to many nodes, so that no node sends many copies.

Ray copies an object to each node that needs it once, from a node that has it. Nodes that need it at
the same time all take it from the one node that has it then.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TypeVar

from hybridrl.runtime.actor_group import ActorGroup
from hybridrl.runtime.calls import Pending, Reference, outcomes

T = TypeVar("T")


def fan_out(
    group: ActorGroup,
    workers: Iterable[int],
    ref: Reference,
    *,
    deadline_s: float,
    watch: Callable[[], Pending | None],
) -> None:
    """Copy an object to the nodes of some workers in rounds, each to as many nodes as have it. Does
    nothing for at most two nodes, where it would gain nothing.

    Waits for each round, at most `deadline_s`. A worker that fails is left to the caller, whose own
    call to it fails too; Ray copies the object to a node that has none when a call needs it there.

    Args:
        workers: indices into the group.
        watch: as in `outcomes`.
    """
    per_node: dict[str, int] = {}
    for worker in workers:
        per_node.setdefault(group.slots[worker].node_id, worker)
    if len(per_node) <= 2:
        return
    for receivers in rounds(list(per_node.values())):
        outcomes([group.bring(worker, ref, deadline_s=deadline_s) for worker in receivers], watch)


def rounds(receivers: Sequence[T]) -> list[list[T]]:
    """Each round has as many receivers as there were before it, with one more for the source.

    Example: [0, 1, 2, 3, 4] -> [[0], [1, 2], [3, 4]].
    """
    remaining = iter(receivers)
    result: list[list[T]] = []
    holders = 1
    while taken := list(islice(remaining, holders)):
        result.append(taken)
        holders += len(taken)
    return result
