"""The head pass: one pass over the vocabulary computes the dense and the sparse gradient together.

Per response token the gradient of J at the student's logits z is (arXiv 2512.23097, any divergence
of ops.divergence)

    dz = token_weight * [ sum_i w_i dD_i/dz  +  G f(rho) (onehot(y) - p) ] / temperature

so both terms need the same softmax. The gradients with respect to the hidden states and the lm_head
are computed in the forward pass, chunk by chunk of response tokens; full logits [R, V] never exist.
G is fixed before the pass, so the sparse term costs no extra matrix product.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybridrl.kernels.row_rule import RowRule
from hybridrl.kernels.rows import chosen_work, row_work
from hybridrl.kernels.teacher_rows import (
    HiddenTeacher,
    SupportTeacher,
    Teacher,
    distribution,
    log_softmax,
)
from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.kernels.workspace import Workspace, add_head_gradient, head_gradient, softmax_dtype
from hybridrl.ops.compare import COMPARED, compare


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRule(RowRule):
    """The settings of the pass, the same for every row."""

    # response tokens whose [tokens, V] logit gradients are in memory at once; on a CPU, a teacher's
    # logits exist for only PIECE of them at a time
    chunk: int = 1024
    # bf16 on the CPU: compute logits by fp32 products, several times slower (kernels.workspace)
    exact_logits: bool = False
    # bf16 on the CPU: compute all products in fp32 (kernels.products)
    wide_products: bool = False


PIECE = 256
"""Rows of a chunk that a CPU processes at once, enough for products at their full rate. A GPU
processes the whole chunk at once.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadStats:
    """Statistics of the pass, without gradient. Sums are over rows with token_weight > 0."""

    logprobs: Tensor  # [R] float32, log p(y_t)
    kl: Tensor  # [R] float32, sum_i w_i D_i
    entropy: Tensor  # [R] float32, nats
    bounded: Tensor  # [R] bool, a bound of the ratio was active
    dense_sq: Tensor  # [] float64, squared norm of the dense part of dz
    sparse_sq: Tensor  # [] float64, squared norm of the sparse part of dz
    dense_sparse: Tensor  # [] float64, inner product of the two parts


def hybrid_head_loss(
    hidden: Tensor,
    lm_head: Tensor,
    teachers: tuple[Teacher, ...],
    columns: TokenColumns,
    rule: HeadRule,
) -> tuple[Tensor, HeadStats]:
    """The loss whose gradient is the hybrid gradient, and statistics.

    The loss is sum_rows token_weight (sum_i w_i D_i + G f(rho) log p(y)), a surrogate: its gradient
    is exact, its value is not J. Softmaxes are computed in fp32 (fp64 for fp64 inputs) whatever the
    dtype of the inputs.

    Args:
        hidden: [R, H] student hidden states; receives a gradient.
        lm_head: [V, H] student output embedding; receives a gradient if it requires one.
        teachers: any number, each over the same vocabulary.
        columns: the objective's coefficients of each token, R rows.

    Returns:
        loss [] and HeadStats.
    """
    assert hidden.ndim == 2 and lm_head.ndim == 2 and hidden.shape[1] == lm_head.shape[1], (
        hidden.shape,
        lm_head.shape,
    )
    rows = hidden.shape[0]
    assert all(column.shape == (rows,) for column in columns), rows
    assert all(teacher.weight.shape == (rows,) for teacher in teachers), "one weight a token"
    hidden = _operand(hidden, rule)
    lm_head = _operand(lm_head, rule)
    teachers = tuple(
        _wide_hidden(teacher, rule) if isinstance(teacher, HiddenTeacher) else teacher
        for teacher in teachers
    )
    loss, logprobs, kl, entropy, bounded, dense_sq, sparse_sq, dense_sparse = _HybridHead.apply(
        hidden, lm_head, teachers, columns, rule
    )
    return loss, HeadStats(
        logprobs=logprobs,
        kl=kl,
        entropy=entropy,
        bounded=bounded,
        dense_sq=dense_sq,
        sparse_sq=sparse_sq,
        dense_sparse=dense_sparse,
    )


