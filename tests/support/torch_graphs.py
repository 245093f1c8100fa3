"""How many graphs torch compiles, which torch has no public call for.

Read in torch 2.13; tests/kernels/test_torch_internals.py fails when they are counted otherwise.
"""

import torch


def forget_graphs() -> None:
    """Count from 0 again; graphs that exist are kept."""
    torch._dynamo.utils.counters.clear()


def num_graphs() -> int:
    """The number of graphs that were compiled since forget_graphs."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
