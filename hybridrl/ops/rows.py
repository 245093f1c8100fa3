"""The work on rows: from the logits of a chunk to their gradient and statistics, one function of plain tensors.

On the CPU that function is compiled for large vocabularies (torch.compile, its C++ backend): one loop over a row for
each sum that the next one needs, nothing of size [c, V] in between, the gradient in the place of the logits.
"""

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hybridrl.choices import Correction
from hybridrl.ops.divergence import Measure, exp
from hybridrl.ops.ratio import RatioBounds
from hybridrl.ops.teachers import Form, divergence, log_softmax

Work = Callable[..., Any]
"""A function of a chunk's tensors."""

COMPILE_FROM = 4096
"""Vocabulary from which the rows are worth a compilation (10 s once, kept on disk by torch): below, eager is as fast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTerms:
    """What the objective asks of each response token, one row each.

    Example: plain distillation of two tokens in a batch of 10: sparse (0, 0), token_weight (0.1, 0.1).
    """

    token_ids: Tensor  # [R] int64, y_t
    token_weight: Tensor  # [R] float32, 1/normaliser; 0 takes the token out
    sparse: Tensor  # [R] float32, G_{t+1} minus its baseline, a COST: positive pushes the token down
    sampler_logprobs: Tensor  # [R] float32, log mu(y_t), the denominator of rho

    def rows(self, at: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.token_ids[at], self.token_weight[at], self.sparse[at], self.sampler_logprobs[at]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRule:
    """The settings that the work on a row depends on."""

    temperature: float = 1.0  # of student and teacher alike
    measure: Measure = field(default_factory=Measure)
    ratio: RatioBounds = field(default_factory=RatioBounds)


def row_gradients(
    rule: RowRule,
    forms: tuple[Form | Correction, ...],
    dtype: torch.dtype,
    logits: Tensor,
    evidence: tuple[tuple[Tensor, ...], ...],
    weights: tuple[Tensor, ...],
    terms: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, ...]:
    """The hybrid gradient at the logits of c tokens; the formula stands in ops.head.

    Args:
        forms: how each teacher's evidence is to be read.
        dtype: of the gradient; where it is that of the logits, the gradient takes their place in memory.
        logits: [c, V], before the temperature.
        evidence, weights: of each teacher; a weight is [c].
        terms: TokenTerms.rows.

    Returns:
        gradient [c, V]; log p(y), sum_i w_i D_i, entropy, whether the ratio was bounded, the row's loss; the row's squared norms
        of the dense and the sparse part and their inner product: [c] each.
    """
    ids, weight, cost, sampler = terms
    logp = log_softmax(logits, rule.temperature)
    wide = logp.dtype
    dense, kl = torch.zeros_like(logp), torch.zeros_like(logp[:, 0])
    for form, said, w in zip(forms, evidence, weights, strict=True):
        w = w.to(wide)
        value, gradient = divergence(form, said, logp, rule.measure, rule.temperature)
        heard = w != 0  # a token this teacher is not asked about may hold anything, and 0 * inf is not 0
        kl = kl + torch.where(heard, w * value, 0.0)
        dense = dense + torch.where(heard[:, None], w[:, None] * gradient, 0.0)
    p = exp(logp)
    drawn = logp.gather(1, ids[:, None]).squeeze(1)
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(-1)
    weight, cost = weight.to(wide), cost.to(wide)
    live = weight > 0
    factor, bounded = rule.ratio.factor(drawn - sampler.to(wide), cost)
    cost = torch.where(live, cost * factor, 0.0)
    dense = torch.where(live[:, None], dense * (weight / rule.temperature)[:, None], 0.0)
    onehot = torch.arange(logits.shape[1], device=logits.device, dtype=torch.int32)[None] == ids.to(torch.int32)[:, None]
    sparse = (weight * cost / rule.temperature)[:, None] * torch.where(onehot, 1 - p, -p)
    loss = torch.where(live, weight * (kl + cost * drawn), 0.0)
    norms = (dense * dense).sum(-1), (sparse * sparse).sum(-1), (dense * sparse).sum(-1)
    gradient = (dense + sparse).to(dtype)
    if dtype == logits.dtype:
        gradient = logits.copy_(gradient)
    return gradient, drawn, kl, entropy, bounded, loss, *norms


def row_work(rule: RowRule, forms: tuple[Form | Correction, ...], logits: Tensor, dtype: torch.dtype) -> Work:
    """`row_gradients` of (logits, evidence, weights, terms), compiled where that pays."""
    return _compiled(row_gradients, rule, forms, dtype) if pays(logits) else partial(row_gradients, rule, forms, dtype)


def chosen_work(temperature: float, logits: Tensor) -> Work:
    """log p of (logits [c, V], ids [c, K]), [c, K]; compiled where that pays."""
    return _compiled(_chosen, temperature) if pays(logits) else partial(_chosen, temperature)


def _chosen(temperature: float, logits: Tensor, ids: Tensor) -> Tensor:
    return log_softmax(logits, temperature).gather(1, ids)


def pays(logits: Tensor) -> bool:
    """Whether work on these rows is to be compiled: a function of the problem alone, so that a run repeats itself."""
    rows, vocabulary = logits.shape
    large = rows > 1 and vocabulary >= COMPILE_FROM  # a graph for any number of rows starts at 2
    return large and logits.device.type == "cpu" and logits.dtype is not torch.float64 and has_compiler()


@lru_cache
def _compiled(work: Work, *settings: Any) -> Work:
    """`work` with its settings, as one graph for any number of rows."""

    def whole(*tensors: Any) -> Any:
        return work(*settings, *tensors)

    compiled = torch.compile(whole, fullgraph=True, options=FUSE, isolate_recompiles=True)

    def run(*tensors: Any) -> Any:
        for tensor in tree_leaves(tensors):
            torch._dynamo.mark_dynamic(tensor, 0)
        return compiled(*tensors)

    return run


FUSE = {"realize_reads_threshold": 1 << 20, "realize_opcount_threshold": 1 << 20, "realize_acc_reads_threshold": 1 << 20}
"""To the C++ backend: compute again what a loop needs rather than write it to memory."""


@lru_cache
def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler; without one the rows are worked on eagerly, with a warning."""
    found = shutil.which(os.environ.get("CXX", "g++")) is not None
    if not found:
        warnings.warn("no C++ compiler (g++, or CXX): the loss over the vocabulary runs eagerly, several times slower", stacklevel=2)
    return found
