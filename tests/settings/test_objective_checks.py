"""The settings that the objective needs are checked across sections, and no others are required."""

import pytest

from hybridrl.core.errors import ConfigError
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings

MATH = "teachers.main.route={domain:math}"
CODE = "+teachers.code={path: builtin:countdown-teacher, route: {domain: code}, weight: 0.1}"


def settings_of(*overrides: str) -> RunSettings:
    return load_config(["run.dir=here", "experiment=quickstart", *overrides])


def sentence_of(*overrides: str) -> str:
    """The error message about these settings."""
    with pytest.raises(ConfigError) as caught:
        settings_of(*overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 240
    return sentence


# -- the weights of the teachers -------------------------------------------------------------------


def test_a_student_that_would_only_move_away_from_its_start_is_refused():
    assert sentence_of("algorithm=g_opd", "~teachers.main") == (
        "teachers={initial}: their weights add up to -0.2; the sum must be more than 0, or the "
        "student moves away from them without a bound; add the teacher to imitate, "
        "+teachers.main=PATH"
    )


def test_the_only_teacher_of_an_experiment_is_not_turned_around_by_a_preset():
    with pytest.raises(ConfigError, match=r"^teachers={initial}: their weights add up to -0\.2"):
        load_config(["run.dir=here", "experiment=smollm2_arithmetic", "algorithm=g_opd"])


def test_the_prompts_of_each_route_have_a_teacher_that_draws_the_student():
    """The weights of the teachers sum to 0.1 - 0.2 for prompts about code, which is too little, and
    to 1 - 0.2 for prompts about mathematics, which suffices.
    """
    assert settings_of("algorithm=g_opd", f"+{MATH}").scored_teachers == ["initial", "main"]
    assert sentence_of("algorithm=g_opd", f"+{MATH}", CODE).startswith(
        "teachers={initial, main, code}: their weights with route={'domain': 'code'} add up to -0.1"
    )


def test_teachers_that_score_nothing_may_have_any_weight():
    weight = "+teachers.main.weight=-1"
    assert settings_of("algorithm=rloo", weight).scored_teachers == []
    assert settings_of("algorithm=dpo", weight).scored_teachers == ["initial"]


# -- pairs -----------------------------------------------------------------------------------------

SIMPO = "algorithm.pair.loss=simpo"
ALONE = (SIMPO, "algorithm.imitation_weight=0", "algorithm.reward_weight=0")


def test_terms_that_a_loss_on_pairs_would_drop_are_refused():
    """The quickstart imitates, and its reward weight rises from 0.5 to 2."""
    assert sentence_of(SIMPO) == (
        "algorithm.pair.loss=simpo: is the whole loss, but algorithm.imitation_weight is not 0; "
        "set algorithm.imitation_weight=0, or start from a preset of pairs, e.g. algorithm=dpo"
    )
    assert sentence_of(*ALONE[:2]).startswith(
        "algorithm.pair.loss=simpo: is the whole loss, but algorithm.reward_weight is not 0;"
    )
    rising = "algorithm.imitation_weight={kind: linear, value: 0, end: 1}"
    assert "algorithm.imitation_weight is not 0" in sentence_of(*ALONE, rising)
    assert settings_of(*ALONE).algorithm.ranks_pairs


def test_the_likelihood_of_text_beside_a_loss_on_pairs_is_that_of_the_chosen_responses():
    assert sentence_of("algorithm=dpo", "algorithm.nll_weight=1") == (
        "algorithm.nll_weight=1.0: has no effect with algorithm.pair.loss=dpo; for the likelihood "
        "of the chosen response set algorithm.pair.nll_weight"
    )
    assert settings_of("algorithm=dpo", "algorithm.pair.nll_weight=1").algorithm.ranks_pairs


def test_groups_whose_rewards_rank_no_pair_can_be_replaced():
    waves = "algorithm.dynamic_sampling=1"
    assert settings_of("algorithm=simpo", "algorithm.data_fraction=0", waves).algorithm.ranks_pairs
    assert sentence_of("algorithm=opd_full", waves).startswith("algorithm.dynamic_sampling=1: ")


# -- siblings --------------------------------------------------------------------------------------

BY_TEACHER = ("algorithm.teacher_fraction=1", "algorithm.ratio.kind=truncate")
SINGLE = "train.samples_per_prompt=1"


def test_a_teachers_only_response_has_no_siblings_to_be_compared_with_either():
    assert sentence_of(*BY_TEACHER, SINGLE).startswith(
        "train.samples_per_prompt=1: algorithm.baseline=leave_one_out compares siblings"
    )
    assert sentence_of("algorithm=mopd", *BY_TEACHER, SINGLE).startswith(
        "train.samples_per_prompt=1: algorithm.scale=group_std compares siblings"
    )
    assert settings_of("algorithm=rloo", "algorithm.baseline=none", *BY_TEACHER, SINGLE)


@pytest.mark.parametrize("share", [0, 1])
def test_single_responses_are_imitated_without_siblings_where_nothing_enters_a_return(share: int):
    given = ("algorithm.reward_weight=0", f"algorithm.teacher_fraction={share}", SINGLE)
    assert not settings_of(*given).learns_from_returns
    assert sentence_of(*given[::2], "algorithm.gamma=1").startswith(
        "train.samples_per_prompt=1: algorithm.baseline=leave_one_out compares siblings"
    )


# -- the divergence --------------------------------------------------------------------------------


def test_a_clip_of_the_log_ratio_is_of_the_reverse_kl_alone():
    clip = "algorithm.log_ratio_clip=5"
    assert sentence_of("algorithm=dagger", clip) == (
        "algorithm.log_ratio_clip=5.0: bounds the reverse KL, and algorithm.divergence=forward_kl; "
        "leave it out, or set algorithm.divergence=reverse_kl"
    )
    assert sentence_of("algorithm=gkd", clip).startswith("algorithm.log_ratio_clip=5.0: bounds the")
    assert settings_of("algorithm=opd_full", clip).algorithm.log_ratio_clip == 5
