"""The ops, compared with exact enumeration, finite differences and numbers computed by hand."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from hybridrl.kernels.head import HeadRule, chosen_logprobs, hybrid_head_loss
from hybridrl.kernels.teacher_rows import HiddenTeacher
from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.ops.compare import COMPARED, compare
from hybridrl.ops.divergence import Measure, dense
from hybridrl.ops.returns import future_cost, sibling_mean
from hybridrl.oracle.mdp import make_mdp
from hybridrl.settings.choices import Divergence
from tests.support.batches import token_columns

MDP = make_mdp(seed=0, vocabulary=5, horizon=3, ends=False)


def random_problem(
    rows: int = 6, vocabulary: int = 7, width: int = 4, dtype: torch.dtype = torch.float64
):
    """The student's hidden states and head, two teachers of other widths, and token columns."""
    g = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    hidden = normal(rows, width).requires_grad_()
    lm_head = normal(vocabulary, width).requires_grad_()
    teachers = tuple(
        HiddenTeacher(
            hidden=normal(rows, w),
            lm_head=normal(vocabulary, w),
            weight=torch.full((rows,), weight),
        )
        for w, weight in ((4, 0.75), (3, 0.5))
    )
    weight = torch.full((rows,), 0.25, dtype=torch.float64)
    weight[1] = 0.0
    terms = token_columns(
        token_ids=torch.randint(vocabulary, (rows,), generator=g),
        token_weight=weight,
        sparse=torch.randn(rows, generator=g, dtype=torch.float64),
        sampler_logprobs=torch.zeros(rows, dtype=torch.float64),
    )
    return hidden, lm_head, teachers, terms


def gradients(
    hidden: Tensor,
    lm_head: Tensor,
    teachers,
    terms: TokenColumns,
    *,
    temperature=1.0,
    chunk=1024,
    factor=1.0,
):
    """(loss, d loss / d hidden, d loss / d lm_head, statistics); the arguments get no gradient."""
    hidden = hidden.detach().requires_grad_()
    lm_head = lm_head.detach().requires_grad_()
    loss, stats = hybrid_head_loss(
        hidden, lm_head, teachers, terms, HeadRule(temperature=temperature, chunk=chunk)
    )
    (factor * loss).backward()
    return loss.detach(), hidden.grad, lm_head.grad, stats


# -- the dense term --------------------------------------------------------------------------------


def test_the_closed_form_equals_the_expectation_of_score_times_cost():
    logp = torch.log_softmax(MDP.student, -1)
    logq = torch.log_softmax(MDP.teachers[0], -1)
    p = logp.exp()
    score = torch.eye(5, dtype=torch.float64)[None] - p[:, None, :]  # [P, y, V] d log p(y) / dz
    expectation = torch.einsum("sy,sy,syv->sv", p, logp - logq, score)
    assert float((dense(logp, logq, Measure())[1] - expectation).abs().max()) < 1e-12


def test_reverse_kl_has_a_value_one_can_check_by_hand():
    p = torch.tensor([0.5, 0.5])
    q = torch.tensor([0.25, 0.75])
    assert float(dense(p.log(), q.log(), Measure())[0]) == pytest.approx(
        0.143841, abs=1e-6
    )  # 0.5 ln 2 + 0.5 ln(2/3)


def test_the_dense_gradient_is_exactly_zero_where_student_and_teacher_agree():
    hidden, lm_head, _, terms = random_problem()
    same = (
        HiddenTeacher(
            hidden=hidden.detach(), lm_head=lm_head.detach(), weight=torch.full((6,), 3.0)
        ),
    )
    quiet = terms._replace(sparse=torch.zeros_like(terms.sparse))
    loss, d_hidden, d_head, stats = gradients(hidden, lm_head, same, quiet)
    assert float(loss) == 0.0 and float(stats.dense_sq) == 0.0
    assert not d_hidden.any() and not d_head.any() and not stats.kl.any()


