"""The head: one pass over the vocabulary makes the dense and the sparse gradient together.

Per response token the gradient of J at the student's logits z is (arXiv 2512.23097)

    dz = token_weight * [ sum_i w_i p (log p - log q_i - KL_i)  +  G (onehot(y) - p) ] / temperature

so both terms need the same softmax. The gradients with respect to the hidden states and the lm_head are made in
the forward, chunk by chunk of response tokens; full logits [R, V] never exist. G is fixed before the pass, so the
sparse term costs no extra matrix product.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridrl.ops.divergence import reverse_kl, reverse_kl_logit_gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTerms:
    """What the objective asks of each response token, one row each.

    Example: plain distillation of two tokens in a batch of 10: sparse (0, 0), token_weight (0.1, 0.1).
    """

    token_ids: Tensor  # [R] int64, y_t
    token_weight: Tensor  # [R] float32, 1/normaliser; 0 takes the token out
    sparse: Tensor  # [R] float32, G_{t+1} minus its baseline, a COST: positive pushes the token down


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRows:
    """One teacher's view of the same tokens."""

    hidden: Tensor  # [R, Ht] last hidden state before each token
    lm_head: Tensor  # [V, Ht]
    weight: float  # w_i


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadStats:
    """What the pass saw, without gradient. Sums are over rows with token_weight > 0."""

    logprobs: Tensor  # [R] float32, log p(y_t)
    kl: Tensor  # [R] float32, sum_i w_i KL_i
    entropy: Tensor  # [R] float32, nats
    dense_sq: Tensor  # [] float64, squared norm of the dense part of dz
    sparse_sq: Tensor  # [] float64, squared norm of the sparse part of dz


def hybrid_head_loss(
    hidden: Tensor, lm_head: Tensor, teachers: tuple[TeacherRows, ...], terms: TokenTerms, *, temperature: float, chunk: int
) -> tuple[Tensor, HeadStats]:
    """Loss whose gradient is the hybrid gradient, and statistics.

    The value is sum_rows token_weight (sum_i w_i KL_i + G log p(y)), a surrogate: its gradient is exact, its value is
    not J. Softmaxes run in fp32 (fp64 for fp64 inputs) whatever the dtype of the inputs.

    Args:
        hidden: [R, H] student hidden states; receives a gradient.
        lm_head: [V, H] student output embedding; receives a gradient.
        teachers: any number, each with the same vocabulary.
        terms: what the objective asks, [R] each.
        temperature: of student and teacher alike.
        chunk: rows whose logits exist at once.

    Returns:
        loss [] and HeadStats.
    """
    assert hidden.ndim == 2 and lm_head.ndim == 2 and hidden.shape[1] == lm_head.shape[1], (hidden.shape, lm_head.shape)
    rows = hidden.shape[0]
    assert terms.token_ids.shape == terms.token_weight.shape == terms.sparse.shape == (rows,), rows
    for teacher in teachers:
        assert teacher.hidden.shape[0] == rows and teacher.lm_head.shape[0] == lm_head.shape[0], "same tokens, same vocabulary"
    loss, logprobs, kl, entropy, dense_sq, sparse_sq = _HybridHead.apply(hidden, lm_head, teachers, terms, temperature, chunk)
    return loss, HeadStats(logprobs=logprobs, kl=kl, entropy=entropy, dense_sq=dense_sq, sparse_sq=sparse_sq)


class _HybridHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, lm_head, teachers, terms, temperature, chunk):
        rows, wide = hidden.shape[0], _softmax_dtype(hidden)
        logprobs, kl, entropy = (torch.zeros(rows, dtype=wide, device=hidden.device) for _ in range(3))
        sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)  # loss, dense_sq, sparse_sq
        d_hidden = torch.zeros_like(hidden)
        d_head = torch.zeros(lm_head.shape, dtype=wide, device=lm_head.device)
        for start in range(0, rows, chunk):
            at = slice(start, min(start + chunk, rows))
            logp = _log_softmax(hidden[at], lm_head, temperature)  # [c, V]
            dense = torch.zeros_like(logp)
            for teacher in teachers:
                logq = _log_softmax(teacher.hidden[at].to(hidden.dtype), teacher.lm_head, temperature)
                kl[at] += teacher.weight * reverse_kl(logp, logq)
                dense += teacher.weight * reverse_kl_logit_gradient(logp, logq)
            weight, cost, ids = terms.token_weight[at].to(wide), terms.sparse[at].to(wide), terms.token_ids[at, None]
            p = logp.exp()
            logprobs[at] = logp.gather(1, ids).squeeze(1)
            entropy[at] = -torch.where(p > 0, p * logp, 0.0).sum(-1)
            live = weight > 0  # a row of weight 0 may hold an infinite KL, and 0 * inf is not 0
            dense = torch.where(live[:, None], dense * (weight / temperature)[:, None], 0.0)
            sparse = p.mul_((-weight * cost / temperature)[:, None])  # G (onehot - p), the onehot added in place
            sparse.scatter_add_(1, ids, (weight * cost / temperature)[:, None])
            sums[0] += torch.where(live, weight * (kl[at] + cost * logprobs[at]), 0.0).sum(dtype=torch.float64)
            sums[1] += dense.square().sum(dtype=torch.float64)
            sums[2] += sparse.square().sum(dtype=torch.float64)
            d_logits = dense.add_(sparse).to(hidden.dtype)
            d_hidden[at] = d_logits @ lm_head.to(hidden.dtype)
            d_head += (d_logits.T @ hidden[at]).to(wide)
        ctx.save_for_backward(d_hidden, d_head.to(lm_head.dtype))
        stats = (logprobs, kl, entropy, sums[1].clone(), sums[2].clone())
        ctx.mark_non_differentiable(*stats)
        return (sums[0].to(wide), *stats)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        d_hidden, d_head = ctx.saved_tensors
        return (grad_loss * d_hidden).to(d_hidden.dtype), (grad_loss * d_head).to(d_head.dtype), None, None, None, None


def chosen_logprobs(hidden: Tensor, lm_head: Tensor, token_ids: Tensor, *, temperature: float, chunk: int) -> Tensor:
    """log softmax(hidden lm_head^T / temperature) at the given ids, chunk by chunk, no gradient.

    Args:
        hidden: [R, H]; lm_head: [V, H]; token_ids: [R] int64.

    Returns:
        [R] float32
    """
    assert hidden.ndim == 2 and token_ids.shape == hidden.shape[:1], (hidden.shape, token_ids.shape)
    out = torch.zeros(hidden.shape[0], dtype=_softmax_dtype(hidden), device=hidden.device)
    with torch.no_grad():
        for start in range(0, hidden.shape[0], chunk):
            at = slice(start, start + chunk)
            out[at] = _log_softmax(hidden[at], lm_head, temperature).gather(1, token_ids[at, None]).squeeze(1)
    return out


def _softmax_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _log_softmax(hidden: Tensor, lm_head: Tensor, temperature: float) -> Tensor:
    """[c, H] x [V, H] -> [c, V] normalised log-probabilities in fp32 or fp64."""
    logits = hidden @ lm_head.to(hidden.dtype).T
    return torch.log_softmax(logits.to(_softmax_dtype(hidden)) / temperature, dim=-1)
