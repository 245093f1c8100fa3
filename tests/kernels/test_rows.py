"""Compiled row computations compared with eager ones, their graphs and memory, and bf16 logits."""

import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybridrl.kernels import rows
from hybridrl.kernels.head import PIECE, HeadRule, chosen_logprobs, hybrid_head_loss, top_logprobs
from hybridrl.kernels.teacher_rows import HiddenTeacher, SupportTeacher, Teacher, VocabularyTeacher
from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.kernels.workspace import Workspace
from hybridrl.ops.divergence import Measure
from hybridrl.ops.ratio import RatioBounds
from hybridrl.settings.choices import Correction, Divergence, Ratio
from tests.support.batches import token_columns
from tests.support.torch_graphs import forget_graphs, num_graphs

VOCABULARY = rows.COMPILE_FROM + 8  # not a multiple of a vector's width
WIDTH = 32


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run with one thread, which fixes the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaves(num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    hidden = normal(0, num_rows, WIDTH).to(dtype)
    lm_head = (normal(1, VOCABULARY, WIDTH) / WIDTH**0.5).to(dtype)
    return hidden.requires_grad_(), lm_head.requires_grad_()


def terms_of(num_rows: int) -> TokenColumns:
    """Token columns with costs of both signs; the second token has weight 0."""
    weight = torch.full((num_rows,), 1 / num_rows)
    weight[1] = 0.0
    return token_columns(
        token_ids=(normal(2, num_rows).abs() * 1000).long(),
        token_weight=weight,
        sparse=normal(3, num_rows),
        sampler_logprobs=normal(4, num_rows) - 9,
    )


def hidden_teacher(num_rows: int, seed: int = 5, width: int = WIDTH) -> HiddenTeacher:
    """A teacher that does not score the first token, for which its hidden state is meaningless."""
    weight = torch.full((num_rows,), 0.5)
    weight[0] = 0.0
    hidden = normal(seed, num_rows, width)
    hidden[0] = torch.nan
    return HiddenTeacher(
        hidden=hidden, lm_head=normal(seed + 1, VOCABULARY + 3, width) / width**0.5, weight=weight
    )


def teachers_of(kind: str, num_rows: int) -> tuple[Teacher, ...]:
    first = hidden_teacher(num_rows)
    match kind:
        case "none":
            return ()
        case "hidden":
            return (first,)
        case "two widths and a table":
            table = torch.log_softmax(normal(9, num_rows, VOCABULARY), -1)
            return (
                first,
                hidden_teacher(num_rows, 7, 16),
                VocabularyTeacher(logprobs=table, weight=torch.full((num_rows,), -0.25)),
            )
    ids = torch.stack(
        [
            torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(i))[:16]
            for i in range(num_rows)
        ]
    )
    logq = torch.log_softmax(normal(10, num_rows, 20), -1)[:, :16]
    return (
        SupportTeacher(ids=ids, logprobs=logq, weight=first.weight, correction=Correction(kind)),
    )


def results(
    hidden: Tensor,
    lm_head: Tensor,
    teachers: tuple[Teacher, ...],
    terms: TokenColumns,
    rule: HeadRule,
) -> list[Tensor]:
    """The gradients, the loss and every statistic of the head pass."""
    hidden = hidden.detach().requires_grad_()
    lm_head = lm_head.detach().requires_grad_()
    loss, stats = hybrid_head_loss(hidden, lm_head, teachers, terms, rule)
    loss.backward()
    columns = (
        stats.logprobs,
        stats.kl,
        stats.entropy,
        stats.bounded,
        stats.dense_sq,
        stats.sparse_sq,
        stats.dense_sparse,
    )
    return [hidden.grad, lm_head.grad, loss.detach(), *columns]


