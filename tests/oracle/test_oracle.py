"""The oracle on the production code, and on deliberately wrong code, which it must detect."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybridrl.objectives import make_objective
from hybridrl.objectives.credit import Credit, assign_credit
from hybridrl.objectives.hybrid import HybridObjective
from hybridrl.oracle import page
from hybridrl.oracle.cases import Case, Kind, World, cases
from hybridrl.oracle.estimator import Estimator
from hybridrl.oracle.exact import Target
from hybridrl.oracle.mdp import Mdp
from hybridrl.oracle.measure import measure, token_gradients
from hybridrl.oracle.table import all_rows, main, online_methods, report_json
from hybridrl.oracle.verdict import (
    Row,
    Scope,
    claim,
    cosine,
    judge,
    relative,
    settings_of,
    written_by,
)
from hybridrl.settings.compose import load_config

SEMI = Target.semi_gradient
SAMPLED = Case(method="opd_full", options=("support=sampled",), target=SEMI)
TOP_TWO = Case(method="opd_full", options=("support=topk", "topk.k=2"), target=SEMI)
REWARD_ONLY = Case(method="hybrid", options=("gamma=0",), target=SEMI)
FULL = Case(method="opd_full", target=SEMI, kind=Kind.exact)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """The rows of `hybridrl check`."""
    return list(all_rows(Scope()))


def test_every_method_and_option_is_what_it_is_declared_to_be(rows: list[Row]):
    assert [(row.method, row.option, row.bias) for row in rows if not row.agrees] == []


def test_the_page_of_rows_is_up_to_date(rows: list[Row]):
    written = Path(page.__file__).parent / "README.md"
    assert written.read_text() == page.page(rows), (
        "python -m hybridrl.oracle.page > hybridrl/oracle/README.md"
    )


def test_methods_without_bias_have_none_on_other_models_either():
    scope = Scope(seed=1, vocabulary=4, horizon=2)
    others = [
        case for case in cases(4) if case.kind is not Kind.biased and case.world is not World.ended
    ]
    assert len(others) > 50
    assert [case.label for case in others if not judge(case, scope).agrees] == []


def test_every_online_preset_has_a_row():
    assert online_methods() == {case.method for case in cases(5)}


# -- broken on purpose -----------------------------------------------------------------------------


def with_sparse(credit: Credit, sparse: torch.Tensor) -> Credit:
    return replace(credit, columns=credit.columns._replace(sparse=sparse))


class TokenLoss(Estimator):
    """Uses autograd of a function of c = log p(y) - log q(y), as many systems do."""

    def loss(self, hidden, lm_head, rows, terms):
        logp = torch.log_softmax(hidden @ lm_head.T, -1).gather(1, terms.token_ids[:, None])[:, 0]
        logq = self.mdp.logp(self.mdp.teachers[0])[rows.prefixes, terms.token_ids]
        return (terms.token_weight * self.of(logp - logq)).sum()


class K1(TokenLoss):
    of = staticmethod(lambda c: c)


class K2(TokenLoss):
    of = staticmethod(lambda c: c.square() / 2)


class K3(TokenLoss):
    of = staticmethod(lambda c: (-c).exp() - 1 + c)


class StateAdvantage(Estimator):
    """Uses the KL over the K most likely tokens as the advantage of the sampled token."""

    def credit(self, batch, plan, members):
        p, q = (self.mdp.logp(table).exp() for table in (self.mdp.student, self.mdp.teachers[0]))
        ids = p.topk(2).indices
        p = p.gather(1, ids)
        q = q.gather(1, ids)
        sparse = (p * (p / q).log()).sum(1)[self._at(members)[0]]
        return with_sparse(super().credit(batch, plan, members), sparse)


class DrawnTokenInSupport(Estimator):
    def sampler_support(self, at, tokens, source):
        likely = self.mdp.student[at].topk(2).indices
        other = torch.where(likely[:, 0] == tokens, likely[:, 1], likely[:, 0])
        return torch.stack([tokens, other], 1)


class Ascends(Estimator):
    def loss(self, hidden, lm_head, rows, terms):
        return -super().loss(hidden, lm_head, rows, terms)


class TenTimes(Estimator):
    def loss(self, hidden, lm_head, rows, terms):
        return 10 * super().loss(hidden, lm_head, rows, terms)


class DiscountedReward(Estimator):
    """Multiplies the terminal reward by gamma^(T-t); with gamma = 0 only the last token gets it."""

    def credit(self, batch, plan, members):
        credit = super().credit(batch, plan, members)
        mask = self.mdp.mask[members.flatten()]
        is_last = (mask.flip(1).cumsum(1).flip(1) == 1)[mask]
        reward = self.mdp.rewards[members.flatten()][:, None].expand(mask.shape)[mask]
        missing = torch.where(is_last, 0.0, plan.reward_weight * reward)
        return with_sparse(credit, credit.columns.sparse + missing)


class SelfInBaseline(Estimator):
    """Uses a baseline that includes the sample itself, instead of leave-one-out."""

    def credit(self, batch, plan, members):
        k = batch.rollout.group_size
        credit = super().credit(batch, plan, members)
        return with_sparse(credit, credit.columns.sparse * (k - 1) / k)


@pytest.mark.parametrize(
    ("case", "broken", "bias"),
    [
        (SAMPLED, K1, 1.0),
        (SAMPLED, K3, None),
        (SAMPLED, StateAdvantage, 1.0),
        (TOP_TWO, DrawnTokenInSupport, None),
        (FULL, Ascends, 2.0),
        (REWARD_ONLY, Ascends, 2.0),
        (REWARD_ONLY, DiscountedReward, None),
        (Case(method="rloo", group_size=3, world=World.tiny), SelfInBaseline, 1 / 3),
    ],
)
def test_a_broken_gradient_is_found(case: Case, broken: type[Estimator], bias: float | None):
    assert case in cases(5) or judge(case, Scope()).agrees, "rows agree, by the test of all of them"
    row = judge(case, Scope(), broken)
    assert not row.agrees and row.verdict is Kind.biased and row.bias > 0.05
    assert bias is None or row.bias == pytest.approx(bias, abs=1e-6)


@pytest.mark.parametrize("correction", ["truncate", "renormalize", "tail_bucket"])
@pytest.mark.parametrize("kind", [Kind.exact, Kind.unbiased])
def test_one_token_declared_as_the_whole_divergence_is_found(correction: str, kind: Kind):
    case = Case(
        method="opd_full",
        options=("support=topk", "topk.k=1", f"topk.correction={correction}"),
        target=SEMI,
        kind=kind,
    )
    row = judge(case, Scope())
    assert not row.agrees
    assert correction != "renormalize" or (
        row.bias == 1.0 and row.variance == 0.0
    )  # no gradient at all


def test_a_wrong_size_of_a_bias_is_found():
    case = Case(method="hybrid", options=("gamma=0.5",), kind=Kind.biased, bias=0.310)
    assert judge(case, Scope()).agrees
    assert not judge(replace(case, bias=0.312), Scope()).agrees
    assert not judge(case, Scope(), DiscountedReward).agrees


BIASED = [
    Case(method="hybrid", options=("gamma=0.5",), kind=Kind.biased, bias=0.310),
    Case(method="minillm", kind=Kind.biased, bias=0.318),
    Case(method="grpo", target=SEMI, group_size=3, world=World.tiny, kind=Kind.biased, bias=0.679),
]


@pytest.mark.parametrize("case", BIASED, ids=lambda case: case.method)
def test_a_bias_is_bounded_on_other_models_too(case: Case):
    other = Scope(seed=2)
    row = judge(case, other)
    assert row.agrees and row.declared == "biased" and row.bias > 0.1
    assert not judge(case, other, Ascends).agrees
    assert not judge(case, other, TenTimes).agrees


def test_a_row_that_holds_for_equal_lengths_only_is_marked():
    mean = Case(method="opd_full", target=SEMI, kind=Kind.exact)  # divides by the number of tokens
    fixed = Case(method="raft", options=("normalizer=constant",))
    assert judge(mean, Scope()).option == "as it is [equal lengths]"
    assert judge(fixed, Scope()).option == "normalizer=constant"
    assert judge(replace(mean, kind=Kind.biased), Scope()).option == "as it is"


def test_sampling_declared_as_exact_is_found():
    assert (
        judge(SAMPLED, Scope()).agrees
        and not judge(replace(SAMPLED, kind=Kind.exact), Scope()).agrees
    )


def test_k2_as_a_loss_is_the_reverse_and_k3_the_forward_kl():
    assert judge(SAMPLED, Scope(), K2).agrees
    forward = replace(SAMPLED, options=("support=sampled", "divergence=forward_kl"))
    assert judge(forward, Scope(), K3).agrees and not judge(forward, Scope(), K2).agrees


# -- a sampler that is not the learner -------------------------------------------------------------


class SamplersCost(Estimator):
    """Computes the imitation cost of a token from the sampler's log-prob, not the learner's."""

    def __init__(self, settings, mdp, values=None):
        super().__init__(settings, mdp, values)
        self.objective = HybridObjective(
            settings.algorithm,
            settings.rollout.response_limit,
            kinds=[settings.evidence_kind(name) for name in settings.scored_teachers],
            sampler_differs=False,
        )


OFF_POLICY = {"sampler_distance": 0.3, "learned": 0.99}
PER_TOKEN = ("normalizer=constant", "ratio.kind=truncate")


@pytest.mark.parametrize(
    "case",
    [
        Case(method="opd", options=PER_TOKEN, target=SEMI, **OFF_POLICY),
        Case(
            method="opd_full",
            options=("support=topk", "topk.k=2", "divergence=jsd", *PER_TOKEN),
            target=SEMI,
            **OFF_POLICY,
        ),
        Case(
            method="grpo",
            options=("reward_weight.value=0", "ratio.low=0", "ratio.high=null", *PER_TOKEN),
            target=SEMI,
            **OFF_POLICY,
        ),
    ],
)
def test_near_the_teacher_the_learners_own_cost_is_unbiased_and_the_samplers_is_mostly_bias(
    case: Case,
):
    assert judge(case, Scope()).bias < 1e-7
    assert judge(case, Scope(), SamplersCost).bias > 5


def test_near_the_teacher_future_costs_of_the_sampler_increase_the_objective():
    case = Case(method="opd", options=("gamma=1", *PER_TOKEN), kind=Kind.biased, **OFF_POLICY)
    assert judge(case, Scope()).bias < 0.2, (
        "the bias of the prefixes, which a ratio per token does not correct"
    )
    broken = judge(case, Scope(), SamplersCost)
    assert broken.bias > 10 and broken.cosine < 0


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ([], False),
        (["schedule=pipelined"], True),
        (["model.dtype=bfloat16"], True),
        (["pipeline.max_staleness=2"], False),
    ],
)
def test_the_learners_log_probs_are_computed_before_an_update_only_where_the_sampler_may_differ(
    options: list[str], differs: bool
):
    settings = ["run.dir=here", "experiment=quickstart", *options]
    for method in ("opd", "grpo", "reinforce_kl", "reinforce_pp"):
        needs = make_objective(load_config([*settings, f"algorithm={method}"])).needs
        assert needs.learner_logprobs is differs
    for method in ("hybrid", "opd_full", "rloo"):  # their gradient has no cost of a drawn token
        needs = make_objective(load_config([*settings, f"algorithm={method}"])).needs
        assert not needs.learner_logprobs


# -- the later updates of a batch ------------------------------------------------------------------


def after(start: Mdp, student: torch.Tensor) -> Mdp:
    """A model whose student has moved since its batch was sampled near `start.student`."""
    return replace(start, student=student, old=start.student)


def gradients(case: Case, mdp: Mdp, estimator: type[Estimator] = Estimator) -> tuple:
    """The mean of the estimated gradient, and the gradient that the case claims; each [P, V]."""
    settings = settings_of(case, Scope())
    found = measure(estimator(settings, mdp), written_by(settings.algorithm), case.group_size)
    return found.mean, claim(case, settings, mdp).gradient()


TWO_UPDATES = {"sampler_distance": 0.3, "moved": 0.2, "world": World.ended}
NEARBY_CLIP = ("normalizer=constant", "ratio.kind=clip", "ratio.low=0.2", "ratio.high=0.2")


@pytest.mark.parametrize("learned", [0.0, 0.9])
@pytest.mark.parametrize(
    "case",
    [
        Case(method="opd", options=NEARBY_CLIP, target=SEMI, **TWO_UPDATES),
        Case(method="opd", options=("gamma=1", *PER_TOKEN), **TWO_UPDATES),
        Case(method="hybrid", options=("gamma=1", *NEARBY_CLIP), **TWO_UPDATES),
        Case(method="raft", options=NEARBY_CLIP, **TWO_UPDATES),
    ],
    ids=lambda case: f"{case.method} {case.options}",
)
def test_with_the_sampler_away_every_update_of_a_batch_points_downhill(case: Case, learned: float):
    """Four updates on a batch of a sampler whose logits are the student's plus 0.3 N(0, 1)."""
    start = Scope().mdp(case.world, sampler_distance=0.3, learned=learned)
    student = start.student
    step = 0.0
    for update in range(4):
        mean, truth = gradients(case, after(start, student))
        assert cosine(mean, truth) > 0.95, update
        step = step or 0.1 / float(mean.norm())
        student = student - step * mean
    assert (student - start.student).norm() > 0.15


