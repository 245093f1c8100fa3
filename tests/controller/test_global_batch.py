"""The division of a step's batch among the ranks, and the cost of the step in bytes."""

from dataclasses import replace

import numpy as np

from hybridrl.controller.global_batch import divide
from hybridrl.controller.sampling import Arrived, PendingChunk
from hybridrl.controller.step_cost import step_cost
from hybridrl.rollout.header import chunk_header
from hybridrl.runtime.calls import Pending
from hybridrl.runtime.chunk import Chunk
from hybridrl.runtime.scorer_group import ScoreCall
from hybridrl.types import ScoreHeader
from tests.support.batches import make_batch, make_rewards


def pending(name: str) -> Pending:
    return Pending(ref=name, worker="w", call="c", deadline_s=1.0)


def arrived(name: str, groups: tuple[int, ...]) -> Arrived:
    """A chunk of two prompts with one response each, of 2 and of 6 tokens with the prompt."""
    batch = make_batch([((1,), [(2,)]), ((1, 2), [(5, 6, 7, 2)])])
    chunk = Chunk(order=None, prompts=(), header=pending("header"), batch=pending(f"{name} batch"))
    drawn = PendingChunk(
        writer=None,
        chunk=chunk,
        reward_weights=(),
        rewards=pending(f"{name} rewards"),
        scores=[ScoreCall(pending("-"), pending(f"{name} scores"))],
    )
    return Arrived(
        drawn=drawn,
        header=chunk_header(batch, [1.0, 1.0]),
        rewards=make_rewards(batch, [0.0, 1.0]),
        groups=groups,
    )


def test_every_used_group_belongs_to_one_rank_and_each_rank_gets_the_values_of_its_chunks():
    """Groups of 2, 6 and 6 tokens are divided into 6 + 2 tokens and 6 tokens."""
    batch = divide([arrived("a", (0, 1)), arrived("b", (1,))], num_ranks=2)
    owned = sorted(
        (chunk, group)
        for share in batch.shares
        for chunk, groups in zip(share.chunks, share.groups, strict=True)
        for group in groups
    )
    assert owned == [(0, 0), (0, 1), (1, 1)]
    for share, values in zip(batch.shares, batch.values, strict=True):
        names = [("a", "b")[chunk] for chunk in share.chunks]
        assert values == [f"{n} {what}" for n in names for what in ("batch", "rewards", "scores")]
        assert len(share.groups) == len(names)


def test_a_wave_costs_its_rollouts_and_scores_and_not_the_weights():
    header = replace(arrived("a", (0,)).header, nbytes=100)
    score = ScoreHeader(teacher="main", nbytes={"teacher_hidden": 20, "logprobs": 10}, score_s=1.0)
    cost = step_cost([header, header], [score, score], 7)
    assert (cost.rollout_bytes, cost.score_bytes, cost.weight_bytes) == (200, 60, 7)
    assert cost.wave_bytes == 260 and type(cost.wave_bytes) is int
    sized = replace(header, nbytes=np.int64(1))
    assert type(step_cost([sized], [], 0).wave_bytes) is int, "a checkpoint holds it as JSON"
