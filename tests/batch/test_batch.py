"""How groups are divided among ranks and micro-batches, and the padded tensors of a forward
pass.
"""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from hybridrl.batch.balance import balance_groups, micro_batches
from hybridrl.batch.groups import join, select_groups
from hybridrl.batch.micro_batch import (
    collate,
    idle_sequence,
    train_sequences,
)
from hybridrl.batch.views import per_token, response_ids, response_rows
from hybridrl.batch.wire import from_wire, to_wire
from hybridrl.kernels.head import HeadRule, hybrid_head_loss
from hybridrl.kernels.teacher_rows import VocabularyTeacher
from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.objectives.hybrid import HybridObjective
from hybridrl.settings.algorithm import AlgorithmConfig
from hybridrl.types import ScoredBatch, TokenScores
from tests.support.batches import make_batch, make_plan, make_rewards, make_scores, token_columns

# -- groups to ranks -------------------------------------------------------------------------------


def test_the_example_in_the_docstring_of_balance_groups_holds():
    assert balance_groups((5, 1, 4, 2), 2) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("seed", range(20))
def test_every_group_goes_to_one_rank_and_no_rank_is_a_whole_group_behind(seed: int):
    rng = random.Random(seed)
    ranks = rng.randint(1, 5)
    tokens = [rng.randint(1, 50) for _ in range(rng.randint(ranks, 30))]
    shards = balance_groups(tokens, ranks)
    assert sorted(g for shard in shards for g in shard) == list(range(len(tokens)))
    assert all(shard and shard == sorted(shard) for shard in shards)
    loads = [sum(tokens[g] for g in shard) for shard in shards]
    assert max(loads) - min(loads) <= max(tokens)


class Tokens(int):
    """A number of tokens that counts comparisons between such numbers."""

    compared = 0

    def __lt__(self, other: int) -> bool:
        Tokens.compared += 1
        return int(self) < int(other)

    def __radd__(self, other: int) -> "Tokens":
        return Tokens(int(self) + int(other))

    __add__ = __radd__


@pytest.mark.parametrize("seed", range(5))
def test_each_group_goes_to_the_lightest_rank_which_takes_few_comparisons(seed: int):
    """Comparing each of 512 groups with all ranks would take 512 * 127 = 65024 comparisons."""
    rng = random.Random(seed)
    tokens = [rng.randint(1, 9) for _ in range(512)]
    loads = [[0, 0, rank, []] for rank in range(128)]
    for group in sorted(range(512), key=lambda g: (-tokens[g], g)):
        lightest = min(loads)
        lightest[0] += tokens[group]
        lightest[1] += 1
        lightest[3].append(group)
    Tokens.compared = 0
    assert balance_groups([Tokens(n) for n in tokens], 128) == [
        sorted(groups) for *_, groups in loads
    ]
    assert Tokens.compared < 512 * 30


def test_with_fewer_groups_than_ranks_the_rest_have_nothing():
    assert balance_groups((3,), 3) == [[0], [], []]


def test_groups_without_tokens_are_spread_as_well():
    assert [len(shard) for shard in balance_groups((0, 0, 0, 0), 2)] == [2, 2]


# -- sequences to micro-batches --------------------------------------------------------------------


def test_the_example_in_the_docstring_of_micro_batches_holds():
    assert micro_batches((2, 9, 3), 9) == [[0, 2], [1]]


@pytest.mark.parametrize("seed", range(20))
def test_every_sequence_is_in_one_micro_batch_and_padding_counts_against_the_budget(seed: int):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 40) for _ in range(rng.randint(1, 30))]
    budget = rng.randint(10, 100)
    batches = micro_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_a_sequence_longer_than_the_budget_goes_alone():
    assert micro_batches((20, 20, 1), 10) == [[2], [0], [1]]


def test_nothing_makes_no_micro_batch():
    assert micro_batches((), 10) == []


# -- tensors ---------------------------------------------------------------------------------------

BATCH = make_batch([((11, 12), [(21,), (22, 23)]), ((13,), [(24, 25), (26,)])])
HIDDEN = np.arange(12, dtype=np.float32).reshape(6, 2)
SCORES = make_scores(BATCH, [-1.0] * 6, HIDDEN)
SPARSE = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


