"""A response of two turns with an observation between them is processed like any other response:
sampling, header, rewards, scores, credit and shards do not depend on turns. The learner's part is
tested in tests/policy/test_learner.py, and the real engine in test_engine.py.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridrl.batch.groups import join, select_groups
from hybridrl.models.loading import load_model
from hybridrl.objectives import make_objective
from hybridrl.rewards.worker import RewardWorker
from hybridrl.rollout.sampler import Sampler
from hybridrl.runtime.scorer_group import scoring
from hybridrl.settings.choices import Source
from hybridrl.settings.compose import load_config
from hybridrl.settings.rewards import RewardConfig, RewardFunctionConfig
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.scorer import Scorer
from hybridrl.types import ChunkHeader, GenerateOrder, Prompt, RolloutBatch, ScoredBatch
from tests.support.batches import make_plan, make_rewards, make_scores
from tests.support.graph import save_tiny
from tests.support.scripted_engine import END, ScriptedEngine, TwoTurns

# The tokens of the tiny tokenizer: 1 begins a text, 2 ends a turn, 4 to 13 are the digits 0 to 9,
# and 21 is "=".
OBSERVATION = (21, 13)  # "=9"
PROMPTS = [
    Prompt(uid="a", input_ids=(1, 5), text="1", columns={}),
    Prompt(uid="b", input_ids=(1, 6, 7), text="23", columns={}),
]
TURNS = {(1, 5): (8, END), (1, 6, 7): (9, 10, END)}
"""The first turn for each prompt. The second turn, after OBSERVATION, is always 11, END."""
A = [1, 5, 8, END, 21, 13, 11, END]
B = [1, 6, 7, 9, 10, END, 21, 13, 11, END]

REWARD = """
def prompt_tokens(prompt_ids):
    return [float(len(ids)) for ids in prompt_ids]

def whole(prompt_ids, completion_ids):
    return [float(len(p) + len(c)) for p, c in zip(prompt_ids, completion_ids)]

def observed(completions):
    return [float("=9" in text) for text in completions]
