"""Tensors as numpy arrays, which the object store holds without a copy. numpy has no bf16."""

import numpy as np
import torch
from torch import Tensor


def to_wire(tensor: Tensor) -> np.ndarray:
    """A CPU tensor as numpy: bf16 travels as its bits in uint16, other dtypes as they are."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    return tensor.contiguous().numpy()


def from_wire(array: np.ndarray) -> Tensor:
    """The inverse of to_wire. `array` must own its memory: the object store's is read-only."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """The dtype that to_wire gives a tensor of this dtype."""
    return to_wire(torch.empty(0, dtype=dtype)).dtype