def sequences(
    scores: TokenScores = SCORES,
    groups: Sequence[int] = (0, 1),
    teacher_weights: Sequence[float] = (1.0,) * 4,
):
    """The training sequences of a rank with these groups, in which every token has weight 0.25."""
    scored = ScoredBatch(rollout=BATCH, scores=(scores,), rewards=make_rewards(BATCH, [0.0] * 4))
    rows = [
        r for g in groups for r in range(3 * g, 3 * g + 3)
    ]  # both groups have three response tokens
    own = select_groups(scored, groups)
    columns = TokenColumns(
        token_ids=response_ids(own.rollout),
        token_weight=torch.full((len(rows),), 0.25),
        sparse=SPARSE[rows],
        value_slope=-SPARSE[rows],
        sampler_logprobs=response_rows(own.rollout, own.rollout.rollout_logprobs),
        old_logprobs=response_rows(own.rollout, own.rollout.rollout_logprobs),
    )
    weights = torch.tensor(teacher_weights)[[n for g in groups for n in (2 * g, 2 * g + 1)]]
    teacher = VocabularyTeacher(
        logprobs=from_wire(own.scores[0].rows), weight=per_token(weights, own.rollout)
    )
    return train_sequences(own.rollout, columns, [teacher])


def test_each_response_token_is_predicted_by_the_position_before_it():
    micro = collate(sequences())
    assert micro.input_ids.tolist() == [
        [11, 12, 21, 0],
        [11, 12, 22, 23],
        [13, 24, 25, 0],
        [13, 26, 0, 0],
    ]
    assert micro.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
    assert micro.columns.token_ids.tolist() == [21, 22, 23, 24, 25, 26]
    assert micro.hidden_rows.tolist() == [1, 4 + 1, 4 + 2, 8 + 0, 8 + 1, 12 + 0]
    # the token in the row after hidden_rows is the one it predicts
    assert (
        micro.input_ids.flatten()[micro.hidden_rows + 1].tolist()
        == micro.columns.token_ids.tolist()
    )
    assert (
        micro.columns.sparse.tolist() == SPARSE.tolist()
        and micro.columns.token_weight.tolist() == [0.25] * 6
    )
    assert micro.columns.value_slope.tolist() == (-SPARSE).tolist()
    assert micro.teachers[0].logprobs.tolist() == HIDDEN.tolist()


def test_packed_sequences_stand_in_one_row_and_count_their_positions_anew():
    micro = collate(sequences(), packed=True)
    assert (
        micro.input_ids.tolist() == [[11, 12, 21, 11, 12, 22, 23, 13, 24, 25, 13, 26]]
        and micro.attention_mask is None
    )
    assert micro.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert micro.hidden_rows.tolist() == [1, 4, 5, 7, 8, 10] and micro.owner.tolist() == [
        0,
        1,
        1,
        2,
        2,
        3,
    ]
    padded = collate(sequences())
    assert (
        padded.owner.tolist() == micro.owner.tolist()
        and padded.columns.token_ids.tolist() == micro.columns.token_ids.tolist()
    )
    assert padded.position_ids.tolist()[0] == [0, 1, 2, 0], "0 in the padding"


def test_packing_fills_micro_batches_by_tokens_and_padding_by_the_longest():
    assert micro_batches((2, 4, 3), 9) == [[0, 2], [1]]
    assert micro_batches((2, 4, 3), 9, packed=True) == [[0, 2, 1]]
    assert micro_batches((20, 20, 1), 10, packed=True) == [[2], [0], [1]]


def test_a_teacher_weighs_each_token_by_its_sequence():
    (teacher,) = collate(sequences(teacher_weights=[0.0, 0.5, 0.25, 1.0])).teachers
    assert teacher.weight.tolist() == [0.0, 0.5, 0.5, 0.25, 0.25, 1.0]


def test_a_rank_takes_the_columns_of_its_own_groups():
    micro = collate(sequences(groups=[1]))
    assert micro.columns.token_ids.tolist() == [24, 25, 26] and micro.columns.sparse.tolist() == [
        4.0,
        5.0,
        6.0,
    ]
    assert micro.teachers[0].logprobs.tolist() == HIDDEN[3:].tolist()
    assert micro.columns.sampler_logprobs.tolist() == [-1.0] * 3