def widened(*values: Tensor | Teacher | TokenColumns):
    """The values in fp64, for which the head pass is never compiled."""
    for value in values:
        if isinstance(value, Tensor):
            yield value.detach().double()
        elif isinstance(value, TokenColumns):
            yield value.to(torch.float64)
        else:
            floats = {
                n: t
                for n in value.__slots__
                if isinstance(t := getattr(value, n), Tensor) and t.is_floating_point()
            }
            yield replace(value, **{name: t.double() for name, t in floats.items()})


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


CASES = [
    ("hidden", Measure(log_ratio_clip=1.0), RatioBounds(kind=Ratio.truncate, low=0.5, high=2.0)),
    (
        "two widths and a table",
        Measure(divergence=Divergence.forward_kl),
        RatioBounds(kind=Ratio.clip, low=0.2, high=0.2),
    ),
    ("hidden", Measure(divergence=Divergence.jsd, beta=0.3), RatioBounds()),
    ("none", Measure(), RatioBounds(kind=Ratio.mask, low=0.5, high=2.0)),
    *((correction.value, Measure(), RatioBounds()) for correction in Correction),
]


@pytest.mark.parametrize(("kind", "measure", "ratio"), CASES)
def test_compiled_rows_give_what_fp64_gives(kind: str, measure: Measure, ratio: RatioBounds):
    hidden, lm_head = leaves(7, torch.float32)
    rule = HeadRule(chunk=4, temperature=0.9, measure=measure, ratio=ratio)
    assert rows.pays(torch.empty(4, VOCABULARY))
    actual = results(hidden, lm_head, teachers_of(kind, 7), terms_of(7), rule)
    exact = results(
        *widened(hidden, lm_head),
        tuple(widened(*teachers_of(kind, 7))),
        next(widened(terms_of(7))),
        rule,
    )
    assert torch.equal(actual[6], exact[6])
    for k in (0, 1, 2, 3, 4, 5, 7, 8):
        assert relative_error(actual[k], exact[k]) < 3e-6, k
    assert (
        abs(float(actual[9] - exact[9])) <= 1e-6 * float(exact[7] * exact[8]) ** 0.5
    )  # an inner product may nearly vanish


def test_compiled_bf16_rows_are_within_bf16_of_fp64():
    hidden, lm_head = leaves(7, torch.bfloat16)
    teacher = hidden_teacher(7)
    teacher = replace(teacher, hidden=teacher.hidden.bfloat16(), lm_head=teacher.lm_head.bfloat16())
    actual = results(hidden, lm_head, (teacher,), terms_of(7), HeadRule(chunk=4))
    wide_hidden, wide_head, wide_teacher = widened(hidden, lm_head, teacher)
    exact = results(
        wide_hidden, wide_head, (wide_teacher,), next(widened(terms_of(7))), HeadRule(chunk=4)
    )
    for k in (0, 1, 2, 3, 4, 5):
        assert relative_error(actual[k], exact[k]) < 0.02, k


def test_one_graph_serves_every_number_of_rows():
    torch.compiler.reset()
    rows._compiled.cache_clear()
    forget_graphs()
    for num_rows in (
        4,
        7,
        9,
        13,
    ):  # chunks of 4, and of 3, 1 and 1: a single row is worked on eagerly
        results(
            *leaves(num_rows, torch.float32),
            teachers_of("hidden", num_rows),
            terms_of(num_rows),
            HeadRule(chunk=4),
        )
    assert num_graphs() == 1


