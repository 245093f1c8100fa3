"""The head: one pass over the vocabulary makes the dense and the sparse gradient together.

Per response token the gradient of J at the student's logits z is (arXiv 2512.23097, any divergence of ops.divergence)

    dz = token_weight * [ sum_i w_i dD_i/dz  +  G f(rho) (onehot(y) - p) ] / temperature

so both terms need the same softmax. The gradients with respect to the hidden states and the lm_head are made in
the forward, chunk by chunk of response tokens; full logits [R, V] never exist. G is fixed before the pass, so the
sparse term costs no extra matrix product.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridrl.ops.compare import COMPARED, compare
from hybridrl.ops.divergence import Measure
from hybridrl.ops.ratio import RatioBounds
from hybridrl.ops.teachers import SupportTeacher, Teacher, log_softmax, softmax_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTerms:
    """What the objective asks of each response token, one row each.

    Example: plain distillation of two tokens in a batch of 10: sparse (0, 0), token_weight (0.1, 0.1).
    """

    token_ids: Tensor  # [R] int64, y_t
    token_weight: Tensor  # [R] float32, 1/normaliser; 0 takes the token out
    sparse: Tensor  # [R] float32, G_{t+1} minus its baseline, a COST: positive pushes the token down
    sampler_logprobs: Tensor  # [R] float32, log mu(y_t), the denominator of rho


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRule:
    """The settings of the pass, the same for every row."""

    temperature: float = 1.0  # of student and teacher alike
    chunk: int = 1024  # rows whose logits exist at once
    measure: Measure = field(default_factory=Measure)
    ratio: RatioBounds = field(default_factory=RatioBounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadStats:
    """What the pass saw, without gradient. Sums are over rows with token_weight > 0."""

    logprobs: Tensor  # [R] float32, log p(y_t)
    kl: Tensor  # [R] float32, sum_i w_i D_i
    entropy: Tensor  # [R] float32, nats
    bounded: Tensor  # [R] bool, a bound of the ratio was active
    dense_sq: Tensor  # [] float64, squared norm of the dense part of dz
    sparse_sq: Tensor  # [] float64, squared norm of the sparse part of dz
    dense_sparse: Tensor  # [] float64, inner product of the two parts


def hybrid_head_loss(
    hidden: Tensor, lm_head: Tensor, teachers: tuple[Teacher, ...], terms: TokenTerms, rule: HeadRule
) -> tuple[Tensor, HeadStats]:
    """Loss whose gradient is the hybrid gradient, and statistics.

    The value is sum_rows token_weight (sum_i w_i D_i + G f(rho) log p(y)), a surrogate: its gradient is exact, its
    value is not J. Softmaxes run in fp32 (fp64 for fp64 inputs) whatever the dtype of the inputs.

    Args:
        hidden: [R, H] student hidden states; receives a gradient.
        lm_head: [V, H] student output embedding; receives a gradient.
        teachers: any number, each over the same vocabulary.
        terms: what the objective asks, [R] each.

    Returns:
        loss [] and HeadStats.
    """
    assert hidden.ndim == 2 and lm_head.ndim == 2 and hidden.shape[1] == lm_head.shape[1], (hidden.shape, lm_head.shape)
    rows = hidden.shape[0]
    assert terms.token_ids.shape == terms.token_weight.shape == terms.sparse.shape == terms.sampler_logprobs.shape == (rows,), rows
    assert all(teacher.weight.shape == (rows,) for teacher in teachers), "one weight a token"
    loss, *stats = _HybridHead.apply(hidden, lm_head, teachers, terms, rule)
    names = ("logprobs", "kl", "entropy", "bounded", "dense_sq", "sparse_sq", "dense_sparse")
    return loss, HeadStats(**dict(zip(names, stats, strict=True)))


class _HybridHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, lm_head, teachers, terms, rule):
        rows, wide = hidden.shape[0], softmax_dtype(hidden)
        logprobs, kl, entropy = (torch.zeros(rows, dtype=wide, device=hidden.device) for _ in range(3))
        bounded = torch.zeros(rows, dtype=torch.bool, device=hidden.device)
        sums = torch.zeros(4, dtype=torch.float64, device=hidden.device)  # loss, dense_sq, sparse_sq, dense_sparse
        d_hidden = torch.zeros_like(hidden)
        d_head = torch.zeros(lm_head.shape, dtype=wide, device=lm_head.device)
        for start in range(0, rows, rule.chunk):
            at = slice(start, min(start + rule.chunk, rows))
            logp = log_softmax(hidden[at], lm_head, rule.temperature)  # [c, V]
            dense = torch.zeros_like(logp)
            for teacher in teachers:
                value, gradient = teacher.compare(at, logp, rule.measure, rule.temperature)
                w = teacher.weight[at].to(wide)
                heard = w != 0  # a token this teacher is not asked about may hold anything, and 0 * inf is not 0
                kl[at] += torch.where(heard, w * value, 0.0)
                dense += torch.where(heard[:, None], w[:, None] * gradient, 0.0)
            weight, ids = terms.token_weight[at].to(wide), terms.token_ids[at, None]
            p = logp.exp()
            logprobs[at] = logp.gather(1, ids).squeeze(1)
            entropy[at] = -torch.where(p > 0, p * logp, 0.0).sum(-1)
            live = weight > 0
            cost = terms.sparse[at].to(wide)
            factor, bounded[at] = rule.ratio.factor(logprobs[at] - terms.sampler_logprobs[at].to(wide), cost)
            cost = torch.where(live, cost * factor, 0.0)
            dense = torch.where(live[:, None], dense * (weight / rule.temperature)[:, None], 0.0)
            sparse = p.mul_((-weight * cost / rule.temperature)[:, None])  # G (onehot - p), the onehot added in place
            sparse.scatter_add_(1, ids, (weight * cost / rule.temperature)[:, None])
            sums[0] += torch.where(live, weight * (kl[at] + cost * logprobs[at]), 0.0).sum(dtype=torch.float64)
            sums[1] += dense.square().sum(dtype=torch.float64)
            sums[2] += sparse.square().sum(dtype=torch.float64)
            sums[3] += torch.linalg.vecdot(dense, sparse).sum(dtype=torch.float64)
            d_logits = dense.add_(sparse).to(hidden.dtype)
            d_hidden[at] = d_logits @ lm_head.to(hidden.dtype)
            d_head += (d_logits.T @ hidden[at]).to(wide)
        ctx.save_for_backward(d_hidden, d_head.to(lm_head.dtype))
        stats = (logprobs, kl, entropy, bounded, *sums[1:].clone())
        ctx.mark_non_differentiable(*stats)
        return (sums[0].to(wide), *stats)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        d_hidden, d_head = ctx.saved_tensors
        return (grad_loss * d_hidden).to(d_hidden.dtype), (grad_loss * d_head).to(d_head.dtype), None, None, None


def chosen_logprobs(hidden: Tensor, lm_head: Tensor, token_ids: Tensor, *, temperature: float, chunk: int) -> Tensor:
    """log softmax(hidden lm_head^T / temperature) at the given ids, chunk by chunk, no gradient.

    Args:
        hidden: [R, H]; lm_head: [V, H]; token_ids: [R, K] int64.

    Returns:
        [R, K] float32
    """
    assert hidden.ndim == 2 and token_ids.ndim == 2 and token_ids.shape[0] == hidden.shape[0], (hidden.shape, token_ids.shape)
    out = torch.zeros(token_ids.shape, dtype=softmax_dtype(hidden), device=hidden.device)
    with torch.no_grad():
        for start in range(0, hidden.shape[0], chunk):
            at = slice(start, start + chunk)
            out[at] = log_softmax(hidden[at], lm_head, temperature).gather(1, token_ids[at])
    return out


def vocabulary_logprobs(hidden: Tensor, lm_head: Tensor, *, temperature: float, chunk: int) -> Tensor:
    """log softmax over the whole vocabulary, [R, V] float32, no gradient."""
    with torch.no_grad():
        pieces = [log_softmax(hidden[start : start + chunk], lm_head, temperature) for start in range(0, hidden.shape[0], chunk)]
    return torch.cat(pieces)


def top_logprobs(hidden: Tensor, lm_head: Tensor, k: int, *, temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
    """The K most likely tokens of each row: ids [R, K] int64 and log-probs [R, K] float32, no gradient."""
    assert 1 <= k <= lm_head.shape[0], (k, lm_head.shape)
    found = []
    with torch.no_grad():
        for start in range(0, hidden.shape[0], chunk):
            found.append(log_softmax(hidden[start : start + chunk], lm_head, temperature).topk(k, dim=-1))
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


def compared_sums(hidden: Tensor, lm_head: Tensor, teachers: tuple[Teacher, ...], terms: TokenTerms, rule: HeadRule) -> Tensor:
    """[1 + len(COMPARED)] float64: number of (live token, teacher) pairs, and the sums of ops.compare over them, no gradient.

    Teachers whose distribution is known on a support only are left out.
    """
    sums = torch.zeros(1 + len(COMPARED), dtype=torch.float64, device=hidden.device)
    whole = [teacher for teacher in teachers if not isinstance(teacher, SupportTeacher)]
    with torch.no_grad():
        for start in range(0, hidden.shape[0] if whole else 0, rule.chunk):
            at = slice(start, min(start + rule.chunk, hidden.shape[0]))
            logp = log_softmax(hidden[at], lm_head, rule.temperature)
            for teacher in whole:
                live = (terms.token_weight[at] > 0) & (teacher.weight[at] != 0)
                found = compare(logp, teacher.distribution(at, logp, rule.temperature))[live].double()
                sums += torch.cat([live.sum()[None].double(), found.sum(0)])
    return sums
