"""Converts tensors to numpy arrays, which the object store passes without a copy. numpy has no
bf16.
"""

import numpy as np
import torch
from torch import Tensor


def to_wire(tensor: Tensor) -> np.ndarray:
    """A CPU tensor as a numpy array: bf16 as its bits in uint16, other dtypes unchanged."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    return tensor.contiguous().numpy()


def from_wire(array: np.ndarray) -> Tensor:
    """The inverse of to_wire, as a view of `array`, which must be writable (unlike the object
    store's memory).
    """
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """The dtype of the array that to_wire makes of a tensor of this dtype."""
    return to_wire(torch.empty(0, dtype=dtype)).dtype
