"""Counts the graphs that torch compiles, for which torch has no public function.

Read in torch 2.13; tests/kernels/test_torch_internals.py fails when the count is stored elsewhere.
"""

import torch


def forget_graphs() -> None:
    """Reset the count; existing graphs are kept."""
    torch._dynamo.utils.counters.clear()


def num_graphs() -> int:
    """The number of graphs that were compiled since the last call of forget_graphs."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
