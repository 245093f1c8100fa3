"""The samples for the report: a few responses, with student and teacher compared at each token."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridrl.controller.global_batch import num_token_samples
from hybridrl.core.errors import ConfigError
from hybridrl.kernels.head import HeadRule
from hybridrl.models.tiny import tiny_tokenizer
from hybridrl.policy.token_samples import token_samples
from hybridrl.settings.compose import load_config
from hybridrl.teachers.evidence import Drawn, Evidence, Hidden, Vocabulary
from hybridrl.teachers.inbox import TeacherInbox
from hybridrl.tracking.jsonl import JsonlSink, read_token_samples, write_token_samples
from hybridrl.types import RunInfo, ScoredBatch, TokenSample, TokenScores
from tests.support.batches import make_batch, make_plan, make_rewards

# The teacher's distribution over a vocabulary of three tokens, the same after every prefix.
LOG_Q = np.log(np.array([0.5, 0.25, 0.25], np.float32))


def scored(rows: np.ndarray, drawn: list[float]) -> ScoredBatch:
    """Two prompts with two responses each, of 2, 1, 1 and 1 tokens with log mu = -1."""
    batch = make_batch([([5], [[0, 1], [2]]), ([6], [[1], [0]])])
    column = np.zeros(len(batch.input_ids), np.float32)
    column[batch.response_mask] = drawn
    scores = TokenScores(
        teacher="main", logprobs=column, rows=rows, support_ids=np.zeros((5, 0), np.int32)
    )
    rewards = make_rewards(batch, [1.0, 0.0, math.nan, 0.0])
    return ScoredBatch(rollout=batch, scores=(scores,), rewards=rewards)


def samples_of(
    batch: ScoredBatch, evidence: Evidence, head: torch.Tensor | None, count: int, **changes
) -> tuple[TokenSample, ...]:
    inbox = TeacherInbox([evidence], [head], vocabulary=3)
    plan = make_plan(batch.rollout, step=9, **changes)
    return token_samples([batch], inbox, HeadRule(), tiny_tokenizer(), plan, count)


@pytest.mark.parametrize("kind", ["hidden", "vocabulary", "drawn"])
def test_log_q_of_the_drawn_tokens_comes_from_what_the_teacher_sent(kind: str):
    """The response tokens are 0, 1, 2, 1, 0; the first responses to the two prompts are 0 1 and
    1.
    """
    head = None
    rows = np.zeros((5, 0), np.float32)
    drawn = [float(LOG_Q[token]) for token in (0, 1, 2, 1, 0)]
    evidence: Evidence = Drawn()
    if kind == "hidden":  # one-hot hidden states, whose logits are the log-probs
        head = torch.from_numpy(LOG_Q)[:, None]
        rows = np.ones((5, 1), np.float32)
        evidence = Hidden(drawn=False)
    elif kind == "vocabulary":
        rows = np.tile(LOG_Q, (5, 1))
        evidence = Vocabulary(drawn=False)
    batch = scored(rows, drawn if kind == "drawn" else [0.0] * 5)
    first, second = samples_of(batch, evidence, head, 4)
    assert first.log_ratios == pytest.approx([-1 + math.log(2), -1 + math.log(4)], abs=1e-6)
    assert second.log_ratios == pytest.approx([-1 + math.log(4)], abs=1e-6)
    assert (first.step, first.uid, first.teacher, first.reward) == (10, "p0", "main", 1.0)
    assert second.uid == "p1" and math.isnan(second.reward), "its reward call failed"
    decode = tiny_tokenizer().decode
    assert first.tokens == (decode([0]), decode([1]))


def test_no_more_responses_are_taken_than_asked_for_and_none_without_a_teacher_of_the_prompt():
    batch = scored(np.zeros((5, 0), np.float32), [0.0] * 5)
    assert [sample.uid for sample in samples_of(batch, Drawn(), None, 1)] == ["p0"]
    assert samples_of(batch, Drawn(), None, 4, teacher_routes=({"domain": "math"},)) == ()


def test_tokens_are_recorded_at_the_first_step_at_evaluations_and_at_the_last():
    settings = load_config(
        [
            *("experiment=quickstart", "run.dir=x", "train.steps=5", "eval.every=2"),
            "diagnostics.token_samples=3",
        ]
    )
    assert [num_token_samples(settings, step) for step in range(5)] == [3, 3, 0, 3, 3]
    none = load_config(["experiment=quickstart", "run.dir=x", "diagnostics.token_samples=0"])
    assert num_token_samples(none, 0) == 0
    with pytest.raises(ConfigError, match=r"token_samples=-1: must not be negative; 0 means none"):
        load_config(["experiment=quickstart", "run.dir=x", "diagnostics.token_samples=-1"])


def sample(step: int) -> TokenSample:
    return TokenSample(
        step=step,
        uid="a",
        prompt="1 2=3:",
        teacher="main",
        tokens=("1", "+2"),
        log_ratios=(0.5, -1.5),
        reward=1.0,
    )


def test_what_is_written_is_read_again_and_later_steps_go_with_a_resume(tmp_path: Path):
    (tmp_path / "samples").mkdir()
    write_token_samples(tmp_path, ())
    assert list((tmp_path / "samples").iterdir()) == []
    for step in (1, 4):
        write_token_samples(tmp_path, (sample(step),))
    assert read_token_samples(tmp_path) == [[sample(1)], [sample(4)]]
    (tmp_path / "metrics.jsonl").write_text('{"train/step": 1}\n{"train/step": 2}\n')
    sink = JsonlSink()
    sink.start(RunInfo(run_dir=str(tmp_path), name="a", total_steps=4, first_step=2, config={}))
    sink.close(0)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["tokens_000001.jsonl"]
