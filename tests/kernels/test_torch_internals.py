"""The internals of torch's compiler that torch_internals.py uses are unchanged.

If the first test fails after an upgrade, read the code that hybridrl/kernels/torch_internals.py and
tests/support/torch_graphs.py list again, then change VERSION.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._inductor import list_options

from hybridrl.kernels.torch_internals import FUSE, VERSION, one_graph
from tests.support.torch_graphs import forget_graphs, num_graphs


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def product(pair: Pair, others: tuple[Tensor, ...]) -> Tensor:
    return pair.first * pair.second + others[0]


def test_torch_is_the_version_that_was_read():
    assert torch.__version__.startswith(f"{VERSION}."), "see the first lines of this file"


def test_the_backend_knows_the_options():
    unknown = FUSE.keys() - set(list_options())
    assert not unknown, f"torch's C++ backend has no options {sorted(unknown)} any more"


def test_one_graph_serves_tensors_in_tuples_with_any_number_of_rows():
    torch.compiler.reset()
    forget_graphs()
    compiled = one_graph(product)
    for rows in (2, 5, 9):
        pair = Pair(torch.full((rows, 3), 2.0), torch.full((rows, 3), 4.0))
        assert compiled(pair, (torch.ones(rows, 3),)).tolist() == [[9.0] * 3] * rows
    assert num_graphs() == 1, "torch compiles again for each size, or counts its graphs otherwise"
    forget_graphs()
    assert num_graphs() == 0


def test_a_graph_does_not_depend_on_the_sizes_and_numbers_of_an_earlier_one(
    monkeypatch: pytest.MonkeyPatch,
):
    torch.compiler.reset()
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        graphs.append([tuple(tensor.shape)[1:] for tensor in tensors])
        return graph

    compile_with = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda work, *, options, **given: compile_with(work, backend=record, **given),
    )

    def scaled(scale: float, x: Tensor, ids: Tensor) -> Tensor:
        return scale * x.gather(1, ids)

    def of(scale: float) -> Callable[..., Tensor]:
        work = partial(scaled, scale)

        def whole(*tensors: Tensor) -> Tensor:
            return work(*tensors)

        return one_graph(whole)

    for scale, columns in ((1.0, 16), (0.5, 4), (0.25, 2)):
        ids = torch.zeros(3, columns, dtype=torch.long)
        assert of(scale)(torch.ones(3, 20), ids).tolist() == [[scale] * columns] * 3
    # There is one graph for each, whose only inputs are x and ids, with a fixed width.
    assert graphs == [[(20,), (16,)], [(20,), (4,)], [(20,), (2,)]]


def test_one_function_may_have_more_graphs_than_torch_allows_by_default():
    torch.compiler.reset()
    compiled = one_graph(lambda x: x + 1)
    for columns in range(1, 12):
        assert compiled(torch.ones(2, columns)).tolist() == [[2.0] * columns] * 2
