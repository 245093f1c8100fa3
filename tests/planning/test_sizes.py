"""How many sequences of which length a worker of the quickstart processes at once. The quickstart
has 96 prompts with 4 responses; a sequence has 48 tokens, 16 of them in the response.
"""

import numpy as np
import pytest

from hybridrl.batch.balance import micro_batches
from hybridrl.planning.memory import learner_pass
from tests.planning.test_plan import quickstart, responses_of


@pytest.mark.parametrize(
    ("limits", "load"),
    [
        ((9216, 8192), (2, 8192, 16384)),
        ((4608, 4096), (4, 4096, 16384)),
        ((2048, 1024), (8, 2048, 16384)),
        ((16400, 15000), (1, 16400, 16400)),  # a sequence beyond the budget is alone
    ],
)
def test_sequences_shorter_than_the_limit_fill_the_budget_of_a_micro_batch(limits, load):
    """The load is that of micro_batches for 384 sequences of any lengths, with a budget of 16384
    tokens.
    """
    limit, response = limits
    lengths = [f"rollout.max_model_len={limit}", f"rollout.max_new_tokens={response}"]
    sizes = quickstart(*lengths, "train.max_tokens_per_micro_batch=16384").sizes
    assert sizes.of_micro_batch == load
    rng = np.random.default_rng(0)
    fullest = 0
    for _ in range(100):
        tokens = rng.integers(2, limit + 1, 384).tolist()
        for batch in micro_batches(tokens, 16384):
            longest = max(tokens[i] for i in batch)
            assert longest * len(batch) <= load[0] * load[1]
            assert sum(min(tokens[i] - 1, response) for i in batch) <= load[2]
            fullest = max(fullest, longest * len(batch))
    assert fullest > 0.99 * load[0] * load[1]


def test_a_rank_with_few_sequences_has_no_more_than_these():
    """The rank has two groups of 4 sequences of 48 tokens, of which 16 are in the response."""
    sizes = quickstart("train.prompts_per_step=2").sizes
    assert (sizes.of_micro_batch, sizes.micro_batches) == ((8, 48, 8 * 16), 1)
    apart = quickstart("train.prompts_per_step=2", "train.max_tokens_per_micro_batch=100").sizes
    assert (apart.of_micro_batch, apart.micro_batches) == ((3, 34, 100), 4)  # two of 48 at a time


def test_several_updates_of_a_batch_need_the_memory_of_one_and_the_time_of_every_epoch():
    """96 prompts with 4 responses are 384 sequences in one update, or 96 in each of 4
    mini-batches.
    """
    one = quickstart("train.max_tokens_per_micro_batch=65536")
    several = quickstart("train.max_tokens_per_micro_batch=65536", "train.updates_per_batch=4")
    loads = [plan.sizes.of_micro_batch for plan in (one, several)]
    assert loads == [(384, 48, 384 * 16), (96, 48, 96 * 16)]
    assert several.peak("learner") < one.peak("learner")
    assert several.seconds.learn == pytest.approx(one.seconds.learn)
    twice = quickstart("train.epochs_per_batch=2")
    assert twice.seconds.learn == pytest.approx(2 * one.seconds.learn)


def test_responses_of_the_data_are_one_chunk_and_limited_by_the_length_with_their_prompt_alone():
    """There are 96 pairs with sequences of 48 tokens, of which 47 may be in the response; responses
    of the student have 16.
    """
    pairs = ["algorithm=dpo", "+data.options.responses=pair", "rollout.groups_per_chunk=2"]
    data = quickstart(*pairs)
    assert (data.sizes.of_chunk, data.sizes.response) == (96 * 2, 47)
    assert responses_of(data) == 192 * 48 * 13 + (192 + 1) * 8
    assert data.sizes.of_scoring(1) == (192, 48, 192 * 47)
    scorer = "scorer.max_tokens_per_micro_batch=1024"
    assert quickstart(*pairs, scorer).sizes.of_scoring(1) == (22, 47, 1024)
    own = quickstart("rollout.groups_per_chunk=2").sizes
    assert (own.of_chunk, own.response, own.chunks) == (2 * 4, 16, 48)
    mixed = quickstart("algorithm=gkd", "rollout.groups_per_chunk=2").sizes
    assert 0 < mixed.by_data < 96 and mixed.response == 47
    assert mixed.chunks == -(-(96 - mixed.by_data) // 2) + 1
    # The engines' own prompts and responses keep their lengths.
    sampled = quickstart("algorithm=dpo", "algorithm.data_fraction=0", "train.samples_per_prompt=2")
    assert data.of_worker("rollout") == sampled.of_worker("rollout")


def test_a_learner_on_a_cpu_keeps_attention_scores_of_short_sequences_and_not_of_long_packs():
    """48 tokens are few enough for attention by matrix products, but a pack of 16384 is not."""
    narrow = quickstart("model.dtype=bfloat16", "++teachers.main.dtype=bfloat16").sizes
    padded = learner_pass(narrow)
    assert padded.plain_attention and (padded.sequences, padded.tokens) == (342, 48)
    packs = ["model.dtype=bfloat16", "++teachers.main.dtype=bfloat16", "train.packing=true"]
    packed = learner_pass(quickstart(*packs).sizes)
    assert not packed.plain_attention and (packed.sequences, packed.tokens) == (1, 342 * 48)


def test_diagnostics_on_a_cpu_too_have_the_gradients_of_both_terms():
    parts = quickstart("diagnostics.every=5").of_worker("learner")
    diagnosed = {part.part: part.nbytes for part in parts if part.phase == "diagnose"}
    assert diagnosed["gradients"] >= 8 * 782336
