"""What torch_internals.py uses of torch's compiler is as it was read.

Where the first test fails after an upgrade, read what hybridrl/kernels/torch_internals.py and
tests/support/torch_graphs.py list again, then change VERSION.
"""

from typing import NamedTuple

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
