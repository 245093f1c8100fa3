"""The row work: one function of plain tensors that computes, from the logits of a chunk, their
gradient and statistics.

On the CPU it is compiled for large vocabularies (torch.compile, C++ backend). The compiled code has
one loop over a row for each sum that a later loop needs, stores nothing of size [c, V] in between,
and writes the gradient over the logits.
"""

import importlib.util
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridrl.core.compiler import has_compiler
from hybridrl.kernels.row_rule import RowRule, coefficients
from hybridrl.kernels.teacher_rows import Form, divergence, log_softmax
from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.kernels.torch_internals import one_graph
from hybridrl.ops.divergence import exp
from hybridrl.settings.choices import Correction

Work = Callable[..., Any]
"""A function of the tensors of a chunk."""

COMPILE_FROM = 4096
"""Smallest vocabulary for which the row work is compiled (10 s once; torch caches it on disk). With
smaller ones, eager execution is as fast.
"""


class RowResult(NamedTuple):
    """The result of the work on c rows: their logit gradient, and statistics of each row."""

    gradient: Tensor  # [c, V]
    logprobs: Tensor  # [c] log p(y)
    kl: Tensor  # [c] sum_i w_i D_i
    entropy: Tensor  # [c]
    bounded: Tensor  # [c] bool, whether the importance ratio was bounded
    loss: Tensor  # [c]
    dense_sq: Tensor  # [c] squared norm of the dense part of the gradient
    sparse_sq: Tensor  # [c] squared norm of its sparse part
    dense_sparse: Tensor  # [c] their inner product


def row_gradients(
    rule: RowRule,
    forms: tuple[Form | Correction, ...],
    dtype: torch.dtype,
    logits: Tensor,
    evidence: tuple[tuple[Tensor, ...], ...],
    weights: tuple[Tensor, ...],
    columns: TokenColumns,
) -> RowResult:
    """The hybrid gradient at the logits of c tokens; kernels.head has the formula.

    Args:
        forms: how to read each teacher's evidence.
        dtype: of the gradient; if it is that of the logits, the gradient overwrites them.
        logits: [c, V], not yet divided by the temperature.
        evidence: of each teacher.
        weights: of each teacher, [c].
    """
    ids = columns.token_ids
    logp = log_softmax(logits, rule.temperature)
    pairs = [
        divergence(form, of_teacher, logp, rule.measure, rule.temperature)
        for form, of_teacher in zip(forms, evidence, strict=True)
    ]
    p = exp(logp)
    drawn = logp.gather(1, ids[:, None]).squeeze(1)
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(-1)
    factors = coefficients(rule, drawn, tuple(value for value, _ in pairs), weights, columns)
    dense = torch.zeros_like(logp)
    for scale, (_, gradient) in zip(factors.dense, pairs, strict=True):
        dense = dense + torch.where(scale[:, None] != 0, scale[:, None] * gradient, 0.0)
    sparse = _sparse_gradient(factors.sparse, p, ids)
    dense_sq = (dense * dense).sum(-1)
    sparse_sq = (sparse * sparse).sum(-1)
    dense_sparse = (dense * sparse).sum(-1)
    total = (dense + sparse).to(dtype)
    if dtype == logits.dtype:
        total = logits.copy_(total)
    return RowResult(
        gradient=total,
        logprobs=drawn,
        kl=factors.kl,
        entropy=entropy,
        bounded=factors.bounded,
        loss=factors.loss,
        dense_sq=dense_sq,
        sparse_sq=sparse_sq,
        dense_sparse=dense_sparse,
    )


def _sparse_gradient(scale: Tensor, p: Tensor, ids: Tensor) -> Tensor:
    """[c, V] the gradient of scale * log p(y) at the logits: scale * (onehot(y) - p).

    Args:
        scale: [c].
        p: [c, V].
        ids: [c] the tokens y.
    """
    onehot = (
        torch.arange(p.shape[1], device=p.device, dtype=torch.int32)[None]
        == ids.to(torch.int32)[:, None]
    )
    return scale[:, None] * torch.where(onehot, 1 - p, -p)


def row_work(
    rule: RowRule, forms: tuple[Form | Correction, ...], logits: Tensor, dtype: torch.dtype
) -> Work:
    """`row_gradients` as a function of (logits, evidence, weights, columns): in Triton for fp32
    logits on a GPU if all teachers' evidence is logits too, otherwise compiled if `pays` says so.
    """
    if (
        logits.is_cuda
        and logits.dtype is torch.float32
        and set(forms) <= {Form.logits}
        and importlib.util.find_spec("triton")
    ):
        from hybridrl.kernels import triton_rows

        def by_triton(*tensors: Any) -> RowResult:
            return RowResult(*triton_rows.row_gradients(rule, dtype, *tensors))

        return by_triton
    return (
        _compiled(row_gradients, rule, forms, dtype)
        if pays(logits)
        else partial(row_gradients, rule, forms, dtype)
    )


def chosen_work(temperature: float, logits: Tensor) -> Work:
    """A function of (logits [c, V], ids [c, K]) that returns log p at the ids, [c, K]; compiled if
    `pays` says so.
    """
    return _compiled(_chosen, temperature) if pays(logits) else partial(_chosen, temperature)


def _chosen(temperature: float, logits: Tensor, ids: Tensor) -> Tensor:
    return log_softmax(logits, temperature).gather(1, ids)


def pays(logits: Tensor) -> bool:
    """Whether the work on these rows is compiled. It depends only on shape, dtype and device, so
    that runs are reproducible.
    """
    rows, vocabulary = logits.shape
    large = rows > 1 and vocabulary >= COMPILE_FROM  # the graph needs at least 2 rows
    return (
        large
        and logits.device.type == "cpu"
        and logits.dtype is not torch.float64
        and has_compiler()
    )


@lru_cache
def _compiled(work: Work, *settings: Any) -> Work:
    """`work` with its settings, as one graph for any number of rows."""

    def whole(*tensors: Any) -> Any:
        return work(*settings, *tensors)

    return one_graph(whole)