def test_groups_keep_all_their_columns_when_selected_and_joined():
    scored = ScoredBatch(
        rollout=BATCH, scores=(SCORES,), rewards=make_rewards(BATCH, [1.0, 2.0, 3.0, 4.0])
    )
    back = join([select_groups(scored, [1]), select_groups(scored, [0])])
    assert back.rollout.uids == ("p1", "p0") and back.rollout.offsets.tolist() == [0, 3, 5, 8, 12]
    assert back.rollout.input_ids.tolist() == [13, 24, 25, 13, 26, 11, 12, 21, 11, 12, 22, 23]
    assert back.rewards.values.tolist() == [3.0, 4.0, 1.0, 2.0] and back.rewards.parts.tolist() == [
        [3.0, 4.0, 1.0, 2.0]
    ]
    assert back.scores[0].rows.tolist() == [*HIDDEN[3:].tolist(), *HIDDEN[:3].tolist()]
    assert back.scores[0].logprobs.tolist() == [
        0.0,
        -1.0,
        -1.0,
        0.0,
        -1.0,
        0.0,
        0.0,
        -1.0,
        0.0,
        0.0,
        -1.0,
        -1.0,
    ]


def test_a_dropped_group_with_a_nan_reward_gives_a_finite_zero():
    rewards = make_rewards(BATCH, [math.nan, math.nan, 1.0, 0.0], keep=[False, False, True, True])
    scored = ScoredBatch(rollout=BATCH, scores=(SCORES,), rewards=rewards)
    plan = make_plan(BATCH, num_tokens=4)
    credit = HybridObjective(AlgorithmConfig(), max_new_tokens=4).credit(scored, plan)
    columns = credit.learned(torch.float32)
    micro = collate(train_sequences(scored.rollout, columns))
    assert micro.columns.token_weight.tolist() == [0.0] * 3 + [
        0.25
    ] * 3 and micro.columns.sparse.tolist() == [0.0] * 3 + [-1.0, -1.0, 1.0]
    terms = token_columns(
        token_ids=micro.columns.token_ids % 7,
        token_weight=micro.columns.token_weight,
        sparse=micro.columns.sparse,
        sampler_logprobs=micro.columns.sampler_logprobs,
    )
    hidden, lm_head = torch.randn(6, 3).requires_grad_(), torch.randn(7, 3).requires_grad_()
    loss, _ = hybrid_head_loss(hidden, lm_head, (), terms, HeadRule(chunk=4))
    loss.backward()
    assert (
        loss.isfinite()
        and lm_head.grad.isfinite().all()
        and not hidden.grad[:3].any()
        and hidden.grad[3:].any()
    )


def test_an_idle_sequence_can_be_collated_and_weighs_nothing():
    def columns(w, dtype):
        return VocabularyTeacher(logprobs=torch.zeros(1, w, dtype=dtype), weight=torch.zeros(1))

    micro = collate([idle_sequence([columns(4, torch.float32), columns(2, torch.bfloat16)])])
    assert micro.columns.token_weight.tolist() == [0.0] and micro.hidden_rows.tolist() == [0]
    assert [t.logprobs.dtype for t in micro.teachers] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("dtype", "wire"), [(torch.bfloat16, np.uint16), (torch.float32, np.float32)]
)
def test_hidden_states_travel_bit_for_bit(dtype: torch.dtype, wire: type):
    tensor = torch.tensor([[0.0, -0.0, 1.0], [1e-40, torch.inf, -3.140625]]).to(dtype)
    array = to_wire(tensor.T)  # not contiguous
    assert array.dtype == wire and array.shape == (3, 2)
    back = from_wire(array.copy())
    assert back.dtype == dtype
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(back.view(bits), tensor.T.contiguous().view(bits))


def test_bf16_bits_survive_the_joining_of_sequences():
    teacher = torch.randn(6, 2).to(torch.bfloat16)
    scores = make_scores(BATCH, [-1.0] * 6, to_wire(teacher))
    assert torch.equal(collate(sequences(scores)).teachers[0].logprobs, teacher)
