"""Compares gradients and values of the head pass with fp64, for every kind of teacher evidence."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from benchmarks.head import Problem, Shape, problem
from torch import Tensor

from gpu_checks.check import Check, within
from gpu_checks.ground import Ground
from gpu_checks.rounding import epsilon, largest, of_gradient, of_sums
from hybridrl.kernels.head import HeadRule, HeadStats, hybrid_head_loss
from hybridrl.kernels.teacher_rows import (
    HiddenTeacher,
    SupportTeacher,
    Teacher,
    VocabularyTeacher,
)
from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.ops.divergence import Measure
from hybridrl.ops.ratio import RatioBounds
from hybridrl.settings.choices import Correction, Divergence, Ratio

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ON_GPU = Shape(rows=96, width=512, teacher_width=384, vocabulary=32003)
ON_CPU = Shape(rows=48, width=64, teacher_width=48, vocabulary=1031)
"""The vocabularies are primes, so the last block of a row is never full."""
PADDING = 5  # rows of the teacher's output embedding beyond the student's vocabulary
K = 16  # number of tokens in a support
FORMS = (
    "no teacher",
    "hidden states",
    "hidden states of two teachers",
    "whole vocabulary",
    *(f"support, {correction}" for correction in Correction),
)
BETA = 0.3  # beta of the JSD
TEMPERATURE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The results of one head pass, of N rows, V tokens and the student's width Hs."""

    d_hidden: Tensor  # [N, Hs]
    d_head: Tensor  # [V, Hs]
    loss: Tensor  # []
    stats: HeadStats


def numerics(ground: Ground) -> Iterator[Check]:
    """Check the largest errors of each kind of evidence in each dtype, over divergences and
    inputs.
    """
    shape = ON_GPU if ground.on_gpu else ON_CPU
    yield written_formula()
    for dtype, form in product(DTYPES, FORMS):
        gradient, value = largest_errors(form, shape, DTYPES[dtype], ground.device)
        terms = max(shape.vocabulary, shape.width)
        yield within(
            f"gradients, {form}, {dtype}",
            gradient,
            high=of_gradient(DTYPES[dtype], terms),
            unit="relative error",
            reason=gradient_reason(dtype),
        )
        yield within(
            f"values, {form}, {dtype}",
            value,
            high=of_sums(terms),
            unit="of a log-prob",
            reason="logits and softmax are float32 whatever the dtype: 4 sums of float32",
        )
    for dtype in DTYPES:
        yield near_teacher(shape, DTYPES[dtype], ground.device)


def gradient_reason(dtype: str) -> str:
    if dtype == "float32":
        return "4 sums of float32; TF32 would be beyond it"
    return "two roundings to bfloat16; logits that were rounded to it would be beyond this"


