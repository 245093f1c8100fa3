"""What an evaluation asks of the engines, and what it does not sample."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest

from hybridrl.controller.answering import Answering, Decoding, waves_of
from hybridrl.controller.evaluation import (
    Evaluation,
    evaluate,
    evaluate_set,
    groups_per_chunk,
)
from hybridrl.controller.held_out_set import HeldOutSet
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings
from hybridrl.types import Prompt

PROMPTS = [Prompt(uid=f"p{i}", input_ids=(1, 2), text="", columns={}) for i in range(5)]


class Asked(Exception):
    """An order that the engines got: the uids of its prompts, and the other arguments."""

    def __init__(self, prompts: Sequence[Prompt], how: dict[str, object]) -> None:
        super().__init__()
        self.uids = [prompt.uid for prompt in prompts]
        self.how = how


class Engines:
    """Engines that answer each order with Asked."""

    def generate(self, prompts: Sequence[Prompt], **how: object) -> None:
        raise Asked(prompts, how)

    def generate_on(self, engine: int, prompts: Sequence[Prompt], **how: object) -> None:
        raise Asked(prompts, how)

    def serving(self, check: object) -> list[int]:
        return [0]


def settings(*overrides: str) -> RunSettings:
    sizes = ["rollout.groups_per_chunk=4", "train.samples_per_prompt=8"]
    return load_config(["run.dir=here", "experiment=quickstart", *sizes, *overrides])


def evaluated(given: RunSettings) -> Evaluation:
    rewards = SimpleNamespace(settings=given)
    return evaluate(
        given.eval, Engines(), rewards, PROMPTS, wave="eval-0", step=0, temperature=1.0, seed=0
    )


def unjudged(*overrides: str) -> RunSettings:
    """Settings without a reward function."""
    given = settings(*overrides)
    return replace(given, reward=replace(given.reward, functions={}))


def test_without_a_reward_function_only_the_problems_that_are_shown_are_sampled():
    with pytest.raises(Asked) as asked:
        evaluated(unjudged("eval.samples=2"))
    assert asked.value.uids == ["p0", "p1"]
    assert evaluated(unjudged("eval.samples=0")) == Evaluation(metrics={}, samples=())
    with pytest.raises(Asked) as asked:
        evaluated(settings("eval.samples=2"))
    assert len(asked.value.uids) == 5, "each is judged"


def test_a_chunk_of_an_evaluation_has_as_many_responses_as_one_of_training():
    """In training a chunk has 4 groups of 8 responses."""
    assert [groups_per_chunk(settings(), n) for n in (1, 3, 8, 16, 64)] == [32, 10, 4, 2, 1]
    with pytest.raises(Asked) as asked:
        evaluated(settings())
    assert asked.value.how["groups_per_chunk"] == 32
    hard = HeldOutSet(name="hard", prompts=PROMPTS, samples=16, temperature=1.0, reward=None)
    with pytest.raises(Asked) as asked:
        evaluate_set(
            hard, Engines(), SimpleNamespace(settings=settings()), wave="eval-hard-0", seed=0
        )
    assert asked.value.how["groups_per_chunk"] == 2


def test_the_waves_of_two_sets_have_different_names_so_that_none_reuses_the_others_prefixes():
    """An engine reuses prefixes within the waves of one name, and the seeds of the sets differ."""
    names = []
    for seed in (7, 8, 7):
        decoding = Decoding(samples=1, temperature=0.0, seed=seed)
        waves = waves_of(PROMPTS, 5, frozenset())
        with pytest.raises(Asked) as asked:
            list(Answering(Engines(), None, None).answers(waves, decoding))
        names.append(asked.value.how["wave"])
    assert names == ["wave-0-7", "wave-0-8", "wave-0-7"], "an interrupted one has the same name"


@pytest.mark.parametrize("reward", [None, "own"])
def test_a_set_that_names_a_reward_function_calls_that_one_alone(reward: str | None):
    calls = []

    def score(chunks: Sequence[object], weights: Sequence[float], only: str | None) -> None:
        calls.append(only)
        raise InterruptedError

    rewards = SimpleNamespace(settings=settings(), score=score)
    engines = SimpleNamespace(generate=lambda prompts, **how: [])
    own = HeldOutSet(name="own", prompts=PROMPTS, samples=1, temperature=0.0, reward=reward)
    with pytest.raises(InterruptedError):
        evaluate_set(own, engines, rewards, wave="eval-own-0", seed=0)
    assert calls == [reward]
