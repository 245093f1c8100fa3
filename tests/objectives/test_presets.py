"""Each preset's gradient by the production code, compared with autograd of the published formula.

Both use the same small model and the same responses: groups of four with different lengths, of
which one response is cut at the limit, one group has equal rewards, and one group is dropped for
its NaN rewards. Where a method uses a ratio, the sampler differs from the student.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import tests.support.published as published
from hybridrl.objectives import make_objective
from hybridrl.objectives.needs import Needs
from hybridrl.settings.choices import Source
from hybridrl.settings.compose import conf_dir
from hybridrl.teachers.evidence import Drawn, Hidden
from tests.support.published import PAIRS, Answer, Loss
from tests.support.toy import (
    MAX_NEW_TOKENS,
    MODELS,
    Production,
    Response,
    Toy,
    gradient_of,
    preset,
    sampler_logprobs,
    save_heads,
)

# -- responses -------------------------------------------------------------------------------------

GROUPS = [
    (
        (1, 2),
        [(3, 4, 6), (6,), (5, 5, 3, 6), (4, 3, 5, 5, 3, 4)],
    ),  # the last response is cut at MAX_NEW_TOKENS
    ((2,), [(3, 6), (4, 4, 6), (6,), (5, 3, 4, 6)]),
    ((1, 3, 2), [(4, 6), (3, 3, 6), (5, 6), (5, 4, 4, 3, 6)]),
    ((4,), [(6,), (3, 6), (6,), (5, 6)]),
]
REWARDS = [1.0, 0.0, 0.25, 0.5, 1.0, 1.0, 1.0, 1.0, 0.0, 0.75, 1.0, -0.5, *[math.nan] * 4]
PASSED = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, *[math.nan] * 4]


def student(
    rewards: Sequence[float] = REWARDS, drift: float = 0.0, groups: Sequence = GROUPS
) -> list[Response]:
    """Responses of the student; log mu - log p of the tokens has the standard deviation `drift`."""
    rng = np.random.default_rng(5)
    return [
        Response(
            prompt=prompt,
            ids=ids,
            reward=rewards[4 * g + k],
            domain="ab"[g % 2],
            keep=not math.isnan(rewards[4 * g + k]),
            drift=tuple(drift * rng.standard_normal(len(ids))) if drift else (),
        )
        for g, (prompt, answers) in enumerate(groups)
        for k, ids in enumerate(answers)
    ]


def given(source: Source, groups: Sequence, rewards: Sequence[float] = ()) -> list[Response]:
    """Responses that the student did not write, in the order of the data."""
    written = [
        Response(prompt=prompt, ids=ids, source=source)
        for prompt, answers in groups
        for ids in answers
    ]
    return [
        replace(r, reward=v) for r, v in zip(written, rewards or [1.0] * len(written), strict=True)
    ]


ONE_EACH = [((3, 1), [(4, 6)]), ((5,), [(3, 3, 5, 6)]), ((2, 2), [(6,)])]
TEACHERS = [((3, 1), [(4, 6), (3, 6), (5, 5, 3, 6), (6,)])]
RANKED = [
    ((3, 1), [(4, 6), (5, 5, 3, 6)]),
    ((5,), [(3, 3, 5), (6,)]),
    ((2, 2), [(5, 6), (4, 4, 6)]),
]

# -- both gradients --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_heads(folder)
    return folder


def answers(model: Toy, responses: Sequence[Response]) -> list[Answer]:
    """The responses that are not dropped, in the form of the published formulas."""
    teachers = {name: Toy(name) for name in MODELS}
    kept = [
        (g, r)
        for g, (_, group) in enumerate(groupby(responses, lambda r: (r.source, r.prompt)))
        for r in group
        if r.keep
    ]
    return [
        Answer(
            group=g,
            by_student=r.source is Source.student,
            reward=r.reward,
            domain=r.domain,
            ids=torch.tensor(r.ids),
            logits=model.lm_head(model.before(r.prompt, r.ids)),
            values=model.value_head(model.before(r.prompt, r.ids))[:, 0],
            mu=sampler_logprobs(r),
            teachers={
                name: t.lm_head(t.before(r.prompt, r.ids)).detach() for name, t in teachers.items()
            },
        )
        for g, r in kept
    ]


def direct_gradient(loss: Loss, responses: Sequence[Response]) -> dict[str, Tensor]:
    model = Toy("student")
    loss(answers(model, responses)).backward()
    return gradient_of(model)


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of any entry, divided by the largest entry."""
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert ours.keys() == theirs.keys() and largest > 1e-2
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) / largest