def largest_errors(form: str, shape: Shape, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """The largest relative errors of gradients and of values against fp64 on the CPU.

    Each divergence is computed twice: with a teacher that is independent of the student, and with
    one that is close to it, where rounded logits would cause large errors.
    """
    errors = [
        case_errors(form, shape, dtype, device, divergence, peaked=peaked)
        for divergence, peaked in product(Divergence, (False, True))
    ]
    gradients, values = zip(*errors, strict=True)
    return largest(gradients), largest(values)


def case_errors(
    form: str,
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    divergence: Divergence,
    *,
    peaked: bool,
) -> tuple[float, float]:
    p = problem(shape, dtype, "cpu", peaked=peaked)
    rule = HeadRule(
        chunk=40,  # does not divide the number of rows, so the last chunk is smaller
        measure=Measure(divergence=divergence, beta=BETA),
        ratio=RatioBounds(kind=Ratio.truncate, low=0.5, high=2.0),
        temperature=TEMPERATURE,
        exact_logits=device == "cpu",
    )
    columns = columns_of(p)
    teachers = teachers_of(form, p)
    found = run_pass(moved(p, device), teachers, columns, rule)
    exact = run_pass(widened(p), teachers, columns, rule)
    assert bool((found.stats.bounded.cpu() == exact.stats.bounded).all()), (
        "the bound of the ratio was active for other tokens"
    )
    return gradient_error(found, exact), value_error(found, exact, columns)


def gradient_error(found: Result, exact: Result) -> float:
    return largest(
        [error(found.d_hidden, exact.d_hidden), error(found.d_head, exact.d_head)],
    )


def value_error(found: Result, exact: Result, columns: TokenColumns) -> float:
    """The largest error of log-probs, divergences, entropies and loss, relative to the norm of the
    log-probs. All of these values are sums of log-probs, but a divergence itself may be near 0.
    """
    logprobs = exact.stats.logprobs
    of_tokens = [
        error(getattr(found.stats, name), getattr(exact.stats, name), scale=logprobs)
        for name in ("logprobs", "kl", "entropy")
    ]
    weight = columns.token_weight.double()
    scale = (weight * (1 + columns.sparse.double().abs()) * logprobs.abs()).sum()
    return largest([*of_tokens, error(found.loss, exact.loss, scale=scale)])


def run_pass(
    p: Problem, teachers: tuple[Teacher, ...], columns: TokenColumns, rule: HeadRule
) -> Result:
    """Run the head pass on the device and in the dtype of `p`, and its backward pass."""
    like = p.hidden
    wide = torch.float64 if like.dtype is torch.float64 else None
    columns = columns.to(like.device)
    if wide is not None:
        columns = columns.to(wide)
    loss, stats = hybrid_head_loss(
        p.hidden, p.lm_head, tuple(placed(t, like.device, wide) for t in teachers), columns, rule
    )
    loss.backward()
    assert p.hidden.grad is not None and p.lm_head.grad is not None
    return Result(d_hidden=p.hidden.grad, d_head=p.lm_head.grad, loss=loss.detach(), stats=stats)


def placed(teacher: Teacher, device: torch.device, dtype: torch.dtype | None) -> Teacher:
    """The teacher on another device, with its values in `dtype`; None: in their own dtypes."""
    of_tokens = teacher.to(device)
    changes = {
        name: value.to(device=device, dtype=dtype)
        for name in ("hidden", "lm_head", "logprobs", "weight")
        if (value := getattr(of_tokens, name, None)) is not None
    }
    return replace(of_tokens, **changes)


def columns_of(p: Problem) -> TokenColumns:
    """Columns with costs, weights and sampler log-probs; every seventh token has weight 0."""
    count = len(p.ids)
    g = torch.Generator().manual_seed(1)
    weight = torch.rand(count, generator=g) / count
    weight[::7] = 0.0
    logits = p.hidden.detach().double() @ p.lm_head.detach().double().T
    logprobs = torch.log_softmax(logits / TEMPERATURE, -1).gather(1, p.ids[:, None])[:, 0].float()
    sampler = logprobs + 0.5 * torch.randn(count, generator=g)
    return TokenColumns(
        token_ids=p.ids,
        token_weight=weight,
        sparse=p.cost,
        value_slope=torch.zeros(count),
        sampler_logprobs=sampler,
        old_logprobs=sampler,
    )


def teachers_of(form: str, p: Problem) -> tuple[Teacher, ...]:
    """The teachers of one of FORMS, on the CPU."""
    count = len(p.ids)
    weight = torch.full((count,), 0.75)
    padding = p.teacher_head.new_full((PADDING, p.teacher_head.shape[1]), 9.0)
    hidden = HiddenTeacher(
        hidden=p.teacher_hidden, lm_head=torch.cat([p.teacher_head, padding]), weight=weight
    )
    logits = p.teacher_hidden.double() @ p.teacher_head.double().T
    logprobs = torch.log_softmax(logits / TEMPERATURE, -1).float()
    if form == "no teacher":
        return ()
    if form == "hidden states":
        return (hidden,)
    if form == "hidden states of two teachers":
        second = replace(hidden, hidden=hidden.hidden.roll(1, 0), weight=-0.25 * weight)
        return hidden, second
    if form == "whole vocabulary":
        return (VocabularyTeacher(logprobs=logprobs, weight=weight),)
    correction = Correction(form.removeprefix("support, "))
    top = logprobs.topk(K, -1)
    return (
        SupportTeacher(ids=top.indices, logprobs=top.values, weight=weight, correction=correction),
    )


def moved(p: Problem, device: str) -> Problem:
    return replace(p, **{name: leaf(getattr(p, name).to(device)) for name in ("hidden", "lm_head")})


def widened(p: Problem) -> Problem:
    return replace(p, **{name: leaf(getattr(p, name).double()) for name in ("hidden", "lm_head")})


def leaf(tensor: Tensor) -> Tensor:
    """A copy of a tensor that is a leaf of autograd's graph."""
    return tensor.detach().clone().requires_grad_()


def error(found: Tensor, exact: Tensor, scale: Tensor | None = None) -> float:
    """The norm of the difference over the norm of `scale`; None: over that of `exact`."""
    norm = float((exact if scale is None else scale).norm())
    return float((found.detach().cpu().double() - exact).norm()) / norm


# -- near the teacher ------------------------------------------------------------------------------


def near_teacher(shape: Shape, dtype: torch.dtype, device: str, *, exact: bool = True) -> Check:
    """Check the dense gradient alone, of a student near its teacher.

    There it is a small difference of large logits, which multiplies their error by the condition
    number. Logits that were rounded to bfloat16 would cause an error of several percent.

    Args:
        exact: compute logits on a CPU by float32 products, as is always done on a GPU.
    """
    p = problem(shape, dtype, "cpu", peaked=True)
    columns = columns_of(p).without_sparse()
    teachers = teachers_of("hidden states", p)
    rule = HeadRule(chunk=40, temperature=TEMPERATURE, exact_logits=exact and device == "cpu")
    found = run_pass(moved(p, device), teachers, columns, rule)
    wide = run_pass(widened(p), teachers, columns, rule)
    terms = max(shape.vocabulary, shape.width)
    return within(
        f"dense gradient near the teacher, {str(dtype).removeprefix('torch.')}",
        gradient_error(found, wide),
        high=of_gradient(dtype, 0) + condition(p) * of_sums(terms),
        unit="relative error",
        reason="two roundings to the dtype, and 4 sums of float32 times the condition number "
        f"{condition(p):.1f} of a difference of logits",
    )


def condition(p: Problem) -> float:
    """The condition number of the dense gradient at the logits: the norm of p (|log p| + |log q|)
    over that of p (log p - log q - KL).
    """
    logp, logq = (
        torch.log_softmax(hidden.detach().double() @ head.detach().double().T / TEMPERATURE, -1)
        for hidden, head in ((p.hidden, p.lm_head), (p.teacher_hidden, p.teacher_head))
    )
    probability = logp.exp()
    kl = (probability * (logp - logq)).sum(-1, keepdim=True)
    summed = probability * (logp.abs() + logq.abs())
    return float(summed.norm() / (probability * (logp - logq - kl)).norm())


# -- the formula -----------------------------------------------------------------------------------


def written_formula() -> Check:
    """Check the pass in fp64 against autograd of the formula, written with torch's own losses.

    The other checks take the pass in fp64 as exact; this one does not rely on this project.
    """
    errors = []
    for divergence in Divergence:
        p = widened(problem(ON_CPU, torch.float32, "cpu", peaked=False))
        columns = columns_of(p)
        teachers = teachers_of("hidden states", p)
        rule = HeadRule(measure=Measure(divergence=divergence, beta=BETA), temperature=TEMPERATURE)
        found = run_pass(p, teachers, columns, rule)
        by_formula = leaf(p.hidden)
        formula(by_formula, p, columns, divergence).backward()
        assert by_formula.grad is not None
        errors.append(error(found.d_hidden, by_formula.grad))
    return within(
        "fp64, against autograd of the formula",
        largest(errors),
        high=epsilon(torch.float64) * ON_CPU.vocabulary,
        unit="relative error",
        reason="an epsilon of float64 for each token of the vocabulary",
    )


def formula(hidden: Tensor, p: Problem, columns: TokenColumns, divergence: Divergence) -> Tensor:
    """The loss sum_rows token_weight (w D(p, q) + G log p(y)) of one teacher of weight w = 0.75."""
    logp = torch.log_softmax(hidden @ p.lm_head.detach().T / TEMPERATURE, -1)
    logq = torch.log_softmax(
        p.teacher_hidden.double() @ p.teacher_head.double().T / TEMPERATURE, -1
    )
    log_mixture = torch.log(BETA * logq.exp() + (1 - BETA) * logp.exp())
    kl = {
        Divergence.reverse_kl: lambda: relative_entropy(logp, logq),
        Divergence.forward_kl: lambda: relative_entropy(logq, logp),
        Divergence.jsd: lambda: (
            BETA * relative_entropy(logq, log_mixture)
            + (1 - BETA) * relative_entropy(logp, log_mixture)
        ),
    }[divergence]()
    drawn = logp.gather(1, columns.token_ids[:, None])[:, 0]
    weights = columns.to(torch.float64)
    return (weights.token_weight * (0.75 * kl + weights.sparse * drawn)).sum()


def relative_entropy(log_of: Tensor, log_from: Tensor) -> Tensor:
    """[N] KL(of || from) of two distributions, given as log-probs [N, V], by torch."""
    return F.kl_div(log_from, log_of, reduction="none", log_target=True).sum(-1)