class _HybridHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, lm_head, teachers, columns, rule):
        rows = hidden.shape[0]
        wide = softmax_dtype(hidden)
        workspace = Workspace(exact=rule.exact_logits)
        logprobs, kl, entropy = (
            torch.zeros(rows, dtype=wide, device=hidden.device) for _ in range(3)
        )
        bounded = torch.zeros(rows, dtype=torch.bool, device=hidden.device)
        # loss, dense_sq, sparse_sq, dense_sparse
        sums = torch.zeros(4, dtype=torch.float64, device=hidden.device)
        d_hidden = torch.zeros_like(hidden)
        head = lm_head.to(hidden.dtype)
        row_rule = RowRule(
            temperature=rule.temperature,
            measure=rule.measure,
            ratio=rule.ratio,
            correction=rule.correction,
        )
        forms = tuple(t.form for t in teachers)
        d_head: Tensor | None = None  # None: the output embedding does not train
        if ctx.needs_input_grad[1]:
            d_head = head_gradient(lm_head, hidden.dtype, chunks=-(-rows // rule.chunk))
        if d_head is not None and not rows:
            d_head.zero_()

        def work_on(piece: slice, d_logits: Tensor) -> None:
            """Fill the rows [p, V] of the logit gradients. It is a function so that the logits and
            evidence are freed before any other matrix is allocated.
            """
            workspace.restart(in_use=1)
            logits = workspace.logits(hidden[piece], head, place=d_logits)
            evidence = tuple(teacher.evidence(piece, len(head), workspace) for teacher in teachers)
            weights = tuple(teacher.weight[piece] for teacher in teachers)
            work = row_work(row_rule, forms, logits, hidden.dtype)
            result = work(logits, evidence, weights, columns.at(piece))
            logprobs[piece] = result.logprobs
            kl[piece] = result.kl
            entropy[piece] = result.entropy
            bounded[piece] = result.bounded
            summed = (result.loss, result.dense_sq, result.sparse_sq, result.dense_sparse)
            sums.add_(torch.stack(summed).sum(1, dtype=torch.float64))
            if result.gradient.data_ptr() != d_logits.data_ptr():
                d_logits.copy_(result.gradient)

        def work_on_chunk(at: slice) -> None:
            workspace.restart()
            d_logits = workspace.matrix(at.stop - at.start, len(head), hidden)  # [c, V]
            for piece in slices(at.start, at.stop, rule.chunk if hidden.is_cuda else PIECE):
                work_on(piece, d_logits[piece.start - at.start : piece.stop - at.start])
            torch.mm(d_logits, head, out=d_hidden[at])
            if d_head is not None:
                add_head_gradient(d_head, d_logits, hidden[at], first=at.start == 0)

        for at in slices(0, rows, rule.chunk):
            work_on_chunk(at)
        ctx.save_for_backward(d_hidden, None if d_head is None else d_head.to(lm_head.dtype))
        stats = (logprobs, kl, entropy, bounded, *sums[1:].clone())
        ctx.mark_non_differentiable(*stats)
        return (sums[0].to(wide), *stats)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        d_hidden, d_head = ctx.saved_tensors
        # On a GPU, reading grad_loss would take longer than the multiplication.
        if not (grad_loss.is_cpu and grad_loss == 1):
            # In place, because a second d_head would be the largest tensor of all. torch refuses
            # another backward pass through the same graph, so nothing reads the old values.
            d_hidden.mul_(grad_loss)
            if d_head is not None:
                d_head.mul_(grad_loss)
        return d_hidden, d_head, None, None, None


def chosen_logprobs(hidden: Tensor, lm_head: Tensor, token_ids: Tensor, rule: HeadRule) -> Tensor:
    """log softmax(hidden lm_head^T / temperature) at the given ids, chunk by chunk, no gradient.

    Args:
        hidden: [R, H].
        lm_head: [V, H].
        token_ids: [R, K] int64.

    Returns:
        [R, K] float32 (float64 for fp64 inputs).
    """
    assert hidden.ndim == 2 and token_ids.ndim == 2 and token_ids.shape[0] == hidden.shape[0], (
        hidden.shape,
        token_ids.shape,
    )
    out = torch.zeros(token_ids.shape, dtype=softmax_dtype(hidden), device=hidden.device)
    for at, logits in _logits(hidden, lm_head, rule):
        out[at] = chosen_work(rule.temperature, logits)(logits, token_ids[at])
    return out


def vocabulary_logprobs(hidden: Tensor, lm_head: Tensor, rule: HeadRule) -> Tensor:
    """log softmax over the whole vocabulary, no gradient: [R, V] float32 (float64 for fp64)."""
    out = torch.zeros(len(hidden), len(lm_head), dtype=softmax_dtype(hidden), device=hidden.device)
    for at, logits in _logits(hidden, lm_head, rule):
        out[at] = log_softmax(logits, rule.temperature)
    return out


def top_logprobs(hidden: Tensor, lm_head: Tensor, k: int, rule: HeadRule) -> tuple[Tensor, Tensor]:
    """The K most likely tokens of each row: ids [R, K] int64 and log-probs [R, K] float32 (float64
    for fp64 inputs), no gradient.
    """
    assert 1 <= k <= lm_head.shape[0], (k, lm_head.shape)
    ids = torch.zeros(len(hidden), k, dtype=torch.int64, device=hidden.device)
    out = torch.zeros(len(hidden), k, dtype=softmax_dtype(hidden), device=hidden.device)
    for at, logits in _logits(hidden, lm_head, rule):
        ids[at] = logits.topk(k, dim=-1).indices
        out[at] = chosen_work(rule.temperature, logits)(logits, ids[at])
    return ids, out


def compared_sums(
    hidden: Tensor,
    lm_head: Tensor,
    teachers: tuple[Teacher, ...],
    columns: TokenColumns,
    rule: HeadRule,
) -> Tensor:
    """[1 + len(COMPARED)] float64: the number of (live token, teacher) pairs, and the sums of
    ops.compare over them, no gradient.

    Teachers whose distribution is known only on a support are left out.
    """
    sums = torch.zeros(1 + len(COMPARED), dtype=torch.float64, device=hidden.device)
    workspace = Workspace(exact=rule.exact_logits)
    whole = [
        _wide_hidden(teacher, rule) if isinstance(teacher, HiddenTeacher) else teacher
        for teacher in teachers
        if not isinstance(teacher, SupportTeacher)
    ]
    for at, logits in _logits(hidden, lm_head, rule) if whole else ():
        logp = log_softmax(logits, rule.temperature)
        for teacher in whole:
            workspace.restart()  # the student's logits are no longer needed
            logq = distribution(
                teacher.form,
                teacher.evidence(at, len(lm_head), workspace),
                logp.dtype,
                rule.temperature,
            )
            live = (columns.token_weight[at] > 0) & (teacher.weight[at] != 0)
            sums += torch.cat(
                [live.sum()[None].double(), compare(logp, logq)[live].double().sum(0)]
            )
    return sums


def _logits(hidden: Tensor, lm_head: Tensor, rule: HeadRule) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of rows and their logits [c, V], no gradient."""
    hidden = _operand(hidden.detach(), rule)
    lm_head = _operand(lm_head.detach(), rule)
    workspace = Workspace(exact=rule.exact_logits)
    for at in slices(0, len(hidden), rule.chunk):
        workspace.restart()
        yield at, workspace.logits(hidden[at], lm_head)


def _operand(matrix: Tensor, rule: HeadRule) -> Tensor:
    """The matrix in the dtype in which it is multiplied."""
    widens = rule.wide_products and matrix.device.type == "cpu" and matrix.dtype is torch.bfloat16
    return matrix.float() if widens else matrix


def _wide_hidden(teacher: HiddenTeacher, rule: HeadRule) -> HiddenTeacher:
    """The teacher with its matrices in the dtype in which they are multiplied."""
    hidden = _operand(teacher.hidden, rule)
    return replace(teacher, hidden=hidden, lm_head=_operand(teacher.lm_head, rule))


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, stop)) for at in range(start, stop, size))
