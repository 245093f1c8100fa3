"""The division of a step's batch among the ranks, and the cost of the step in bytes."""

from dataclasses import replace

import numpy as np
import pytest

from hybridrl.controller.global_batch import divide, learning_rate, update_order
from hybridrl.controller.sampling import Arrived, PendingChunk
from hybridrl.controller.step_cost import step_cost
from hybridrl.rollout.header import chunk_header
from hybridrl.runtime.calls import Pending
from hybridrl.runtime.chunk import Chunk
from hybridrl.runtime.scorer_group import ScoreCall
from hybridrl.settings.compose import load_config
from hybridrl.types import ScoreHeader
from tests.support.batches import make_batch, make_rewards


def pending(name: str) -> Pending:
    return Pending(ref=name, worker="w", call="c", deadline_s=1.0)


def arrived(name: str, groups: tuple[int, ...]) -> Arrived:
    """A chunk of two prompts with one response each: sequences of 2 and 6 tokens."""
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
    """Groups of 2, 6 and 6 tokens are divided into shards of 6 + 2 tokens and 6 tokens."""
    batch = divide([arrived("a", (0, 1)), arrived("b", (1,))], num_ranks=2)
    owned = sorted(
        (chunk, group)
        for share in batch.shares
        for groups in share.groups
        for chunk, of_chunk in zip(share.chunks, groups, strict=True)
        for group in of_chunk
    )
    assert owned == [(0, 0), (0, 1), (1, 1)]
    for share, values in zip(batch.shares, batch.values, strict=True):
        names = [("a", "b")[chunk] for chunk in share.chunks]
        assert values == [f"{n} {what}" for n in names for what in ("batch", "rewards", "scores")]


def test_every_mini_batch_is_divided_among_all_ranks_and_holds_groups_that_no_other_has():
    """Three chunks, each with a group of 2 and one of 6 tokens, are cut into three mini-batches of
    two groups.
    """
    chunks = [arrived(name, (0, 1)) for name in "abc"]
    batch = divide(chunks, num_ranks=2, num_mini_batches=3, seed=1)
    assert [len(places) for places in batch.mini_batches] == [2, 2, 2]
    everything = [(chunk, group) for chunk in range(3) for group in range(2)]
    assert sorted(place for places in batch.mini_batches for place in places) == everything
    for index, places in enumerate(batch.mini_batches):
        of_ranks = [
            [(chunk, g) for chunk, gs in zip(s.chunks, s.groups[index], strict=True) for g in gs]
            for s in batch.shares
        ]
        assert sorted(of_ranks[0] + of_ranks[1]) == places
        assert [len(of_rank) for of_rank in of_ranks] == [1, 1]
        part = batch.part([index])
        assert sum(len(a.groups) for a in part) == 2
    assert batch.part([0, 1, 2]) == chunks
    other = divide(chunks, num_ranks=1, num_mini_batches=3, seed=1)
    assert other.mini_batches == batch.mini_batches, "the cut does not depend on the ranks"
    again = [divide(chunks, num_ranks=1, num_mini_batches=3, seed=s) for s in range(9)]
    assert len({str(b.mini_batches) for b in again}) > 1, "but on the seed"


def test_a_batch_with_fewer_groups_than_updates_has_an_update_for_each_group():
    batch = divide([arrived("a", (0,))], num_ranks=1, num_mini_batches=4)
    assert batch.mini_batches == [[(0, 0)]]


def test_every_epoch_has_each_mini_batch_once_and_its_own_order():
    order = update_order(16, 3, seed=7)
    epochs = [order[16 * i : 16 * (i + 1)] for i in range(3)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert epochs[1] != epochs[2] != epochs[0]
    assert update_order(1, 1, seed=7) == (0,)


def test_a_wave_costs_its_rollouts_and_scores_and_not_the_weights():
    header = replace(arrived("a", (0,)).header, nbytes=100)
    score = ScoreHeader(teacher="main", nbytes={"teacher_hidden": 20, "logprobs": 10}, score_s=1.0)
    cost = step_cost([header, header], [score, score], 7)
    assert (cost.rollout_bytes, cost.score_bytes, cost.weight_bytes) == (200, 60, 7)
    assert cost.stored_bytes == 260 and type(cost.stored_bytes) is int
    sized = replace(header, nbytes=np.int64(1))
    assert type(step_cost([sized], [], 0).stored_bytes) is int, "a checkpoint holds it as JSON"


@pytest.mark.parametrize(
    ("end", "rates"),
    [
        ("null", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        # Half a cosine over four steps: (1 + cos(k pi / 4)) / 2 for k = 0, 1, 2, 3.
        ("0", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
        ("0.2", [0.5, 1.0, 1.0, 0.882843, 0.6, 0.317157]),
        ("1", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_learning_rate_rises_over_the_warm_up_and_then_falls_by_half_a_cosine(
    end: str, rates: list[float]
):
    asked = ["train.steps=6", "train.lr=1", "train.lr_warmup_steps=2", f"train.lr_end={end}"]
    settings = load_config(["experiment=quickstart", "run.dir=unused", *asked])
    found = [learning_rate(settings, step) for step in range(6)]
    assert found == pytest.approx(rates, abs=1e-6)
