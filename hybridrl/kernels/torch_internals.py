"""What the kernels use of torch's compiler beyond its documented interface.

Read in torch 2.13. tests/kernels/test_torch_internals.py fails when another version is installed or
when one of these details is no longer as described here.

- `torch.utils._pytree.tree_leaves`: the tensors in nested tuples.
- `torch._dynamo.mark_dynamic`: a graph accepts any size of at least 2 in a dimension, even with
  dynamic=False. That option makes every other size and number a constant of the graph. Without it,
  sizes and numbers that differed between earlier calls would be inputs, so a graph would depend on
  the history of the process.
- The options in FUSE, of torch's C++ backend.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

VERSION = "2.13"

FUSE = {
    "realize_reads_threshold": 1 << 20,
    "realize_opcount_threshold": 1 << 20,
    "realize_acc_reads_threshold": 1 << 20,
}
"""Options with which the C++ backend recomputes values in each loop instead of storing them."""


MOST_GRAPHS = 256
"""Limit on the graphs of one function. Each combination of sizes other than the number of rows has
a graph of its own, e.g. each K of a sweep. Torch's default is 8, beyond which a function compiled
with fullgraph fails.
"""


def one_graph(work: Callable[..., Any]) -> Callable[..., Any]:
    """`work` compiled as one graph that serves any number of rows from 2 on.

    Args:
        work: a function of tensors, or of nested tuples of them, that all have the same number of
            rows.
    """
    # torch's stubs lack isolate_recompiles.
    compiled = torch.compile(  # type: ignore[call-overload]
        work,
        dynamic=False,
        fullgraph=True,
        options=FUSE,
        isolate_recompiles=True,
        recompile_limit=MOST_GRAPHS,
    )

    def run(*tensors: Any) -> Any:
        for tensor in tree_leaves(tensors):
            torch._dynamo.mark_dynamic(tensor, 0)
        return compiled(*tensors)

    return run