def assert_is_published(
    name: str,
    folder: Path,
    loss: Loss,
    responses: Sequence[Response],
    *overrides: str,
    step: int = 0,
) -> None:
    """Check that the production gradient equals that of `loss`, up to rounding errors of float64
    with float64 columns, and of float32 with the float32 columns that a run sends.
    """
    settings, expected = preset(name, folder, *overrides), direct_gradient(loss, responses)
    assert distance(Production(settings, wide=True).gradient(responses, step), expected) < 1e-9
    assert distance(Production(settings, wide=False).gradient(responses, step), expected) < 1e-5


def ratios(responses: Sequence[Response]) -> Tensor:
    return torch.cat([torch.tensor(r.drift).neg().exp() for r in responses if r.keep])


# -- imitation -------------------------------------------------------------------------------------


def test_sft_is_the_mean_negative_log_likelihood_of_the_datas_tokens(folder: Path):
    assert_is_published("sft", folder, published.likelihood, given(Source.data, ONE_EACH))


def test_seqkd_is_the_likelihood_of_the_teachers_answers_which_are_sampled_not_searched_for(
    folder: Path,
):
    assert_is_published("seqkd", folder, published.likelihood, given(Source.teacher, TEACHERS))


def test_word_kd_is_the_forward_kl_at_the_datas_prefixes(folder: Path):
    assert_is_published("word_kd", folder, published.forward_kl, given(Source.data, ONE_EACH))


def test_dagger_is_the_forward_kl_at_the_students_prefixes_without_a_mixture_of_policies(
    folder: Path,
):
    assert_is_published("dagger", folder, published.forward_kl, student())


def test_gkd_is_half_the_jsd_on_data_and_half_on_the_students_answers_when_it_gives_one_each(
    folder: Path,
):
    own = [
        replace(r, prompt=prompt)
        for r, prompt in zip(student()[:3], [(1, 2), (1, 3), (4,)], strict=True)
    ]
    assert_is_published(
        "gkd",
        folder,
        published.gkd,
        own + given(Source.data, ONE_EACH),
        "train.samples_per_prompt=1",
    )


def test_minillm_is_the_single_step_term_and_the_clipped_normalised_long_term_on_answers_of_both(
    folder: Path,
):
    off = student(drift=0.3)
    assert ((ratios(off) - 1).abs() > 0.2).any() and ((ratios(off) - 1).abs() < 0.2).any()
    assert_is_published("minillm", folder, published.minillm, off + given(Source.teacher, TEACHERS))


def test_opd_is_the_importance_weighted_log_ratio_of_the_drawn_token(folder: Path):
    assert_is_published("opd", folder, published.opd, student(drift=0.3))


def test_opd_full_is_the_reverse_kl_at_the_students_prefixes(folder: Path):
    assert_is_published("opd_full", folder, published.opd_full, student())


def test_mopd_is_each_domains_teacher_and_the_group_advantage_under_the_ratio_mask(
    folder: Path,
):
    off = student(drift=0.6)
    assert (ratios(off) > 2).any() and (ratios(off) < 0.5).any()
    second = [
        f"+teachers.second.path={folder}/second",
        "+teachers.second.route={domain: b}",
        "+teachers.main.route={domain: a}",
    ]
    assert_is_published("mopd", folder, published.mopd, off, *second)


def test_g_opd_is_the_teacher_extrapolated_away_from_the_initial_student(folder: Path):
    assert_is_published("g_opd", folder, published.g_opd, student())


