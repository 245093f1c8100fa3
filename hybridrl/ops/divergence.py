"""Per-token divergences between student and teacher, and their gradients at the logits in closed form."""

import torch
from torch import Tensor


def reverse_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v).

    Args:
        student_logprobs, teacher_logprobs: [..., V], each normalised.

    Returns:
        [...]
    """
    return _expected(student_logprobs.exp(), student_logprobs - teacher_logprobs)


def reverse_kl_logit_gradient(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """d KL(p || q) / d z = p * (log p - log q - KL): zero exactly where p = q, sums to 0 over the vocabulary.

    arXiv 2512.23097, proposition 4: equal to the expectation over y ~ p of grad log p(y) (log p(y) - log q(y)), so
    the dense term has no sampling variance.

    Args:
        student_logprobs, teacher_logprobs: [..., V], each normalised.

    Returns:
        [..., V]
    """
    p = student_logprobs.exp()
    cost = student_logprobs - teacher_logprobs
    kl = _expected(p, cost)
    return torch.where(p > 0, p * (cost - kl.unsqueeze(-1)), 0.0)


def _expected(p: Tensor, values: Tensor) -> Tensor:
    """sum_v p_v values_v, where p_v = 0 contributes 0 even against an infinite value."""
    return torch.where(p > 0, p * values, 0.0).sum(dim=-1)
