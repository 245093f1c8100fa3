"""The return values that count as a reward: numbers of every library, and None if a function does
not apply. A failure never becomes a silent 0.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybridrl.core.errors import RewardError
from hybridrl.rewards.child import Raised, answer_of
from hybridrl.rewards.maths import math
from hybridrl.rewards.worker import RewardWorker
from hybridrl.settings.choices import OnError
from hybridrl.settings.rewards import RewardConfig, RewardFunctionConfig
from hybridrl.types import FinishReason, Rewards, RolloutBatch
from tests.support.batches import text_batch


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (np.bool_(True), 1.0),
        (np.array(0.5), 0.5),
        (np.float16(0.25), 0.25),
        (np.int64(3), 3.0),
        (True, 1.0),
        (None, None),
    ],
)
def test_a_number_of_any_library_is_a_number(value: object, number: float | None) -> None:
    assert answer_of(lambda: [value], 1, {}) == [number]


def test_a_scalar_tensor_is_a_number_and_a_vector_of_all_values_is_a_list() -> None:
    import torch

    assert answer_of(lambda: [torch.tensor(0.5), torch.tensor(True)], 2, {}) == [0.5, 1.0]
    assert answer_of(lambda: torch.tensor([0.5, 2.0], dtype=torch.bfloat16), 2, {}) == [0.5, 2.0]


@pytest.mark.parametrize(
    "value",
    [np.float16("inf"), np.float16("nan"), np.array(np.inf), 10**400, np.array([1.0]), "1", 1j],
)
def test_anything_but_a_finite_number_gets_an_error_text(value: object) -> None:
    answer = answer_of(lambda: [value], 1, {})
    assert isinstance(answer, list)
    reason = answer[0]
    assert isinstance(reason, str) and reason.endswith("must be a finite number")


@pytest.mark.parametrize("collection", [{0: 1.0, 1: 2.0}, b"ab", {1.0, 2.0}, "11"])
def test_a_collection_without_ordered_values_is_refused(collection: object) -> None:
    answer = answer_of(lambda: collection, 2, {})
    assert isinstance(answer, Raised) and answer.wrong_result
    assert answer.text.startswith(
        f"returned {type(collection).__name__}, must be a list of numbers"
    )


def test_an_endless_generator_returns_the_wrong_number_of_values() -> None:
    def ones() -> Iterator[float]:
        while True:
            yield 1.0

    answer = answer_of(ones, 2, {})
    assert isinstance(answer, Raised)
    assert answer.text == "returned more than 2 values for 2 completions"


@pytest.mark.parametrize("answer", [None, float("nan"), float("inf"), {"a": 1}, [1], True, ""])
def test_math_refuses_a_reference_that_is_neither_text_nor_a_finite_number(answer: object) -> None:
    with pytest.raises(ValueError, match="answer="):
        math(["1"], answer=[answer])  # type: ignore[list-item]


def test_math_reads_references_that_are_numbers() -> None:
    assert math(["it is 2", "it is 0.5", "3"], answer=[2, 0.5, 2]) == [1.0, 1.0, 0.0]


# -- the worker ------------------------------------------------------------------------------------

USER_FILE = """
def numbers(completions):
    return [None if c == "word" else 1.0 for c in completions]

def words(completions):
    return [10.0 if c == "word" else None for c in completions]

def nowhere(completions):
    return [None] * len(completions)

def raises(completions):
    raise ValueError("it was called")

def full(completions):
    assert "" not in completions, completions
    return [float(len(c)) for c in completions]

def marks(completions):
    return [float(c.count("\\0")) for c in completions]
"""


class Letters:
    """A tokenizer whose token ids are code points; 0 is the special end token."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(i) for i in token_ids if i or not skip_special_tokens)


def batch(*responses: str) -> RolloutBatch:
    """A batch with one prompt for each response."""
    return text_batch(responses, group_size=1, text="?", columns={})


Score = Callable[..., Rewards]


@pytest.fixture
def score(tmp_path: Path) -> Iterator[Score]:
    path = tmp_path / "own.py"
    path.write_text(USER_FILE)
    workers: list[RewardWorker] = []

    def run(
        functions: dict[str, float],
        *responses: str,
        on_error: OnError = OnError.drop_group,
        watch_only: bool = False,
        skip_special_tokens: bool = True,
        only: str | None = None,
        cancelled: Sequence[int] = (),
    ) -> Rewards:
        config = RewardConfig(
            functions={
                name: RewardFunctionConfig(
                    function=f"{path}:{name}",
                    weight=weight,
                    skip_special_tokens=skip_special_tokens,
                )
                for name, weight in functions.items()
            },
            on_error=on_error,
            error_value=-3.0,
        )
        worker = RewardWorker(
            config, "letters", watch_only=watch_only, load=lambda path, revision, eos: Letters()
        )
        workers.append(worker)
        answered = batch(*responses)
        reasons = [
            FinishReason.aborted if i in cancelled else reason
            for i, reason in enumerate(answered.finish_reasons)
        ]
        answered = replace(answered, finish_reasons=tuple(reasons))
        return worker.score(answered, list(functions.values()), only)

    yield run
    for worker in workers:
        worker.close()


def test_a_function_that_does_not_apply_adds_nothing_and_is_no_error(score: Score) -> None:
    rewards = score({"numbers": 2.0, "words": 0.5}, "1", "word")
    assert rewards.values.tolist() == [2.0, 5.0]
    assert not rewards.errors.any() and rewards.keep.all()
    assert np.array_equal(rewards.parts, [[1, np.nan], [np.nan, 10]], equal_nan=True)