def test_the_logit_gradient_sums_to_zero_over_the_vocabulary():
    logp = torch.log_softmax(MDP.student, -1)
    logq = torch.log_softmax(MDP.teachers[0], -1)
    assert float(dense(logp, logq, Measure())[1].sum(-1).abs().max()) < 1e-15


# -- returns and baselines -------------------------------------------------------------------------


def test_future_cost_starts_after_the_token_and_stops_at_the_mask():
    costs = torch.tensor([[1.0, 2.0, 4.0], [1.0, 8.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert future_cost(costs, mask, 0.5).tolist() == [[2.0, 2.0, 0.0], [4.0, 0.0, 0.0]]
    assert future_cost(costs, mask, 1.0).tolist() == [[6.0, 4.0, 0.0], [8.0, 0.0, 0.0]]
    assert not future_cost(costs, mask, 0.0).any()


def test_sibling_means_stay_inside_their_group():
    returns = torch.tensor([[3.0], [0.0], [6.0], [10.0], [20.0], [30.0]])
    assert sibling_mean(returns, 3, leave_one_out=True).flatten().tolist() == [
        3.0,
        4.5,
        1.5,
        25.0,
        20.0,
        15.0,
    ]
    assert (
        sibling_mean(returns, 3, leave_one_out=False).flatten().tolist() == [3.0] * 3 + [20.0] * 3
    )


def group_gradient(group_size: int, leave_one_out: bool | None) -> Tensor:
    """[3, 3] the exact mean of the sparse gradient over all groups of K sequences.

    Token 0 ends a sequence, which has at most 2 tokens, so there are 7 sequences of both lengths
    and 3 prefixes.

    Args:
        group_size: K.
        leave_one_out: whether the baseline leaves out the sequence itself; None: no baseline.
    """
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 3, generator=g, dtype=torch.float64)
    teacher = torch.randn(3, 3, generator=g, dtype=torch.float64)
    sequences = torch.tensor([(0, 0), *product((1, 2), range(3))])  # [7, 2]
    mask = torch.tensor([[True, False]] + [[True, True]] * 6)
    prefixes = torch.stack(
        [torch.zeros(7, dtype=torch.int64), sequences[:, 0]], dim=1
    )  # 0: root, 1 or 2: that token
    rewards = torch.tensor([1.0, 0.0, 3.0, -1.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    logp = torch.log_softmax(logits, -1)[prefixes, sequences]
    logq = torch.log_softmax(teacher, -1)[prefixes, sequences]
    probability = torch.where(mask, logp, 0.0).sum(1).exp()
    assert float(probability.sum()) == pytest.approx(1.0)
    groups = torch.tensor(list(product(range(7), repeat=group_size)))  # [7^K, K]
    members = groups.flatten()
    returns = future_cost(logp - logq, mask, 0.5)[members] - rewards[members, None]
    if leave_one_out is not None:
        returns = returns - sibling_mean(returns, group_size, leave_one_out=leave_one_out)
    weight = probability[groups].prod(1).repeat_interleave(group_size) / group_size
    live = mask[members]
    terms = token_columns(
        token_ids=sequences[members][live],
        token_weight=weight[:, None].expand_as(returns)[live],
        sparse=returns[live],
        sampler_logprobs=logp[members][live],
    )
    hidden = torch.eye(3, dtype=torch.float64)[prefixes[members][live]]
    return gradients(hidden, logits.T, (), terms)[2].T


@pytest.mark.parametrize("group_size", [2, 3])
def test_leave_one_out_at_the_same_position_is_unbiased_and_the_group_mean_shrinks_by_one_kth(
    group_size: int,
):
    exact = group_gradient(group_size, None)
    assert float((group_gradient(group_size, True) - exact).abs().max()) < 1e-14
    shrunk = exact * (group_size - 1) / group_size
    assert float((group_gradient(group_size, False) - shrunk).abs().max()) < 1e-14
    assert float(exact.norm()) > 0.1


# -- the head op -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradients_at_hidden_states_and_head_are_finite_differences_of_the_loss(
    temperature: float,
):
    hidden, lm_head, teachers, terms = random_problem()

    def loss(h, w):
        return hybrid_head_loss(h, w, teachers, terms, HeadRule(temperature=temperature, chunk=4))[
            0
        ]

    assert torch.autograd.gradcheck(loss, (hidden, lm_head), eps=1e-6, atol=1e-8)


def test_the_loss_is_the_weighted_sum_of_divergences_and_costs():
    hidden, lm_head, teachers, terms = random_problem()
    logp = torch.log_softmax(hidden @ lm_head.T / 0.7, -1).detach()
    logqs = [torch.log_softmax(t.hidden @ t.lm_head.T / 0.7, -1) for t in teachers]
    kl = sum(
        t.weight * (logp.exp() * (logp - logq)).sum(-1)
        for t, logq in zip(teachers, logqs, strict=True)
    )
    chosen = logp.gather(1, terms.token_ids[:, None])[:, 0]
    loss, _, _, stats = gradients(hidden, lm_head, teachers, terms, temperature=0.7)
    assert float(loss) == pytest.approx(
        float((terms.token_weight * (kl + terms.sparse * chosen)).sum()), abs=1e-14
    )
    assert torch.allclose(stats.kl, kl, atol=1e-14) and torch.allclose(
        stats.logprobs, chosen, atol=1e-14
    )
    assert torch.allclose(stats.entropy, -(logp.exp() * logp).sum(-1), atol=1e-14)
    alone = chosen_logprobs(
        hidden, lm_head, terms.token_ids[:, None], HeadRule(temperature=0.7, chunk=4)
    )[:, 0]
    assert torch.allclose(
        alone, stats.logprobs, rtol=0, atol=1e-14
    )  # a product of 4 rows may round differently from one of 6


def test_several_teachers_are_the_weighted_sum_of_each():
    hidden, lm_head, (first, second), terms = random_problem()
    quiet = terms._replace(sparse=torch.zeros_like(terms.sparse))
    both = gradients(hidden, lm_head, (first, second), quiet)
    alone = [
        gradients(hidden, lm_head, (replace(t, weight=torch.ones(6)),), quiet)
        for t in (first, second)
    ]
    for k in range(3):
        assert torch.allclose(both[k], 0.75 * alone[0][k] + 0.5 * alone[1][k], atol=1e-14)


@pytest.mark.parametrize("chunk", [1, 4, 6])
def test_the_chunk_size_changes_nothing(chunk: int):
    whole = gradients(*random_problem(), chunk=1000)
    pieces = gradients(*random_problem(), chunk=chunk)
    for k in range(3):
        assert torch.allclose(whole[k], pieces[k], rtol=0, atol=1e-14)
    assert torch.allclose(whole[3].kl, pieces[3].kl, rtol=0, atol=1e-15)


def test_tokens_of_weight_zero_change_neither_loss_nor_gradient():
    hidden, lm_head, teachers, terms = random_problem()
    live = terms.token_weight > 0
    assert live.tolist() == [True, False, True, True, True, True]
    rest = token_columns(
        token_ids=terms.token_ids[live],
        token_weight=terms.token_weight[live],
        sparse=terms.sparse[live],
        sampler_logprobs=terms.sampler_logprobs[live],
    )
    without = gradients(
        hidden[live],
        lm_head,
        tuple(replace(t, hidden=t.hidden[live], weight=t.weight[live]) for t in teachers),
        rest,
    )
    with_masked = gradients(hidden, lm_head, teachers, terms)
    assert torch.allclose(with_masked[0], without[0], rtol=0, atol=1e-15)
    assert (
        torch.allclose(with_masked[1][live], without[1], rtol=0, atol=1e-15)
        and not with_masked[1][~live].any()
    )
    assert torch.allclose(with_masked[2], without[2], rtol=0, atol=1e-15)
    assert torch.allclose(with_masked[3].dense_sq, without[3].dense_sq, atol=1e-15)
    assert torch.allclose(with_masked[3].sparse_sq, without[3].sparse_sq, atol=1e-15)


def test_backward_multiplies_by_the_gradient_from_above():
    once = gradients(*random_problem())
    thrice = gradients(*random_problem(), factor=3.0)
    assert torch.equal(thrice[1], 3 * once[1]) and torch.equal(thrice[2], 3 * once[2])


def test_a_head_that_does_not_train_changes_no_other_gradient():
    hidden, lm_head, teachers, terms = random_problem()
    _, d_hidden, _, _ = gradients(hidden, lm_head, teachers, terms, factor=3.0)
    hidden = hidden.detach().requires_grad_()
    frozen = lm_head.detach()
    loss, _ = hybrid_head_loss(hidden, frozen, teachers, terms, HeadRule())
    (3.0 * loss).backward()
    assert torch.equal(hidden.grad, d_hidden) and frozen.grad is None


def test_the_norms_of_both_parts_are_of_the_logit_gradient():
    hidden, _, teachers, terms = random_problem(width=7)
    eye = torch.eye(7, dtype=torch.float64)  # as lm_head, so that hidden states are the logits
    dense = gradients(
        hidden,
        eye,
        teachers,
        terms._replace(sparse=torch.zeros_like(terms.sparse)),
        temperature=0.7,
    )
    sparse = gradients(hidden, eye, (), terms, temperature=0.7)
    both = gradients(hidden, eye, teachers, terms, temperature=0.7)
    assert float(both[3].dense_sq) == pytest.approx(float(dense[1].square().sum()), rel=1e-12)
    assert float(both[3].sparse_sq) == pytest.approx(float(sparse[1].square().sum()), rel=1e-12)
    assert torch.allclose(both[1], dense[1] + sparse[1], atol=1e-15)


def one_token(student: list[float], teacher: list[float]):
    """The inputs of one row with these logits of student and teacher, with hidden size 1."""

    def column(values):
        return torch.tensor(values, dtype=torch.float64)[:, None]

    one = torch.ones(1, 1, dtype=torch.float64)
    terms = token_columns(
        token_ids=torch.tensor([0]),
        token_weight=one[0],
        sparse=torch.zeros_like(one[0]),
        sampler_logprobs=torch.zeros_like(one[0]),
    )
    return gradients(
        one,
        column(student),
        (HiddenTeacher(hidden=one, lm_head=column(teacher), weight=one[0]),),
        terms,
    )


def test_a_token_that_only_the_teacher_rules_out_costs_infinity_and_not_nan():
    loss, _, _, stats = one_token([0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf])
    assert float(loss) == torch.inf and float(stats.kl[0]) == torch.inf


@pytest.mark.parametrize(
    ("measure", "value"),
    [  # p = 1/3 each, q = (1/2, 1/2, 0)
        (Measure(divergence=Divergence.forward_kl), math.log(1.5)),
        (Measure(log_ratio_clip=2.0), 2 / 3 * math.log(2 / 3) + 2 / 3),
        (
            Measure(divergence=Divergence.jsd),  # m = (5/12, 5/12, 1/6)
            0.5 * math.log(6 / 5) + 0.5 * (2 / 3 * math.log(4 / 5) + 1 / 3 * math.log(2)),
        ),
    ],
)
def test_other_divergences_are_finite_where_the_teacher_rules_a_token_out(
    measure: Measure, value: float
):
    logp = torch.full((1, 3), 1 / 3, dtype=torch.float64).log()
    logq = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    actual, gradient = dense(logp, logq, measure)
    assert float(actual) == pytest.approx(value)
    assert gradient.isfinite().all() and float(gradient.sum()) == pytest.approx(0.0, abs=1e-12)
    assert float(gradient[0, 2]) > 0, "the step goes down: the token becomes less likely"


def test_a_token_that_both_rule_out_contributes_nothing():
    ruled_out = -1e4  # exp underflows to 0 in float64
    loss, _, d_head, _ = one_token([0.0, 0.0, ruled_out], [1.0, 0.0, -torch.inf])
    two, _, d_two, _ = one_token([0.0, 0.0], [1.0, 0.0])
    assert float(loss) == pytest.approx(float(two), abs=1e-15)
    assert torch.allclose(d_head[:2], d_two, rtol=0, atol=1e-15) and float(d_head[2]) == 0.0


def test_bf16_inputs_stay_within_two_percent_of_fp64():
    hidden, lm_head, teachers, terms = random_problem(
        rows=64, vocabulary=50, width=16, dtype=torch.bfloat16
    )
    wide = tuple(replace(t, hidden=t.hidden.double(), lm_head=t.lm_head.double()) for t in teachers)
    rough = gradients(hidden, lm_head, teachers, terms)
    exact = gradients(hidden.double(), lm_head.double(), wide, terms)
    assert rough[0].dtype == torch.float32 and rough[1].dtype == rough[2].dtype == torch.bfloat16
    assert abs(float(rough[0] - exact[0])) < 0.02 * abs(float(exact[0]))
    for k in (1, 2):
        assert float((rough[k].double() - exact[k]).norm() / exact[k].norm()) < 0.02


def test_a_row_of_weight_0_may_hold_an_infinite_divergence():
    hidden = torch.eye(2, dtype=torch.float64, requires_grad=True)
    head = torch.tensor([[0.0, 0.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    far = torch.tensor([[0.0], [-1e308]], dtype=torch.float64)
    forbids = torch.tensor([[10.0], [0.0]], dtype=torch.float64)  # in row 0, q of token 1 is 0
    teacher = HiddenTeacher(hidden=forbids, lm_head=far, weight=torch.ones(2))
    terms = token_columns(
        token_ids=torch.tensor([0, 1]),
        token_weight=torch.tensor([0.0, 1.0], dtype=torch.float64),
        sparse=torch.zeros(2, dtype=torch.float64),
        sampler_logprobs=torch.zeros(2, dtype=torch.float64),
    )
    loss, stats = hybrid_head_loss(hidden, head, (teacher,), terms, HeadRule(chunk=2))
    loss.backward()
    assert stats.kl[0] == torch.inf
    assert torch.isfinite(loss) and torch.isfinite(hidden.grad).all()


def test_student_and_teacher_are_compared_on_numbers_one_can_check_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.2]])
    q = torch.tensor([[0.25, 0.25, 0.5]])
    actual = dict(zip(COMPARED, compare(p.log(), q.log(), k=1)[0].tolist(), strict=True))
    assert (
        actual["top1_agree"] == 0.0
        and actual["overlap"] == 0.0
        and actual["overlap_advantage"] == 0.0
    )
    assert actual["forward_kl"] == pytest.approx(
        0.25 * math.log(0.5) + 0.25 * math.log(5 / 6) + 0.5 * math.log(2.5), abs=1e-6
    )
    assert actual["entropy"] == pytest.approx(1.5 * math.log(2), abs=1e-6)
    two = dict(zip(COMPARED, compare(p.log(), q.log(), k=2)[0].tolist(), strict=True))
    assert (
        two["overlap"] == 0.5
    )  # both top twos have token 0; of equally likely teacher tokens the first one is taken
    assert two["overlap_mass_student"] == 0.5 and two["overlap_mass_teacher"] == 0.25
    whole = dict(zip(COMPARED, compare(p.log(), q.log(), k=3)[0].tolist(), strict=True))
    kl = 0.5 * math.log(2) + 0.3 * math.log(1.2) + 0.2 * math.log(0.4)
    assert whole["overlap_advantage"] == pytest.approx(-kl, abs=1e-6)


def test_rows_that_only_pad_a_teachers_head_have_no_probability():
    hidden, lm_head, (teacher, _), terms = random_problem()
    padding = torch.full((3, teacher.lm_head.shape[1]), 9.0, dtype=torch.float64)
    padded = replace(teacher, lm_head=torch.cat([teacher.lm_head, padding]))
    plain = gradients(hidden, lm_head, (teacher,), terms)
    longer = gradients(hidden, lm_head, (padded,), terms)
    for a, b in zip((*plain[:3], plain[3].kl), (*longer[:3], longer[3].kl), strict=True):
        assert torch.allclose(
            a, b, rtol=0, atol=1e-14
        )  # products of other widths may round differently
