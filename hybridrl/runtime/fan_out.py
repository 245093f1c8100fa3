"""Copying one object to many nodes, so that no node sends many copies.

Ray copies an object once to each node that needs it, from a node that has it. Nodes that request it
at the same time all get it from the only node that has it at that time.
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
    """Copy an object to the nodes of some workers in rounds. Each round has at most as many new
    nodes as there are nodes with the object. Does nothing for one or two nodes, where rounds would
    save no time.

    Waits at most `deadline_s` for each round. Failures are ignored: the caller's own call to that
    worker fails too, and Ray copies the object to a node without it when a call needs it there.

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
    """Divide receivers into rounds. Each has as many as the rounds before it together, plus one for
    the source; the last may have fewer.

    Example: [0, 1, 2, 3, 4] -> [[0], [1, 2], [3, 4]].
    """
    remaining = iter(receivers)
    result: list[list[T]] = []
    holders = 1
    while taken := list(islice(remaining, holders)):
        result.append(taken)
        holders += len(taken)
    return result
