"""The matrix products of the head pass, and the memory they write into.

On the CPU, a product of bf16 matrices is summed in fp32 and rounded to bf16 at the end; on CUDA its
fp32 sums are kept. Where student and teacher nearly agree, this rounding dominates the divergence.
Its share of the reverse KL's gradient at the hidden states of SmolLM2-135M is 18 % at a KL of 0.012
nats a token, 42 % at 0.003, and more than the gradient below 0.001. `exact` computes the products
in fp32, which leaves 0.2 %.
"""

import threading

import torch
from torch import Tensor

VOCABULARY_TILE = 8192
"""Rows of an output head that are converted to fp32, or whose gradient is added, at once."""


class Workspace:
    """Memory for [c, V] matrices; each is valid until `restart`.

    On the CPU the thread keeps this memory between passes, because new pages from the system would
    cost as much time as half of the work on the rows. Its size is that of the largest chunk so far
    and does not depend on the number of tokens.
    """

    _buffers = threading.local()

    def __init__(self, *, exact: bool) -> None:
        self.exact = exact
        self._taken = 0

    @classmethod
    def release(cls) -> None:
        """Free this thread's memory."""
        cls._buffers.__dict__.clear()

    @classmethod
    def held(cls) -> int:
        """The size of this thread's memory in numbers."""
        return sum(buffer.numel() for buffer in cls._buffers.__dict__.values())

    def restart(self, in_use: int = 0) -> None:
        """Allow every matrix to be overwritten except the first `in_use`."""
        self._taken = in_use

    def logits(self, hidden: Tensor, lm_head: Tensor, place: Tensor | None = None) -> Tensor:
        """[c, H] x [V, H] -> [c, V] in the dtype of `hidden`, or fp32 (see the top of this file).

        Args:
            place: [c, V] memory for the result, used only if the result has the dtype of `hidden`;
                None: memory of this workspace.
        """
        narrow = hidden.dtype in (torch.bfloat16, torch.float16)
        if hidden.is_cuda and narrow:
            return torch.mm(hidden, lm_head.to(hidden.dtype).T, out_dtype=torch.float32)
        if not (narrow and self.exact):
            out = self.matrix(len(hidden), len(lm_head), hidden) if place is None else place
            return torch.mm(hidden, lm_head.to(hidden.dtype).T, out=out)
        wide = hidden.float()
        out = self.matrix(len(hidden), len(lm_head), wide)
        for start in range(0, len(lm_head), VOCABULARY_TILE):
            columns = slice(start, start + VOCABULARY_TILE)
            out[:, columns] = wide @ lm_head[columns].float().T
        return out

    def matrix(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """[rows, columns] of the dtype and device of `like`, uninitialised."""
        if like.device.type != "cpu":
            return like.new_empty(rows, columns)
        buffers = self._buffers.__dict__
        key = f"{self._taken} {like.dtype}"
        self._taken += 1
        if key not in buffers or buffers[key].numel() < rows * columns:
            buffers.pop(key, None)  # first, so that the old and the new buffer never coexist
            buffers[key] = like.new_empty(rows * columns)
        return buffers[key][: rows * columns].view(rows, columns)


def head_gradient(lm_head: Tensor, dtype: torch.dtype, *, chunks: int) -> Tensor:
    """An uninitialised [V, H] for `add_head_gradient`, in fp32 (fp64 for fp64 inputs), or for a
    single chunk in the head's own dtype.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return torch.empty(
        lm_head.shape,
        dtype=lm_head.dtype if chunks == 1 and dtype == lm_head.dtype else wide,
        device=lm_head.device,
    )


def add_head_gradient(total: Tensor, d_logits: Tensor, hidden: Tensor, *, first: bool) -> None:
    """Set `total` [V, H] to d_logits^T [V, c] @ hidden [c, H], plus `total` unless this is the
    first chunk.
    """
    if first and total.dtype == hidden.dtype:
        torch.mm(d_logits.T, hidden, out=total)
    elif total.dtype == hidden.dtype:
        total.addmm_(d_logits.T, hidden)
    elif hidden.is_cuda:
        torch.addmm(
            total, d_logits.T, hidden, beta=0 if first else 1, out_dtype=total.dtype, out=total
        )
    else:  # in tiles, so that the rounded product stays in the cache
        for start in range(0, len(total), VOCABULARY_TILE):
            columns = slice(start, start + VOCABULARY_TILE)
            piece = d_logits[:, columns].T @ hidden
            total[columns].copy_(piece) if first else total[columns].add_(piece)


def softmax_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
