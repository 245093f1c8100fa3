"""How far results may be from exact ones, by the dtype's epsilon and the length of the sums."""

import math
from collections.abc import Sequence

import torch

CHAIN = 4
"""Roundings of a logit gradient that are as large as that of one product: the student's logits, the
teacher's logits, the normaliser, and the product with the output embedding."""

SUBLAYERS = 8  # attention and MLP of the 4 layers of the shipped tiny models
WIDEST = 336  # terms of their longest product
WORDS = 23  # tokens of their vocabulary
GAP_REASON = (
    f"an epsilon in each of {SUBLAYERS} sublayers and 4 sums of float32, of a log-prob of ln "
    f"{WORDS}"
)


def epsilon(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number: 2**-23 of float32, 2**-7 of bfloat16."""
    return torch.finfo(dtype).eps


def of_sums(terms: int) -> float:
    """The relative error of results that are sums of `terms` products in float32.

    Every addition rounds by at most half an epsilon, one independently of the other, so the error
    grows with the root of their number (Higham and Mary, SIAM J. Sci. Comput. 41, 2019). TF32,
    whose epsilon is 2**-10, is beyond it for fewer than 4 million terms.

    Example: of_sums(1024) == 4 * 2**-23 * 32 == 1.5e-5.
    """
    return CHAIN * epsilon(torch.float32) * math.sqrt(terms)


def of_gradient(dtype: torch.dtype, terms: int) -> float:
    """The relative error of a gradient of the head pass, whose inputs are exact in `dtype`.

    A narrow one is rounded twice, by at most half an epsilon each: at the logits, and as a result.
    """
    narrow = 0.0 if dtype is torch.float32 else epsilon(dtype)
    return narrow + of_sums(terms)


def of_layers(dtype: str) -> float:
    """The relative error of losses and gradients after a pass through the tiny model, which are
    sums over up to 512 tokens.

    Every sublayer rounds what it adds to the residual stream, one independently of the other.
    """
    narrow = epsilon(getattr(torch, dtype))
    return CHAIN * narrow * math.sqrt(SUBLAYERS) + of_sums(512)


def logprob_gap(dtype: str) -> float:
    """The mean difference, in nats, of log-probs that two workers compute from the same weights of
    the tiny model, by other kernels and in other batches.

    Example: 0.069 in bfloat16, 2.8e-5 in float32.
    """
    narrow = epsilon(getattr(torch, dtype)) * math.sqrt(SUBLAYERS)
    return (narrow + of_sums(WIDEST)) * math.log(WORDS)


def largest(errors: Sequence[float]) -> float:
    """The largest one, NaN if one of them is."""
    return float(torch.tensor(errors, dtype=torch.float64).max())