def test_a_teacher_of_drawn_tokens_adds_its_estimate_to_the_closed_form_of_another(folder: Path):
    second = f"+teachers.second={{path: {folder}/second, weight: 0.5, evidence: drawn}}"

    def gradient(*overrides: str) -> dict[str, Tensor]:
        settings = preset("opd_full", folder, "algorithm.baseline=none", *overrides)
        return Production(settings, wide=True).gradient(student())

    both = gradient(second)
    closed_form = gradient()
    estimate = gradient(second, "+teachers.main.weight=0")
    assert distance(both, {n: closed_form[n] + estimate[n] for n in both}) < 1e-12
    assert distance(both, closed_form) > 1e-3


# -- imitation and reward --------------------------------------------------------------------------


def test_hybrid_is_the_dense_kl_and_the_reward_against_the_siblings(folder: Path):
    assert_is_published("hybrid", folder, published.hybrid(weight=1.0, gamma=0.0), student())


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_hybrid_with_a_future_adds_the_discounted_costs_that_come_after(folder: Path, gamma: float):
    assert_is_published(
        "hybrid", folder, published.hybrid(1.0, gamma), student(), f"algorithm.gamma={gamma}"
    )


@pytest.mark.parametrize(("step", "weight"), [(0, 0.5), (100, 1.1), (250, 2.0)])
def test_hybrid_rising_is_the_hybrid_with_the_reward_weight_of_the_step(
    folder: Path, step: int, weight: float
):
    rising = published.hybrid(weight, gamma=0.0)
    assert_is_published("hybrid_rising", folder, rising, student(), "train.steps=250", step=step)


def test_reinforce_kl_is_the_whole_gradient_of_the_kl_regularised_reward(folder: Path):
    assert_is_published("reinforce_kl", folder, published.hybrid(weight=10.0, gamma=1.0), student())


# -- reward ----------------------------------------------------------------------------------------


def test_reinforce_pp_is_the_globally_standardised_return_with_the_kl_in_it(folder: Path):
    assert_is_published("reinforce_pp", folder, published.reinforce_pp, student(drift=0.3))


def test_rloo_is_the_reward_above_that_of_the_others_per_token_of_the_batch(folder: Path):
    assert_is_published("rloo", folder, published.rloo, student())


def test_grpo_is_the_clipped_group_advantage_and_the_k3_loss_when_sampler_and_learner_agree(
    folder: Path,
):
    assert_is_published("grpo", folder, published.grpo, student())


def test_grpo_with_a_sampler_that_is_off_has_the_k3_gradient_under_the_ratio_and_its_clip(
    folder: Path,
):
    off = student(drift=0.3)
    assert_is_published("grpo", folder, published.grpo_with_kl_in_the_clip, off)
    assert (
        distance(
            direct_gradient(published.grpo, off),
            direct_gradient(published.grpo_with_kl_in_the_clip, off),
        )
        > 1e-3
    )


def test_grpo_without_kl_is_the_published_surrogate_under_any_ratio(folder: Path):
    def surrogate(answers: Sequence[Answer]) -> Tensor:
        def score(a):
            return published.standard_score(answers, a).expand(len(a.ids))

        return published.sequence_mean(answers, lambda a: published.clipped(a, score(a)))

    assert_is_published(
        "grpo", folder, surrogate, student(drift=0.3), "algorithm.imitation_weight.value=0"
    )


def test_dr_grpo_divides_by_neither_deviation_nor_length(folder: Path):
    # A limit above the longest response shows that the divisor is the limit.
    limit = "rollout.max_new_tokens=8"
    assert_is_published("dr_grpo", folder, published.dr_grpo(8), student(drift=0.3), limit)


def test_dapo_clips_higher_penalises_length_and_is_a_mean_over_tokens_of_groups_that_differ(
    folder: Path,
):
    off = student(drift=0.3)
    assert ((ratios(off) > 1.2) & (ratios(off) < 1.28)).any()
    # The controller leaves groups of equal rewards out before the learner sees them.
    differing = [r for r in off if r.prompt != GROUPS[1][0]]
    settings, expected = (
        preset("dapo", folder),
        direct_gradient(published.dapo(MAX_NEW_TOKENS, cache=4), off),
    )
    assert settings.algorithm.dynamic_sampling
    assert distance(Production(settings, wide=True).gradient(differing), expected) < 1e-9
    assert distance(Production(settings, wide=False).gradient(differing), expected) < 1e-5


