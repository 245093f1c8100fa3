"""The bytes of tensors that a computation keeps alive, counted without computing or allocating.

torch's fake tensors have shapes, dtypes and lifetimes, and no numbers. The three names below are
private to torch; tests/planning/test_live_internals.py fails when one of them is gone, or when the
installed version is not SEEN.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

SEEN = {"torch": "2.13"}
"""The version that this file was written for and tested with."""


@contextmanager
def without_memory() -> Iterator[None]:
    """Make tensors without memory in the block; operations give them only shapes and dtypes."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        yield


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made in the block, for as long as each exists.

    Tensors that share memory count once. `weights` are tensors that existed before, whose views are
    not counted.

    Example: with a = torch.ones(4) from before, `b = a + 1; c = b * 2; del b` in the block leaves
    now == 16 and peak == 32.
    """

    def __init__(self, weights: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._held = [weight.untyped_storage() for weight in weights]
        self._known = {id(storage) for storage in self._held}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._count(value)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        nbytes = storage.nbytes()
        self._known.add(key)
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, nbytes)

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes
