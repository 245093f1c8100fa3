"""Which prompts share a wave, and the statistics of a model's responses: rewards and lengths."""

import math
from dataclasses import replace

import numpy as np
import pytest

from hybridrl.controller.answering import rewards_by_name, waves_of
from hybridrl.controller.evaluation import judged
from hybridrl.controller.held_out_set import HeldOutSet
from hybridrl.controller.set_statistics import pass_at, statistics_of
from hybridrl.settings.generation import GenerateConfig
from hybridrl.settings.held_out import pass_sizes
from hybridrl.settings.rewards import RewardFunctionConfig
from hybridrl.types import Prompt
from tests.support.batches import make_batch, make_rewards


def prompt(uid: str) -> Prompt:
    return Prompt(uid=uid, input_ids=(1,), text="", columns={"numbers": [1]})


def test_waves_are_the_same_whatever_is_done_and_only_missing_answers_are_wanted():
    waves = waves_of([prompt(uid) for uid in "abcde"], 2, frozenset("abc"))
    assert [(wave.name, [p.uid for p in wave.prompts], set(wave.wanted)) for wave in waves] == [
        ("wave-1", ["c", "d"], {"d"}),
        ("wave-2", ["e"], {"e"}),
    ]


def test_a_wave_fills_an_engine_four_times_unless_its_size_is_set():
    assert GenerateConfig().prompts_per_wave(max_num_seqs=256, samples=2) == 512
    assert GenerateConfig().prompts_per_wave(max_num_seqs=2, samples=100) == 1
    assert GenerateConfig(wave=7).prompts_per_wave(max_num_seqs=256, samples=2) == 7


def row(values: list[float | None], lengths: list[int], reasons: list[str]) -> dict:
    return {"rewards": {"r": values}, "lengths": lengths, "finish_reasons": reasons}


def test_average_error_and_share_of_passed_problems_are_over_problems():
    rows = [
        row([1.0, 0.0], [4, 8], ["stop", "length"]),
        row([0.0, 0.0], [4, 4], ["stop", "stop"]),
    ]
    of_rows = statistics_of(rows)
    assert (of_rows.problems, of_rows.samples) == (2, 2)
    assert of_rows.average == 0.25 and of_rows.passed == 0.5
    assert of_rows.pass_at == {1: 0.25, 2: 0.5}
    assert of_rows.standard_error == pytest.approx(0.25)  # std((0.5, 0)) / sqrt(2)
    assert (of_rows.length, of_rows.truncated, of_rows.failed) == (5.0, 0.25, 0.0)


def test_pass_at_k_is_the_chance_that_one_of_k_drawn_responses_passes():
    """2 of the 4 responses to the first problem pass, so only one of their 6 pairs has none that
    passes. No response to the second problem passes.
    """
    values = np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 0.5, 0.0, 0.0]])
    assert pass_sizes(4) == [1, 2, 4] and pass_sizes(6) == [1, 2, 4, 6]
    assert pass_at(values, 1) == 0.25
    assert pass_at(values, 2) == pytest.approx((5 / 6) / 2)
    assert pass_at(values, 4) == 0.5
    assert math.isnan(pass_at(np.full((1, 2), np.nan), 1))


def test_a_set_is_judged_by_the_function_that_it_names():
    rows = [row([1.0], [2], ["stop"])]
    rows[0]["rewards"]["other"] = [0.25]
    assert statistics_of(rows).average == 1.0
    assert statistics_of(rows, "other").average == 0.25


def test_the_metrics_of_a_set_have_its_name():
    of_rows = statistics_of([row([1.0, 0.0], [4, 8], ["stop", "length"])])
    metrics = of_rows.metrics("hard")
    assert math.isnan(metrics.pop("eval/hard/accuracy_stderr"))
    assert metrics == {
        "eval/hard/accuracy": 0.5,
        "eval/hard/pass_at_1": 0.5,
        "eval/hard/pass_at_2": 1.0,
        "eval/hard/error_rate": 0.0,
        "eval/hard/length_mean": 6.0,
        "eval/hard/truncated_frac": 0.5,
    }


def test_a_failed_call_counts_as_failed_and_not_as_wrong():
    of_rows = statistics_of([row([1.0, None], [1, 1], ["stop", "stop"])])
    assert (of_rows.average, of_rows.passed, of_rows.failed) == (1.0, 1.0, 0.5)
    assert math.isnan(of_rows.standard_error), "of a single problem"


def test_without_a_reward_there_are_only_lengths():
    of_rows = statistics_of([{"lengths": [3], "finish_reasons": ["length"]}])
    assert math.isnan(of_rows.average) and math.isnan(of_rows.passed)
    assert (of_rows.length, of_rows.truncated, of_rows.failed) == (3.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("reward", "expected"), [(None, [[1, 2], [13, 14]]), ("code", [[11, 12], [13, 14]])]
)
def test_a_set_is_judged_by_the_first_function_that_takes_a_problem_or_by_its_own(reward, expected):
    """There are two problems with two responses each; `sums` gives 1 to 4, and `code` 11 to 14."""
    functions = {
        "sums": RewardFunctionConfig(function="math", route={"data_source": "sums"}),
        "code": RewardFunctionConfig(function="math"),
    }
    prompts = [
        replace(prompt("hard-0"), columns={"data_source": "sums"}),
        replace(prompt("hard-1"), columns={"data_source": "code"}),
    ]
    held_out = HeldOutSet(name="hard", prompts=prompts, samples=2, temperature=1.0, reward=reward)
    called = [name for name in functions if reward in (None, name)]
    values = {"sums": [1.0, 2, 3, 4], "code": [11.0, 12, 13, 14]}
    parts = np.array([values[name] for name in called])
    assert judged(parts, held_out, functions).tolist() == expected


def test_an_answer_has_the_rewards_of_the_functions_whose_routes_take_its_prompt():
    """Therefore the first of these functions, which judges the answer, has always scored it."""
    batch = make_batch([((1,), [(2,), (3,)])])
    judged = replace(
        make_rewards(batch, [0.0, 0.0]),
        part_names=("code", "sums"),
        parts=np.array([[np.nan, np.nan], [1.0, 0.0]], np.float32),
    )
    functions = {
        "code": RewardFunctionConfig(function="math", route={"data_source": "code"}),
        "sums": RewardFunctionConfig(function="math", route={"data_source": "sums"}),
    }
    asked = Prompt(uid="sums/1", input_ids=(1,), text="", columns={"data_source": "sums"})
    rewards = rewards_by_name(judged, functions, asked)
    assert rewards == {"sums": (1.0, 0.0)}
    answered = {"rewards": rewards, "lengths": [1, 1], "finish_reasons": ["stop", "stop"]}
    assert statistics_of([answered]).average == 0.5