class OldCost(Estimator):
    """Uses the costs of the student before the first update of the batch."""

    def credit(self, batch, plan, members):
        at, tokens = self._at(members)
        old = self.mdp.logp(self.mdp.old)[at, tokens].numpy()
        return assign_credit(self.objective, [replace(batch, learner_logprobs=old)], plan)[0]


def test_costs_of_the_student_before_a_batch_would_lead_later_updates_away_from_the_teacher():
    """The earlier updates of the batch have moved the student 1 % beyond the teacher."""
    case = Case(method="opd", options=PER_TOKEN, target=SEMI, **TWO_UPDATES)
    start = Scope().mdp(case.world, sampler_distance=0.3)
    past = start.student + 1.01 * (start.teachers[0] - start.student)
    mean, truth = gradients(case, after(start, past))
    assert relative(mean, truth) < 1e-7
    mean, _ = gradients(case, after(start, past), OldCost)
    assert relative(mean, truth) > 5 and cosine(mean, truth) < -0.9


# -- sampling --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [("gamma=1",), ("gamma=1", "support=sampled"), ("gamma=1", "support=topk", "topk.k=2")],
)
def test_the_mean_of_20000_samples_is_within_four_standard_errors(options: tuple[str, ...]):
    case = Case(method="hybrid", options=options)
    scope = Scope()
    samples = 20_000
    settings = settings_of(case, scope)
    mdp = scope.mdp(case.world)
    estimator = Estimator(settings, mdp)
    drawn = torch.multinomial(
        mdp.probability(mdp.sampler),
        samples,
        replacement=True,
        generator=torch.Generator().manual_seed(0),
    )
    rows = estimator.rows(drawn[:, None], next(iter(written_by(settings.algorithm))))
    mean = (
        torch.zeros_like(mdp.student).index_add_(0, rows.prefixes, token_gradients(estimator, rows))
        * mdp.mask.shape[1]
        / samples
    )
    error = float((mean - claim(case, settings, mdp).gradient()).norm())
    variance = measure(estimator, written_by(settings.algorithm), 1).variance
    assert 0.25 * (variance / samples) ** 0.5 < error < 4 * (variance / samples) ** 0.5


# -- the verb --------------------------------------------------------------------------------------


def test_rows_are_written_as_json_and_a_deviating_one_is_exit_status_1(capsys):
    good = judge(FULL, Scope())
    bad = judge(FULL, Scope(), Ascends)
    assert report_json([good]) == 0
    (written,) = json.loads(capsys.readouterr().out)
    assert Row(**written) == good
    assert (written["method"], written["declared"], written["verdict"]) == (
        "opd_full",
        "exact",
        "exact",
    )
    assert report_json([good, bad]) == 1


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--vocab", "3"], "--vocab 3: must be at least 4"),
        (["--horizon", "1"], "--horizon 1: must be at least 2"),
        (["--horizon", "9"], "--vocab 5 --horizon 9: vocab^horizon is 1953125 sequences"),
        (["--seed", "-1"], "--seed -1: must not be negative"),
        (["--colour"], "usage: hybridrl check"),
    ],
)
def test_wrong_arguments_are_exit_status_2_and_one_sentence_names_them(
    wrong: list[str], sentence: str, capsys
):
    assert main(wrong) == 2
    assert "".join(capsys.readouterr()).startswith(sentence)
