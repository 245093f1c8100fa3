"""The matrix products of the head pass, and the memory they write into.

A product of bf16 matrices is summed in fp32 and rounded to bf16 at the end on the CPU; on CUDA its
fp32 sums are kept. The rounding is what remains of a divergence where student and teacher nearly
agree. Its share of the reverse KL's gradient at the hidden states of SmolLM2-135M: 18 % at a KL of
0.012 nats a token, 42 % at 0.003, more than the gradient below 0.001; `exact` asks for products in
fp32, which leave 0.2 %.
"""

import threading

import torch
from torch import Tensor

VOCABULARY_TILE = 8192
"""Rows of a head that are widened, or whose gradient is added, at once."""


class Workspace:
    """Memory for [c, V] matrices; each is valid until `restart`.

    On the CPU it stays with the thread between passes: pages fresh from the system cost as much as
    half the work on the rows. It is as large as the largest chunk so far, whatever the number of
    tokens.
    """

    _buffers = threading.local()

    def __init__(self, *, exact: bool) -> None:
        self.exact = exact
        self._taken = 0

    @classmethod
    def release(cls) -> None:
        """Give this thread's memory back."""
        cls._buffers.__dict__.clear()

    @classmethod
    def held(cls) -> int:
        """How many numbers this thread's memory has room for."""
        return sum(buffer.numel() for buffer in cls._buffers.__dict__.values())

    def restart(self, in_use: int = 0) -> None:
        """Allow every matrix to be overwritten except the first `in_use`."""
        self._taken = in_use

    def logits(self, hidden: Tensor, lm_head: Tensor, place: Tensor | None = None) -> Tensor:
        """[c, H] x [V, H] -> [c, V] in the dtype of `hidden`, or fp32 (see above).

        Args:
            place: [c, V] to write into where the dtype allows; None: memory of its own.
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
            buffers.pop(key, None)  # before its successor is made, or both would exist
            buffers[key] = like.new_empty(rows * columns)
        return buffers[key][: rows * columns].view(rows, columns)


def head_gradient(lm_head: Tensor, dtype: torch.dtype, *, chunks: int) -> Tensor:
    """[V, H] to hand to `add_head_gradient`: of one chunk in its own dtype, of several as sums in
    fp32 (fp64 for fp64).
    """
    wide = torch.promote_types(dtype, torch.float32)
    return torch.empty(
        lm_head.shape,
        dtype=lm_head.dtype if chunks == 1 and dtype == lm_head.dtype else wide,
        device=lm_head.device,
    )


def add_head_gradient(total: Tensor, d_logits: Tensor, hidden: Tensor, *, first: bool) -> None:
    """total = d_logits^T @ hidden, plus `total` unless it is the first: [c, V] x [c, H] -> [V,
    H].
    """
    if first and total.dtype == hidden.dtype:
        torch.mm(d_logits.T, hidden, out=total)
    elif total.dtype == hidden.dtype:
        total.addmm_(d_logits.T, hidden)
    elif hidden.is_cuda:
        torch.addmm(
            total, d_logits.T, hidden, beta=0 if first else 1, out_dtype=total.dtype, out=total
        )
    else:  # piece by piece, so that the rounded product stays in the cache
        for start in range(0, len(total), VOCABULARY_TILE):
            columns = slice(start, start + VOCABULARY_TILE)
            piece = d_logits[:, columns].T @ hidden
            total[columns].copy_(piece) if first else total[columns].add_(piece)


def softmax_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