"""


def script(token_ids: list[int]) -> tuple[int, ...]:
    return TURNS.get(tuple(token_ids), (11, END))


@pytest.fixture(scope="module")
def made() -> tuple[ChunkHeader, RolloutBatch]:
    """The header and batch of two equal responses to each prompt, with a support of one token."""
    sampler = Sampler(ScriptedEngine(script), TwoTurns(OBSERVATION), Source.student)
    order = GenerateOrder(
        wave="w",
        chunk=0,
        num_chunks=1,
        group_size=2,
        temperature=1.0,
        max_new_tokens=16,
        seed=5,
        support=1,
    )
    return asyncio.run(sampler.generate(order, PROMPTS))


def test_the_batch_masks_the_observation_and_the_header_counts_the_models_tokens(made):
    header, batch = made
    assert batch.input_ids.tolist() == [*A, *A, *B, *B]
    mask = batch.trajectory(0).response_mask.tolist()
    assert mask == [False, False, True, True, False, False, True, True]
    assert header.response_lengths.tolist() == [4, 4, 5, 5]
    assert header.num_tokens.tolist() == [8, 8, 10, 10]
    assert header.oldest_version.tolist() == header.newest_version.tolist() == [0, 0, 0, 0]
    assert not header.truncated.any() and not header.aborted.any()
    columns = (batch.offsets, batch.input_ids, batch.response_mask, batch.rollout_logprobs)
    columns += (batch.policy_versions, batch.support_ids)
    assert header.nbytes == sum(column.nbytes for column in columns)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        save_tiny(folder / name, seed)
    (folder / "rewards.py").write_text(REWARD)
    return folder


@pytest.fixture
def reward_worker(folder: Path) -> Iterator[RewardWorker]:
    names = ("prompt_tokens", "whole", "observed")
    functions = {
        name: RewardFunctionConfig(function=f"{folder}/rewards.py:{name}", weight=1.0)
        for name in names
    }
    config = RewardConfig(functions=functions)
    worker = RewardWorker(config, str(folder / "student"), watch_only=False)
    yield worker
    worker.close()


def test_a_reward_reads_the_observation_as_part_of_the_completion_and_not_of_the_prompt(
    made, reward_worker: RewardWorker
):
    _, batch = made
    rewards = reward_worker.score(batch, [1.0, 1.0, 1.0])
    assert rewards.parts.tolist() == [[2, 2, 3, 3], [8, 8, 10, 10], [1, 1, 1, 1]]
    assert not rewards.errors.any()
    (sample,) = reward_worker.samples(batch, rewards, step=0, count=1)
    assert (sample.prompt, sample.response) == ("1", "4=97"), "without the tokens that end a turn"


def settings_of(folder: Path, *overrides: str) -> RunSettings:
    models = [f"model.path={folder}/student", f"teachers.main.path={folder}/teacher"]
    return load_config([f"run.dir={folder}", "experiment=quickstart", *models, *overrides])


def test_a_teacher_scores_the_models_tokens_after_all_that_came_before_them(made, folder: Path):
    _, batch = made
    settings = settings_of(folder, "algorithm.support=sampled")
    evidence, rule = scoring(settings, "main")
    scorer = Scorer(settings, teacher="main", device="cpu", evidence=evidence, rule=rule)
    _, scores = scorer.score(batch)
    assert not scores.logprobs[~batch.response_mask].any()
    model = load_model(str(folder / "teacher"))
    for i in range(batch.num_sequences):
        row = batch.trajectory(i)
        ids = torch.from_numpy(row.input_ids).long()
        at = np.flatnonzero(row.response_mask)
        with torch.no_grad():
            logq = torch.log_softmax(model(ids[None]).logits[0], -1)[at - 1, ids[at]]
        start = int(batch.offsets[i])
        assert np.allclose(scores.logprobs[start + at], logq.numpy(), atol=1e-5)


def scored(batch: RolloutBatch) -> ScoredBatch:
    """The batch with scores of a teacher with which the tokens of the model cost 1, 2, 4, ... in
    each sequence.
    """
    costs = [2.0**t for r in batch.response_lengths for t in range(r)]
    logprobs = batch.rollout_logprobs[batch.response_mask]
    scores = make_scores(batch, (logprobs - np.array(costs, np.float32)).tolist())
    return ScoredBatch(
        rollout=batch, scores=(scores,), rewards=make_rewards(batch, [1.0, 0.0, 0.0, 0.0])
    )


def test_credit_flows_back_from_the_second_turn_to_the_first_one_over_the_observation(
    made, folder: Path
):
    _, batch = made
    objective = make_objective(
        settings_of(folder, "algorithm.gamma=0.5", "algorithm.baseline=none")
    )
    credit = objective.credit(scored(batch), make_plan(batch, reward_weight=3.0))
    # The four tokens of "a" cost 1, 2, 4, 8; the observation's two tokens cause no discount.
    future = [0.5 * 2 + 0.25 * 4 + 0.125 * 8, 0.5 * 4 + 0.25 * 8, 0.5 * 8, 0]
    assert credit.columns.sparse[:8].tolist() == pytest.approx([f - 3.0 for f in future] + future)
    assert len(credit.columns.sparse) == 18, "the model's tokens alone"


def test_groups_keep_their_prompts_lengths_when_they_are_chosen_and_joined(made):
    _, batch = made
    both = scored(batch)
    joined = join([select_groups(both, [1]), select_groups(both, [0, 1])]).rollout
    assert joined.prompt_lengths == (3, 2, 3)
    for i, original in enumerate((2, 3, 0, 1, 2, 3)):
        row = joined.trajectory(i)
        expected = batch.trajectory(original)
        assert row.prompt_ids.tolist() == expected.prompt_ids.tolist()
        assert row.response_ids.tolist() == expected.response_ids.tolist()
        assert row.support_ids.tolist() == [[20]] * int(expected.response_mask.sum())