def test_a_response_to_which_no_function_applies_is_an_error_and_not_a_reward_of_0(
    score: Score, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        rewards = score({"numbers": 1.0, "nowhere": 1.0}, "1", "word")
    assert np.array_equal(rewards.values, [1, np.nan], equal_nan=True)
    assert rewards.errors.tolist() == [False, True] and rewards.keep.tolist() == [True, False]
    assert (
        "no reward function applies to p1: each one with a weight other than 0 returned None"
        in caplog.text
    )


def test_on_error_decides_about_a_response_to_which_no_function_applies(score: Score) -> None:
    assert score({"numbers": 1.0}, "1", "word", on_error=OnError.value).values.tolist() == [1, -3]
    with pytest.raises(RewardError, match="no reward function applies to p1"):
        score({"numbers": 1.0}, "1", "word", on_error=OnError.fail)
    watched = score({"numbers": 1.0}, "1", "word", on_error=OnError.fail, watch_only=True)
    assert watched.values.tolist() == [1.0, 0.0] and watched.keep.all()


def test_a_function_of_weight_0_that_does_not_apply_is_no_error(score: Score) -> None:
    rewards = score({"numbers": 1.0, "nowhere": 0.0}, "1")
    assert rewards.values.tolist() == [1.0] and not rewards.errors.any()


def test_a_set_that_names_a_function_is_scored_by_no_other(score: Score) -> None:
    """`raises` would end the run, and `words` would give the second response 10 points."""
    functions = {"raises": 1.0, "numbers": 2.0, "words": 1.0}
    rewards = score(functions, "1", "2", on_error=OnError.fail, only="numbers")
    assert rewards.part_names == ("numbers",) and rewards.parts.tolist() == [[1.0, 1.0]]
    assert rewards.values.tolist() == [2.0, 2.0] and not rewards.errors.any()
    with pytest.raises(RewardError, match=r"reward\.functions\.numbers does not apply to p1: it"):
        score(functions, "1", "word", on_error=OnError.fail, only="numbers")


@pytest.mark.parametrize("functions", [{"full": 2.0}, {"full": 2.0, "nowhere": 1.0}])
def test_a_cancelled_response_reaches_no_function_and_is_no_error(
    score: Score, functions: dict[str, float]
) -> None:
    """Its text is empty, with which `full` fails; a function that returns None for all responses
    would make it an error.
    """
    rewards = score(functions, "", "ab", "", on_error=OnError.fail, cancelled=[0, 2])
    assert np.array_equal(rewards.parts[0], [np.nan, 2, np.nan], equal_nan=True)
    assert rewards.values.tolist() == [0.0, 4.0, 0.0]
    assert not rewards.errors.any() and rewards.keep.all()
    all_cancelled = score(functions, "", "", on_error=OnError.fail, cancelled=[0, 1])
    assert np.isnan(all_cancelled.parts).all() and not all_cancelled.errors.any()
    with pytest.raises(RewardError, match="full failed on p0: raised: AssertionError"):
        score(functions, "", "ab", on_error=OnError.fail)


@pytest.mark.parametrize(("skip", "ends"), [(True, 0.0), (False, 1.0)])
def test_a_function_receives_special_tokens_if_its_setting_says_so(
    score: Score, skip: bool, ends: float
) -> None:
    assert score({"marks": 1.0}, "ab", skip_special_tokens=skip).values.tolist() == [ends]


def test_a_function_judges_only_the_prompts_that_its_route_takes(tmp_path: Path) -> None:
    """There are two prompts with two responses each: `numbers` judges the prompt of source a,
    `words` that of b, and each function receives only the responses to its prompt.
    """
    path = tmp_path / "own.py"
    path.write_text(
        "def numbers(completions, level):\n"
        "    assert (completions, level) == (['1', 'x'], [7, 7]), completions\n"
        "    return [float(c == '1') for c in completions]\n"
        "def words(completions, completion_ids):\n"
        "    assert completions == ['2\\0', '3\\0'], completions\n"
        "    return [10.0 for _ in completions]\n"
    )
    config = RewardConfig(
        functions={
            "numbers": RewardFunctionConfig(
                function=f"{path}:numbers", route={"data_source": "a"}, weight=2.0
            ),
            "words": RewardFunctionConfig(
                function=f"{path}:words", route={"data_source": "b"}, skip_special_tokens=False
            ),
            "nowhere": RewardFunctionConfig(function=f"{path}:words", route={"level": 9}),
        }
    )
    answered = text_batch(["1", "x", "2", "3"], group_size=2, text="?", columns={})
    routed = replace(answered, columns=({"data_source": "a", "level": 7}, {"data_source": "b"}))
    worker = RewardWorker(config, "tiny", watch_only=False, load=lambda *_, **__: Letters())
    try:
        rewards = worker.score(routed, [2.0, 1.0, 1.0])
    finally:
        worker.close()
    assert rewards.values.tolist() == [2.0, 0.0, 10.0, 10.0]
    assert np.isnan(rewards.parts[0]).tolist() == [False, False, True, True]
    assert np.isnan(rewards.parts[1]).tolist() == [True, True, False, False]
    assert np.isnan(rewards.parts[2]).all() and not rewards.errors.any() and rewards.keep.all()