def test_ppo_is_the_clipped_surrogate_of_generalised_advantages_and_half_the_squared_value_error(
    folder: Path,
):
    assert_is_published("ppo", folder, published.ppo, student(drift=0.3))


def test_raft_is_the_likelihood_of_the_answers_that_passed(folder: Path):
    assert_is_published("raft", folder, published.raft, student(PASSED))


# -- pairs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_a_pair_loss_on_ranked_data_is_its_formula(folder: Path, name: str):
    data = given(Source.data, RANKED, [1.0, 0.0] * 3)
    assert_is_published(
        name, folder, lambda a: published.pairs(a, PAIRS[name]), data, "train.samples_per_prompt=2"
    )


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_a_pair_loss_on_the_students_answers_compares_the_best_with_the_worst(
    folder: Path, name: str
):
    # One group has equal rewards and one is dropped; the mean is over the two groups with a pair.
    on_policy = "algorithm.data_fraction=0"
    assert_is_published(
        name, folder, lambda a: published.pairs(a, PAIRS[name]), student(drift=0.3), on_policy
    )


# -- what each method needs ------------------------------------------------------------------------

OF_PAIRS = {"rewards": True, "siblings": True, "pairs": True}
NEEDS = {
    "sft": Needs(),
    "seqkd": Needs(),
    "word_kd": Needs(evidence=(Hidden(drawn=False),)),
    "dagger": Needs(evidence=(Hidden(drawn=False),)),
    "gkd": Needs(evidence=(Hidden(drawn=False),)),
    # The learner's log-probs are needed for the teacher's responses.
    "minillm": Needs(evidence=(Hidden(drawn=True),), learner_logprobs=True),
    "opd": Needs(evidence=(Drawn(),)),
    "opd_full": Needs(evidence=(Hidden(drawn=False),)),
    "mopd": Needs(evidence=(Drawn(),), rewards=True, siblings=True),
    "g_opd": Needs(evidence=(Drawn(),)),
    "hybrid": Needs(evidence=(Hidden(drawn=False),), rewards=True, siblings=True),
    "hybrid_rising": Needs(evidence=(Hidden(drawn=False),), rewards=True, siblings=True),
    "reinforce_kl": Needs(evidence=(Hidden(drawn=True),), rewards=True, siblings=True),
    "reinforce_pp": Needs(evidence=(Drawn(),), rewards=True),
    "rloo": Needs(rewards=True, siblings=True),
    "grpo": Needs(evidence=(Drawn(),), rewards=True, siblings=True),
    "dr_grpo": Needs(rewards=True, siblings=True),
    "dapo": Needs(rewards=True, siblings=True),
    "ppo": Needs(evidence=(Drawn(),), rewards=True, learner_logprobs=True, learner_values=True),
    "raft": Needs(rewards=True),
    "dpo": Needs(evidence=(Drawn(),), **OF_PAIRS, learner_logprobs=True),
    "ipo": Needs(evidence=(Drawn(),), **OF_PAIRS, learner_logprobs=True),
    "slic": Needs(**OF_PAIRS, learner_logprobs=True),
    "simpo": Needs(**OF_PAIRS, learner_logprobs=True),
    "dil_lsif": Needs(evidence=(Drawn(),), **OF_PAIRS, learner_logprobs=True),
    "dil_ukl": Needs(evidence=(Drawn(),), **OF_PAIRS, learner_logprobs=True),
    "dil_bce": Needs(evidence=(Drawn(),), **OF_PAIRS, learner_logprobs=True),
    "reward_model": Needs(**OF_PAIRS, learner_values=True),
}
"""The needs of each preset, with the evidence of one teacher; all teachers have the same."""


def test_every_preset_is_listed():
    assert {path.stem for path in (conf_dir() / "algorithm").glob("*.yaml")} == NEEDS.keys()


@pytest.mark.parametrize("name", NEEDS)
def test_each_preset_asks_for_what_it_uses_and_nothing_more(folder: Path, name: str):
    settings = preset(name, folder)
    needs = make_objective(settings).needs
    assert len(needs.evidence) == len(settings.scored_teachers)
    assert replace(needs, evidence=tuple(dict.fromkeys(needs.evidence))) == NEEDS[name]
