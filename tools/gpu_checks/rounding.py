"""Bounds on rounding errors, derived from the dtype's epsilon and the length of the sums."""

import math
from collections.abc import Sequence

import torch

CHAIN = 4
"""The number of roundings in a logit gradient that are as large as that of one product: the
student's logits, the teacher's logits, the normaliser, and the product with the output embedding.
"""

SUBLAYERS = 8  # attention and MLP of the 4 layers of the shipped tiny models
WIDEST = 336  # number of terms in their longest product
WORDS = 23  # number of tokens in their vocabulary
GAP_REASON = (
    f"an epsilon in each of {SUBLAYERS} sublayers and 4 sums of float32, of a log-prob of ln "
    f"{WORDS}"
)


def epsilon(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number: 2**-23 in float32, 2**-7 in bfloat16."""
    return torch.finfo(dtype).eps


def of_sums(terms: int) -> float:
    """A bound on the relative error of results that are sums of `terms` products in float32.

    Every addition rounds by at most half an epsilon. The roundings are independent, so the error
    grows with the square root of their number (Higham and Mary, SIAM J. Sci. Comput. 41, 2019).
    TF32, whose epsilon is 2**-10, exceeds the bound for fewer than 4 million terms.

    Example: of_sums(1024) == 4 * 2**-23 * 32 == 1.5e-5.
    """
    return CHAIN * epsilon(torch.float32) * math.sqrt(terms)


def of_gradient(dtype: torch.dtype, terms: int) -> float:
    """A bound on the relative error of a gradient of the head pass, whose inputs are exact in
    `dtype`.

    In a narrow dtype it is rounded twice, by at most half an epsilon each: the gradient at the
    logits, and the result.
    """
    narrow = 0.0 if dtype is torch.float32 else epsilon(dtype)
    return narrow + of_sums(terms)


def of_layers(dtype: str) -> float:
    """A bound on the relative error of losses and gradients of the tiny model, which are sums over
    up to 512 tokens.

    Every sublayer rounds what it adds to the residual stream, independently of the others.
    """
    narrow = epsilon(getattr(torch, dtype))
    return CHAIN * narrow * math.sqrt(SUBLAYERS) + of_sums(512)


def logprob_gap(dtype: str) -> float:
    """A bound, in nats, on the mean difference of the log-probs that two workers compute from the
    same weights of the tiny model with different kernels and batches.

    Example: 0.069 in bfloat16, 2.8e-5 in float32.
    """
    narrow = epsilon(getattr(torch, dtype)) * math.sqrt(SUBLAYERS)
    return (narrow + of_sums(WIDEST)) * math.log(WORDS)


def largest(errors: Sequence[float]) -> float:
    """The largest of the errors; NaN if any of them is NaN."""
    return float(torch.tensor(errors, dtype=torch.float64).max())
