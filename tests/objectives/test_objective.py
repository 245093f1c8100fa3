"""The objective on groups that are small enough to compute by hand, its schedules, and the values
that each preset needs.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hybridrl.batch.views import response_grid
from hybridrl.objectives import make_objective
from hybridrl.objectives.credit import moments
from hybridrl.objectives.hybrid import HybridObjective
from hybridrl.objectives.needs import Needs
from hybridrl.objectives.schedule import Schedule
from hybridrl.settings.algorithm import AlgorithmConfig, RatioConfig, ScheduleConfig
from hybridrl.settings.built_in import ADVANTAGES
from hybridrl.settings.choices import Ratio, RatioLevel, ScheduleKind, Source
from hybridrl.settings.compose import load_config
from hybridrl.teachers.evidence import Hidden
from hybridrl.types import Rewards, RolloutBatch, ScoredBatch, TokenScores, UpdatePlan
from tests.support.batches import make_batch, make_plan, make_rewards, make_scores


def objective(
    gamma: float = 0.0,
    baseline: str = "leave_one_out",
    *,
    teachers: int = 1,
    **settings,
) -> HybridObjective:
    config = AlgorithmConfig(gamma=gamma, baseline=baseline, **settings)
    kinds = [config.evidence_kind] * teachers
    return HybridObjective(config, max_new_tokens=16, kinds=kinds)


TRIPLE = make_batch([((1,), [(5, 6), (7,), (8, 9)])])
SHORT_AND_LONG = make_batch([((1, 2), [(5,), (6, 7, 8)])])  # sampler log-probs are -1 everywhere
COSTS = make_scores(SHORT_AND_LONG, [-1.0, -2.0, -3.0, -5.0])  # so costs are 0 | 1, 2, 4


def sparse(
    objective: HybridObjective,
    batch: RolloutBatch,
    scores: list[TokenScores],
    rewards: Rewards,
    plan: UpdatePlan,
) -> list[float]:
    """[R] the factors of grad log p(y) that the objective computes."""
    scored = ScoredBatch(rollout=batch, scores=tuple(scores), rewards=rewards)
    return objective.credit(scored, plan).columns.sparse.tolist()


def costs_of(
    objective: HybridObjective, rewards: list[float], reward_weight: float = 2.0
) -> list[float]:
    plan = make_plan(SHORT_AND_LONG, reward_weight=reward_weight)
    return sparse(objective, SHORT_AND_LONG, [COSTS], make_rewards(SHORT_AND_LONG, rewards), plan)


# -- costs -----------------------------------------------------------------------------------------


def test_without_future_every_token_costs_minus_lambda_times_reward_above_the_others():
    plan = make_plan(TRIPLE, reward_weight=2.0)
    costs = sparse(objective(), TRIPLE, [], make_rewards(TRIPLE, [1.0, 0.0, 3.0]), plan)
    # minus 2 * (1 - 1.5), minus 2 * (0 - 2), minus 2 * (3 - 0.5)
    assert costs == [1.0, 1.0, 4.0, -5.0, -5.0]


def test_the_future_cost_of_a_token_is_discounted_and_the_reward_is_not():
    # future costs of the long response: .5*2 + .25*4, .5*4, 0; reward of the short one: 2 * 1
    assert costs_of(objective(0.5, "none"), [1.0, 0.0]) == [-2.0, 2.0, 2.0, 0.0]
    assert costs_of(objective(1.0, "none"), [1.0, 0.5]) == [-2.0, 5.0, 3.0, -1.0]
    assert costs_of(objective(0.0, "none"), [1.0, 0.5]) == [-2.0, -1.0, -1.0, -1.0]


def test_a_sibling_that_has_ended_is_compared_by_its_reward_and_no_future():
    # Returns: -2 at every position of the short response; 2, 2, 0 of the long one. At position 0
    # the long response is the baseline of the short one.
    assert costs_of(objective(0.5), [1.0, 0.0]) == [-4.0, 4.0, 4.0, 2.0]
    assert costs_of(objective(0.5, "group_mean"), [1.0, 0.0]) == [-2.0, 2.0, 2.0, 1.0]


def test_a_siblings_costs_do_not_enter_when_gamma_is_zero():
    assert costs_of(objective(0.0), [1.0, 0.0]) == [-2.0, 2.0, 2.0, 2.0]


def test_several_teachers_add_their_weighted_costs():
    second = make_scores(SHORT_AND_LONG, [-1.0, -1.0, -9.0, -1.0])  # costs 0 | 0, 8, 0
    plan = make_plan(SHORT_AND_LONG, teacher_weights=(1.0, 0.25), reward_weight=0.0)
    rewards = make_rewards(SHORT_AND_LONG, [1.0, 0.0])
    costs = sparse(
        objective(0.5, "none", teachers=2), SHORT_AND_LONG, [COSTS, second], rewards, plan
    )
    assert costs == [0.0, 3.0, 2.0, 0.0]  # costs 0 | 1, 4, 4


@pytest.mark.parametrize("source", [Source.student, Source.teacher])
@pytest.mark.parametrize("baseline", ["leave_one_out", "value"])
def test_a_single_response_that_is_only_imitated_needs_no_baseline(source: Source, baseline: str):
    single = replace(make_batch([((1,), [(5, 6)])]), source=source)
    imitates = objective(baseline=baseline, reward_weight=ScheduleConfig(value=0.0))
    assert not (imitates.needs.siblings or imitates.needs.learner_values)
    scores = [make_scores(single, [-1.0, -2.0])]
    assert sparse(imitates, single, scores, make_rewards(single, [1.0]), make_plan(single)) == [
        0,
        0,
    ]


def test_groups_are_compared_among_themselves_only():
    batch = make_batch([((1,), [(5,), (6,)]), ((2,), [(7,), (8,)])])
    rewards = make_rewards(batch, [1.0, 0.0, math.nan, math.nan], keep=[True, True, False, False])
    assert sparse(objective(), batch, [], rewards, make_plan(batch)) == [-1.0, 1.0, 0.0, 0.0]


def test_the_rewards_array_is_only_read():
    rewards = make_rewards(TRIPLE, [1.0, 0.0, 3.0])
    rewards.values.flags.writeable = False  # as values from the object store are
    sparse(objective(), TRIPLE, [], rewards, make_plan(TRIPLE))
    assert rewards.values.tolist() == [1.0, 0.0, 3.0]


def test_the_response_grid_read_row_by_row_is_batch_order():
    grid = response_grid(SHORT_AND_LONG)
    assert grid.tolist() == [[True, False, False], [True, True, True]]
    filled = np.zeros(grid.shape, np.int32)
    filled[grid.numpy()] = SHORT_AND_LONG.input_ids[SHORT_AND_LONG.response_mask]
    assert filled.tolist() == [[5, 0, 0], [6, 7, 8]]


def test_the_overlong_penalty_counts_observations_as_the_limit_does():
    """At most 16 tokens, the last 12 of which are penalised: with 10 tokens by 1/2, with 16 by 1.
    Eight tokens of each response are an observation.
    """
    batch = make_batch([((1,), [(5,) * 10, (6,) * 16])])
    written = batch.response_mask.copy()
    for start in (2, 13):  # the second token of each response
        written[start : start + 8] = False
    batch = replace(batch, response_mask=written)
    own = objective(teachers=0, baseline="none", overlong_buffer=12)
    scored = ScoredBatch(rollout=batch, scores=(), rewards=make_rewards(batch, [0.0, 0.0]))
    costs = own.credit(scored, make_plan(batch, reward_weight=1.0)).columns.sparse
    assert costs.tolist() == [0.5] * 2 + [1.0] * 8


def test_normalisers_are_of_the_global_batch():
    plan = make_plan(SHORT_AND_LONG, num_tokens=40, num_sequences=5, num_groups=3)
    scored = ScoredBatch(
        rollout=SHORT_AND_LONG, scores=(), rewards=make_rewards(SHORT_AND_LONG, [0.0, 0.0])
    )

    def weights(kind):
        return objective(normalizer=kind).token_weight(scored, plan).tolist()

    assert weights("token_mean") == pytest.approx([1 / 40] * 4)
    assert weights("constant") == pytest.approx([1 / (5 * 16)] * 4)
    assert weights("sequence_mean") == pytest.approx([1 / 6, 1 / 18, 1 / 18, 1 / 18])


# -- what each method needs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "needs"),
    [
        ("hybrid", Needs(evidence=(Hidden(drawn=False),), rewards=True, siblings=True)),
        ("opd_full", Needs(evidence=(Hidden(drawn=False),))),
        ("rloo", Needs(rewards=True, siblings=True)),
        ("reinforce_kl", Needs(evidence=(Hidden(drawn=True),), rewards=True, siblings=True)),
    ],
)
def test_each_preset_asks_for_what_it_uses_and_nothing_more(preset: str, needs: Needs):
    settings = load_config(["run.dir=here", "experiment=quickstart", f"algorithm={preset}"])
    assert make_objective(settings).needs == needs


def test_pure_reinforcement_needs_no_teacher_at_any_gamma():
    off = ScheduleConfig(value=0.0)
    assert objective(gamma=1.0, imitation_weight=off, teachers=0).needs == Needs(
        rewards=True, siblings=True
    )
    plan = make_plan(TRIPLE, teacher_weights=())
    costs = sparse(
        objective(1.0, "none", imitation_weight=off, teachers=0),
        TRIPLE,
        [],
        make_rewards(TRIPLE, [1.0, 0.0, 3.0]),
        plan,
    )
    assert costs == [-1.0, -1.0, 0.0, -3.0, -3.0]


# -- schedules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (ScheduleKind.constant, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (ScheduleKind.linear, [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]),
        (ScheduleKind.cosine, [1.0, 2 - math.sqrt(0.5), 2.0, 2 + math.sqrt(0.5), 3.0, 3.0]),
        (ScheduleKind.step, [1.0, 1.0, 1.0, 1.0, 3.0, 3.0]),
    ],
)
def test_each_kind_of_schedule_goes_from_1_to_3_in_4_steps(kind: ScheduleKind, values: list[float]):
    config = ScheduleConfig(kind=kind, value=1.0, end=3.0, steps=4)
    assert [Schedule(config, 100).value(t) for t in range(6)] == pytest.approx(values)


def test_a_schedule_without_a_length_takes_the_whole_training():
    config = ScheduleConfig(kind=ScheduleKind.linear, value=0.0, end=1.0)
    assert [Schedule(config, 10).value(t) for t in (0, 5, 10)] == [0.0, 0.5, 1.0]


def test_a_schedule_that_ends_above_zero_is_not_zero():
    assert ScheduleConfig(value=0.0).is_zero()
    assert ScheduleConfig(value=0.0, end=1.0).is_zero(), "constant: the end is not read"
    assert not ScheduleConfig(kind=ScheduleKind.linear, value=0.0, end=1.0).is_zero()


def test_a_feedback_schedule_continues_from_the_weight_of_one_and_within_todays_bounds():
    """After a schedule of another kind, which had no state, it starts with its own first weight."""

    def feedback(**given: float) -> Schedule:
        config = ScheduleConfig(
            kind=ScheduleKind.feedback, metric="kl/token", target=0.1, gain=0.5, **given
        )
        return Schedule(config, 100)

    first = feedback(value=1.0)
    first.observe({"kl/token": 0.2})
    again = feedback(value=1.0)
    again.load_state_dict(first.state_dict())
    assert again.value(5) == 1.5
    bounded = feedback(value=1.0, high=1.25)
    bounded.load_state_dict(first.state_dict())
    assert bounded.value(5) == 1.25
    constant = Schedule(ScheduleConfig(value=2.0), 100)
    begun = feedback(value=0.25)
    begun.load_state_dict(constant.state_dict())
    assert begun.value(5) == 0.25


def test_a_feedback_schedule_moves_by_its_gain_within_its_bounds_and_keeps_its_place():
    config = ScheduleConfig(
        kind=ScheduleKind.feedback,
        value=1.0,
        metric="kl/token",
        target=0.1,
        gain=-0.1,
        low=0.85,
        high=1.05,
    )
    schedule = Schedule(config, 100)
    seen = []
    for kl in (
        0.2,
        0.4,
        math.nan,
        0.1,
        0.0,
    ):  # twice the target, four times: the error counts as 1 at most; unknown; met; none
        schedule.observe({"kl/token": kl})
        seen.append(schedule.value(7))
    assert seen == pytest.approx([0.9, 0.85, 0.85, 0.85, 0.935])
    again = Schedule(config, 100)
    again.load_state_dict(schedule.state_dict())
    assert again.value(0) == schedule.value(0)


def test_the_moments_of_a_rank_without_groups_are_zero_and_those_of_others_count_live_tokens():
    assert moments([]).tolist() == [0.0, 0.0, 0.0]
    scored = ScoredBatch(rollout=TRIPLE, scores=(), rewards=make_rewards(TRIPLE, [1.0, 0.0, 3.0]))
    credit = objective(baseline="none").credit(scored, make_plan(TRIPLE))  # costs -1, -1, 0, -3, -3
    assert moments([credit]).tolist() == [5.0, -8.0, 20.0]


@pytest.mark.parametrize("baseline", ADVANTAGES)
def test_text_of_the_data_has_its_likelihood_alone_whatever_the_baseline(baseline: str):
    single = make_batch([((1,), [(5, 6)])])
    data = replace(single, source=Source.data)
    plan = make_plan(single, reward_weight=2.0)
    given = ScoredBatch(
        rollout=data,
        scores=(),
        rewards=make_rewards(single, [1.0]),
        learner_logprobs=np.full(2, -1.0, np.float32),
        learner_values=np.full(2, -0.5, np.float32),
    )
    credit = objective(baseline=baseline, nll_weight=0.25).credit(given, plan)
    assert (
        credit.columns.sparse.tolist() == [0.0, 0.0]
        and credit.learned(torch.float32).sparse.tolist() == [-0.25, -0.25]
        and credit.columns.value_slope.tolist() == [0.0, 0.0]
    )
    assert (
        credit.standardised(torch.tensor(1.0), torch.tensor(2.0))
        .learned(torch.float32)
        .sparse.tolist()
        == [-0.25, -0.25]
        and moments([credit])[0] == 0.0
    )
    assert not any(len(numbers) and numbers.any() for numbers in credit.watched.values())
    assert "value/loss" not in credit.watched, "zeros would count in its mean"


def test_the_likelihood_of_the_teachers_text_is_not_standardised_with_its_returns():
    written = replace(TRIPLE, source=Source.teacher)
    given = ScoredBatch(rollout=written, scores=(), rewards=make_rewards(TRIPLE, [1.0, 0.0, 3.0]))
    credit = objective(baseline="none", nll_weight=0.5).credit(
        given, make_plan(TRIPLE, reward_weight=1.0)
    )
    assert credit.columns.sparse.tolist() == [-1.0, -1.0, 0.0, -3.0, -3.0]
    assert credit.standardised(torch.tensor(-1.0), torch.tensor(2.0)).learned(
        torch.float32
    ).sparse.tolist() == [
        -0.5,
        -0.5,
        0.0,
        -1.5,
        -1.5,
    ]


def test_sampled_costs_are_watched_for_weights_of_the_teachers_that_add_up_to_1():
    """The metric is log p - log q, here 0, 1, 2 and 4, for every weight of the teacher."""
    scored = ScoredBatch(
        rollout=SHORT_AND_LONG, scores=(COSTS,), rewards=make_rewards(SHORT_AND_LONG, [0.0, 0.0])
    )
    for weight in (0.25, 1.0):
        plan = make_plan(SHORT_AND_LONG, teacher_weights=(weight,))
        watched = objective(gamma=1.0, baseline="none").credit(scored, plan).watched
        assert watched["kl/sampled"].tolist() == [0.0, 1.0, 2.0, 4.0]
    off = make_plan(SHORT_AND_LONG, teacher_weights=(0.0,))
    watched = objective(gamma=1.0, baseline="none").credit(scored, off).watched
    assert watched["kl/sampled"].tolist() == []


def test_bounds_of_the_ratio_of_a_sequence_are_watched_at_each_of_its_tokens():
    """The learner's log-prob is log 4 above the sampler's at one token of the second response,
    whose ratio is therefore 4; the ratio of the first response is 1.
    """
    learner = np.array([-1.0, -1.0 + math.log(4), -1.0, -1.0], np.float32)
    scored = ScoredBatch(
        rollout=SHORT_AND_LONG,
        scores=(),
        rewards=make_rewards(SHORT_AND_LONG, [1.0, 0.0]),
        learner_logprobs=learner,
    )
    ratio = RatioConfig(kind=Ratio.truncate, level=RatioLevel.sequence, high=2.0)
    of_sequences = objective(teachers=0, ratio=ratio)
    credit = of_sequences.credit(scored, make_plan(SHORT_AND_LONG, teacher_weights=()))
    assert credit.watched["policy/bounded_frac"].tolist() == [0.0, 1.0, 1.0, 1.0]
    dropped = replace(scored, rewards=replace(scored.rewards, keep=np.zeros(2, bool)))
    credit = of_sequences.credit(dropped, make_plan(SHORT_AND_LONG, teacher_weights=()))
    assert credit.watched["policy/bounded_frac"].tolist() == []


def test_a_clip_of_the_log_ratio_bounds_future_costs_and_says_how_often():
    # costs of the long response are 1, 2, 4; clipped at 1.5: 1, 1.5, 1.5
    clipped = objective(gamma=1.0, baseline="none", log_ratio_clip=1.5)
    unbounded = objective(log_ratio_clip=1.5).needs.evidence
    assert unbounded == (Hidden(drawn=True),), "for the share, at gamma 0 too"
    scored = ScoredBatch(
        rollout=SHORT_AND_LONG, scores=(COSTS,), rewards=make_rewards(SHORT_AND_LONG, [0.0, 0.0])
    )
    credit = clipped.credit(scored, make_plan(SHORT_AND_LONG))
    assert credit.columns.sparse.tolist() == [0.0, 3.0, 1.5, 0.0]
    assert credit.watched["kl/clipped_frac"].tolist() == [False, False, True, True]
