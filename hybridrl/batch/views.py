"""Columns of a batch as tensors over its response tokens.

Shapes: N sequences, R response tokens of all of them in batch order, T tokens of the longest
response.
"""

import numpy as np
import torch
from torch import Tensor

from hybridrl.types import RolloutBatch


def response_rows(batch: RolloutBatch, column: np.ndarray) -> Tensor:
    """[R] the entries at the response tokens of a column over all tokens, prompts included."""
    return torch.from_numpy(column[batch.response_mask])


def response_ids(batch: RolloutBatch) -> Tensor:
    """[R] int64, the response tokens."""
    return torch.from_numpy(batch.input_ids[batch.response_mask].astype(np.int64))


def response_grid(batch: RolloutBatch) -> Tensor:
    """[N, T] bool, True on response tokens, left-aligned; its row-major order is batch order."""
    lengths = torch.from_numpy(batch.response_lengths.copy())
    return torch.arange(int(lengths.max()))[None, :] < lengths[:, None]


def per_token(per_sequence: Tensor, batch: RolloutBatch) -> Tensor:
    """[R] the number of each sequence, [N], repeated for each of its response tokens."""
    return per_sequence.repeat_interleave(torch.from_numpy(batch.response_lengths.copy()))