def test_a_run_repeats_itself_bit_by_bit():
    inputs = (*leaves(9, torch.bfloat16), teachers_of("hidden", 9), terms_of(9), HeadRule(chunk=4))
    inputs[2][0].hidden.nan_to_num_()
    narrow = (
        replace(
            inputs[2][0],
            hidden=inputs[2][0].hidden.bfloat16(),
            lm_head=inputs[2][0].lm_head.bfloat16(),
        ),
    )
    first, second = (results(*inputs[:2], narrow, *inputs[3:]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_memory_for_logits_grows_with_the_chunk_and_not_with_the_tokens():
    Workspace.release()
    sizes = []
    for num_rows in (4, 40):
        results(
            *leaves(num_rows, torch.float32),
            teachers_of("hidden", num_rows),
            terms_of(num_rows),
            HeadRule(chunk=4),
        )
        sizes.append(Workspace.held())
    assert sizes == [2 * 4 * VOCABULARY] * 2  # the student's and the teacher's


def test_a_chunk_is_worked_on_in_pieces_and_the_teachers_logits_exist_for_one_of_them():
    Workspace.release()
    num_rows = PIECE + 44
    case = *leaves(num_rows, torch.float32), teachers_of("hidden", num_rows), terms_of(num_rows)
    whole = results(*case, HeadRule(chunk=num_rows))
    assert Workspace.held() == (num_rows + PIECE) * VOCABULARY
    pieces = results(*case, HeadRule(chunk=40))
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(whole, pieces, strict=True))


def test_what_a_piece_was_worked_out_from_is_gone_before_the_next_one_is_begun():
    given = []
    alive = []

    class Watched(VocabularyTeacher):
        def evidence(self, at: slice, vocabulary: int, workspace: Workspace) -> tuple[Tensor, ...]:
            alive.append(sum(tensor() is not None for tensor in given))
            copy = self.logprobs[at].clone()
            given.append(weakref.ref(copy))
            return (copy,)

    teacher = Watched(
        logprobs=torch.log_softmax(normal(9, 12, VOCABULARY).double(), -1), weight=torch.ones(12)
    )
    hidden, lm_head, terms = widened(*leaves(12, torch.float32), terms_of(12))
    results(hidden, lm_head, (teacher,), terms, HeadRule(chunk=4))
    assert alive == [0, 0, 0]


def nearly_equal(dtype: torch.dtype) -> tuple[Tensor, Tensor, HiddenTeacher, TokenColumns]:
    """The inputs of a student near its teacher, with logits so large that bf16 rounds them
    coarsely.
    """
    hidden = (6 * normal(0, 8, WIDTH)).to(dtype)
    lm_head = (normal(1, VOCABULARY, WIDTH) / WIDTH**0.5).to(dtype)
    away = (hidden.float() * (1 + 0.02 * normal(11, 8, WIDTH))).to(dtype)
    teacher = HiddenTeacher(hidden=away, lm_head=lm_head, weight=torch.ones(8))
    return hidden, lm_head, teacher, terms_of(8)._replace(sparse=torch.zeros(8))


@pytest.mark.parametrize("measure", [Measure(), Measure(divergence=Divergence.jsd)])
def test_exact_logits_keep_the_gradient_of_a_student_that_nearly_equals_its_teacher(
    measure: Measure,
):
    hidden, lm_head, teacher, terms = nearly_equal(torch.bfloat16)
    rule = HeadRule(chunk=8, measure=measure)
    wide_hidden, wide_head, wide_teacher = widened(hidden, lm_head, teacher)
    exact = results(wide_hidden, wide_head, (wide_teacher,), next(widened(terms)), rule)
    rounded, precise = (
        results(hidden, lm_head, (teacher,), terms, replace(rule, exact_logits=on))
        for on in (False, True)
    )
    for k in (0, 1):
        assert (
            relative_error(precise[k], exact[k]) < 0.01
            and relative_error(rounded[k], exact[k]) > 0.05
        )


def test_compiled_log_probs_of_chosen_and_top_tokens_equal_the_log_softmax():
    hidden, lm_head = leaves(7, torch.float32)
    logp = torch.log_softmax((hidden.double() @ lm_head.double().T) / 0.7, -1).detach()
    ids = torch.tensor([[0, VOCABULARY - 1]] * 7)
    rule = HeadRule(chunk=4, temperature=0.7)
    assert torch.allclose(
        chosen_logprobs(hidden, lm_head, ids, rule).double(), logp.gather(1, ids), atol=1e-5
    )
    actual, at = top_logprobs(hidden, lm_head, 3, rule)
    assert torch.equal(actual, logp.topk(3).indices) and torch.allclose(
        at.double(), logp.topk(3).values, atol=1e-5
    )
