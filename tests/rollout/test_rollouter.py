"""Turns are joined to columns: the writer of each token, its log-prob, and the end of the
prompt.
"""

import asyncio

import numpy as np
import pytest

from hybridrl.rollout.header import chunk_header
from hybridrl.rollout.rollouter import (
    Completion,
    SingleTurn,
    aborted_trajectory,
    cut_response,
    join_turns,
)
from hybridrl.settings.choices import Source
from hybridrl.types import FinishReason, Prompt, RolloutBatch

PROMPT = Prompt(uid="p", input_ids=(5, 6), text="", columns={})


def completion(*ids: int, reason: FinishReason = FinishReason.stop, version: int = 3) -> Completion:
    """A completion in which token t has the log-prob -t and the support (t + 1, t + 2)."""
    tokens = np.array(ids, np.int32)
    return Completion(
        token_ids=ids,
        logprobs=-tokens.astype(np.float32),
        policy_versions=np.full(len(ids), version, np.int32),
        support_ids=np.stack([tokens + 1, tokens + 2], 1),
        finish_reason=reason,
    )


def test_a_single_turn_is_the_prompt_and_one_completion_of_it():
    requests: list[tuple[int, ...]] = []

    async def sample(token_ids) -> Completion:
        requests.append(tuple(token_ids))
        return completion(7, 2)

    row = asyncio.run(SingleTurn().run(PROMPT, sample))
    assert requests == [(5, 6)]
    assert (row.uid, row.prompt_length, row.finish_reason) == ("p", 2, FinishReason.stop)
    assert row.input_ids.tolist() == [5, 6, 7, 2] and row.input_ids.dtype == np.int32
    assert row.response_mask.tolist() == [False, False, True, True]
    assert row.rollout_logprobs.tolist() == [0, 0, -7, -2]
    assert row.policy_versions.tolist() == [0, 0, 3, 3]
    assert row.support_ids.tolist() == [[8, 9], [3, 4]]


def test_an_observation_is_in_the_response_and_masked():
    last = completion(8, 9, reason=FinishReason.length, version=4)
    row = join_turns(PROMPT, [completion(7, 2), (30, 31), last])
    assert row.prompt_ids.tolist() == [5, 6]
    assert row.response_ids.tolist() == [7, 2, 30, 31, 8, 9]
    assert row.response_mask.tolist() == [False, False, True, True, False, False, True, True]
    assert row.rollout_logprobs.tolist() == [0, 0, -7, -2, 0, 0, -8, -9]
    assert row.policy_versions.tolist() == [0, 0, 3, 3, 0, 0, 4, 4]
    assert row.support_ids.tolist() == [[8, 9], [3, 4], [9, 10], [10, 11]]
    assert row.finish_reason is FinishReason.length, "that of the last completion"


@pytest.mark.parametrize(
    ("limit", "response", "rows", "reason"),
    [
        (5, [7, 2, 30, 31, 8], 3, FinishReason.stop),
        (4, [7, 2, 30, 31], 2, FinishReason.length),
        (3, [7, 2, 30], 2, FinishReason.length),
    ],
)
def test_a_response_is_cut_at_its_limit_and_says_so(limit, response, rows, reason):
    row = cut_response(join_turns(PROMPT, [completion(7, 2), (30, 31), completion(8)]), limit)
    assert row.response_ids.tolist() == response and row.finish_reason is reason
    assert len(row.response_mask) == len(row.rollout_logprobs) == 2 + len(response)
    assert len(row.support_ids) == row.response_mask.sum() == rows


def test_a_batch_shows_each_trajectory_as_it_was_packed():
    rows = [
        join_turns(PROMPT, [completion(7, 2), (30,), completion(8)]),
        aborted_trajectory(PROMPT, support=2),
        join_turns(PROMPT, [completion(9, 10, 2)]),
        join_turns(PROMPT, [completion(11)]),
    ]
    batch = RolloutBatch.pack([PROMPT, PROMPT], 2, rows, Source.teacher)
    assert batch.prompt_lengths == (2, 2) and batch.support_ids.shape == (7, 2)
    for i, row in enumerate(rows):
        view = batch.trajectory(i)
        for name in row.__dataclass_fields__:
            assert np.array_equal(getattr(view, name), getattr(row, name)), (i, name)


def test_an_aborted_trajectory_has_no_response_and_the_header_says_so():
    rows = [
        aborted_trajectory(PROMPT, support=2),
        join_turns(PROMPT, [completion(7, 8, reason=FinishReason.length)]),
    ]
    batch = RolloutBatch.pack([PROMPT], 2, rows, Source.teacher)
    header = chunk_header(batch, [1.0, 1.0])
    assert header.aborted.tolist() == [True, False] and header.truncated.tolist() == [False, True]
    assert header.response_lengths.tolist() == [0, 2] and header.num_tokens.tolist() == [2, 4]
    assert (header.group_size, header.source) == (2, Source.teacher)


def test_a_trajectory_of_another_prompt_is_not_packed():
    other = Prompt(uid="q", input_ids=(5, 6, 7), text="", columns={})
    with pytest.raises(AssertionError, match="q"):
        RolloutBatch.pack([other], 1, [join_turns(PROMPT, [completion(7)])])
