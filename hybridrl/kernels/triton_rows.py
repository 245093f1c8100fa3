"""The work on rows in Triton, for fp32 logits of the student and of any number of hidden teachers.

Each program computes one row. `_sums_kernel` reads the student's row twice (normaliser; entropy)
and, for each teacher, the teacher's row twice and the student's once more (normaliser; mean and
value). kernels.row_rule computes the factors from these sums. `_gradient_kernel` reads all rows
once more and writes the gradient into the memory of the student's logits. With one teacher, these
are 28 bytes read and, for a bf16 gradient, 2 written per (token, vocabulary) entry.

Tests verify the numerics with Triton's interpreter (tests/kernels/test_triton_rows.py). The speed
on a GPU has not been measured; `tools/bench head --all-shapes` measures it.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridrl.kernels.row_rule import RowRule, coefficients
from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.ops.divergence import Measure
from hybridrl.settings.choices import Divergence

LARGEST_BLOCK = 4096
"""Entries of a row in registers at once: 16 per thread and matrix with the 8 warps below."""


def row_gradients(
    rule: RowRule,
    dtype: torch.dtype,
    logits: Tensor,
    evidence: tuple[tuple[Tensor, ...], ...],
    weights: tuple[Tensor, ...],
    columns: TokenColumns,
) -> tuple[Tensor, ...]:
    """The fields of kernels.rows.RowResult, for teachers whose evidence is logits.

    Args:
        dtype: of the gradient, 2 or 4 bytes wide. A 2-byte gradient fills the first half of each
            row of logits.
        logits: [c, V] float32, contiguous; overwritten.
        evidence: of each teacher ([c, V] float32 logits,).
        weights: of each teacher, [c].
    """
    assert logits.dtype is torch.float32 and logits.is_contiguous(), (logits.dtype, logits.stride())
    teachers = tuple(logits_of_teacher for (logits_of_teacher,) in evidence)
    assert all(
        t.dtype is torch.float32 and t.stride(1) == 1 and t.shape == logits.shape for t in teachers
    ), "fp32 logits in rows"
    count, vocabulary = logits.shape
    block = {"BLOCK": min(LARGEST_BLOCK, triton.next_power_of_2(vocabulary)), "num_warps": 8}
    measure = _constants(rule.measure) | {"INVERSE_T": 1 / rule.temperature}
    ids = columns.token_ids
    row = torch.empty(
        count, 3, dtype=torch.float32, device=logits.device
    )  # normaliser, log p(y), entropy
    each = torch.empty(
        count, len(teachers), 3, dtype=torch.float32, device=logits.device
    )  # normaliser, mean score, divergence
    _sums_kernel[(count,)](logits, teachers, ids, row, each, vocabulary, **measure, **block)
    values = tuple(each[:, i, 2] for i in range(len(teachers)))
    factors = coefficients(rule, row[:, 1], values, weights, columns)
    norms = torch.empty(count, 3, dtype=torch.float32, device=logits.device)
    scales = torch.stack(factors.dense, 1) if factors.dense else row
    gradient = logits.view(dtype)[:, :vocabulary]
    stride = gradient.stride(0)
    _gradient_kernel[(count,)](
        logits,
        teachers,
        ids,
        row,
        each,
        scales,
        factors.sparse,
        gradient,
        stride,
        norms,
        vocabulary,
        **measure,
        **block,
    )
    return (
        gradient,
        row[:, 1],
        factors.kl,
        row[:, 2],
        factors.bounded,
        factors.loss,
        *norms.unbind(1),
    )


def _constants(measure: Measure) -> dict[str, float | int]:
    clip = math.inf if measure.log_ratio_clip is None else measure.log_ratio_clip
    return {
        "DIVERGENCE": list(Divergence).index(measure.divergence),
        "BETA": measure.beta,
        "CLIP": clip,
    }


@triton.jit
def _normaliser(x, peak, total):
    """The running maximum, and the sum of exponentials relative to it, updated with a block x."""
    higher = tl.maximum(peak, tl.max(x, 0))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # a block of nothing but -inf
    return higher, total * tl.exp(peak - base) + tl.sum(tl.exp(x - base), 0)


@triton.jit
def _weighted_score(logp, logq, DIVERGENCE: tl.constexpr, BETA: tl.constexpr, CLIP: tl.constexpr):
    """Measure.weighted_score and Measure.terms of the divergence with this index."""
    p = tl.exp(logp)
    q = tl.exp(logq)
    if DIVERGENCE == 0:
        weighted = tl.where(p > 0, p * tl.minimum(tl.maximum(logp - logq, -CLIP), CLIP), 0.0)
        terms = weighted
    elif DIVERGENCE == 1:
        weighted = p - q
        terms = tl.where(q > 0, q * (logq - logp), 0.0)
    else:
        high = tl.maximum(logp, logq)
        scaled = (1 - BETA) * tl.exp(logp - high) + BETA * tl.exp(
            logq - high
        )  # m where it does not underflow
        logm = high + tl.log(scaled)
        weighted = tl.where(p > 0, p * (1 - BETA) * (logp - logm), 0.0)
        terms = weighted + tl.where(q > 0, q * BETA * (logq - logm), 0.0)
    return weighted, terms


@triton.jit
def _sums_kernel(
    logits,
    teachers,
    ids,
    row_out,
    each_out,
    V,
    DIVERGENCE: tl.constexpr,
    BETA: tl.constexpr,
    CLIP: tl.constexpr,
    INVERSE_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student = logits + row * V
    peak, total = float("-inf"), 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        peak, total = _normaliser(
            tl.load(student + at, mask=at < V, other=float("-inf")) * INVERSE_T, peak, total
        )
    normaliser = peak + tl.log(total)
    entropy = 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        logp = tl.load(student + at, mask=at < V, other=float("-inf")) * INVERSE_T - normaliser
        p = tl.exp(logp)
        entropy -= tl.sum(tl.where(p > 0, p * logp, 0.0), 0)
    tl.store(row_out + 3 * row, normaliser)
    tl.store(row_out + 3 * row + 1, tl.load(student + tl.load(ids + row)) * INVERSE_T - normaliser)
    tl.store(row_out + 3 * row + 2, entropy)
    for i in tl.static_range(len(teachers)):
        teacher = teachers[i] + row * V
        peak_q, total_q = float("-inf"), 0.0
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            peak_q, total_q = _normaliser(
                tl.load(teacher + at, mask=at < V, other=float("-inf")) * INVERSE_T, peak_q, total_q
            )
        normaliser_q = peak_q + tl.log(total_q)
        mean, value = 0.0, 0.0
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            logp = tl.load(student + at, mask=at < V, other=float("-inf")) * INVERSE_T - normaliser
            logq = (
                tl.load(teacher + at, mask=at < V, other=float("-inf")) * INVERSE_T - normaliser_q
            )
            weighted, terms = _weighted_score(logp, logq, DIVERGENCE, BETA, CLIP)
            mean += tl.sum(weighted, 0)
            value += tl.sum(terms, 0)
        out = each_out + 3 * (row * len(teachers) + i)
        tl.store(out, normaliser_q)
        tl.store(out + 1, mean)
        tl.store(out + 2, value)


@triton.jit
def _gradient_kernel(
    logits,
    teachers,
    ids,
    row_in,
    each_in,
    scales,
    sparse_in,
    gradient,
    gradient_stride,
    norms,
    V,
    DIVERGENCE: tl.constexpr,
    BETA: tl.constexpr,
    CLIP: tl.constexpr,
    INVERSE_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student = logits + row * V
    normaliser, drawn, cost = (
        tl.load(row_in + 3 * row),
        tl.load(ids + row),
        tl.load(sparse_in + row),
    )
    dense_sq, sparse_sq, dense_sparse = 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        logp = tl.load(student + at, mask=at < V, other=float("-inf")) * INVERSE_T - normaliser
        p = tl.exp(logp)
        dense = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(len(teachers)):
            sums = each_in + 3 * (row * len(teachers) + i)
            scale = tl.load(scales + row * len(teachers) + i)
            logq = tl.load(
                teachers[i] + row * V + at, mask=at < V, other=float("-inf")
            ) * INVERSE_T - tl.load(sums)
            weighted, _ = _weighted_score(logp, logq, DIVERGENCE, BETA, CLIP)
            dense += tl.where(scale != 0, scale * (weighted - p * tl.load(sums + 1)), 0.0)
        sparse = cost * tl.where(at == drawn, 1 - p, -p)
        dense_sq += tl.sum(dense * dense, 0)
        sparse_sq += tl.sum(sparse * sparse, 0)
        dense_sparse += tl.sum(dense * sparse, 0)
        # A 2-byte gradient overlaps logits of the first block that another thread may not have
        # read yet, so all threads read a block before any of them writes.
        tl.debug_barrier()
        tl.store(
            gradient + row * gradient_stride + at,
            (dense + sparse).to(gradient.dtype.element_ty),
            mask=at < V,
        )
        tl.debug_barrier()
    tl.store(norms + 3 * row, dense_sq)
    tl.store(norms + 3 * row + 1, sparse_sq)
    tl.store(norms + 3 * row + 2, dense_sparse)
