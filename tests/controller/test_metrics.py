"""The metrics of a step, compared with numbers computed by hand, and the page that explains
them.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hybridrl.batch.micro_batch import MicroBatch, collate, train_sequences
from hybridrl.controller.evaluation import accuracy_of_sources, summary
from hybridrl.controller.metrics import (
    StepRecord,
    check_metrics,
    reward_metrics,
    rollout_metrics,
    source_metrics,
    step_row,
)
from hybridrl.controller.saving import Saving
from hybridrl.controller.set_statistics import set_statistics
from hybridrl.controller.step_cost import step_cost
from hybridrl.core.errors import ConfigError
from hybridrl.kernels.head import HeadRule, HeadStats, hybrid_head_loss
from hybridrl.kernels.teacher_rows import HiddenTeacher
from hybridrl.models.tiny import tiny_model, tiny_tokenizer
from hybridrl.objectives.hybrid import HybridObjective
from hybridrl.objectives.pairs import PairObjective
from hybridrl.ops.compare import COMPARED
from hybridrl.policy.diagnostics import gradient_geometry
from hybridrl.policy.statistics import (
    HELDOUT,
    MAXIMA,
    MEANS,
    SUMS,
    Tally,
    batch_metrics,
    count_credits,
    count_micro,
    heldout_metrics,
    learner_stats,
    quarters,
    remedy,
)
from hybridrl.policy.student import Student
from hybridrl.report.figures import PANELS
from hybridrl.rewards.repetition import compressed_share, repeated_share
from hybridrl.rollout.header import chunk_header
from hybridrl.runtime.prometheus_sink import gauge_name
from hybridrl.settings.algorithm import AlgorithmConfig, PairConfig
from hybridrl.settings.choices import Source
from hybridrl.settings.compose import load_config
from hybridrl.tracking.console import PHASES
from hybridrl.tracking.glossary import SECTIONS, explain
from hybridrl.tracking.metrics_page import page
from hybridrl.types import (
    BatchPlan,
    ChunkHeader,
    EngineStats,
    Rewards,
    RolloutBatch,
    ScoredBatch,
    ScoreHeader,
    Work,
)
from tests.controller.test_graph import PROMISED
from tests.support.batches import make_batch, make_plan, make_rewards, make_scores, token_columns

CPU = torch.device("cpu")
DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana.json"
METRICS = [metric for section in SECTIONS for metric in section.metrics]


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A process group of this process alone; test_learner.py tests these metrics on two ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def reduced(tally: Tally) -> dict[str, float]:
    """The metrics of a tally after it was summed over all ranks."""
    tally.reduce()
    return tally.totals()


# -- counting --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_means_are_over_all_values_that_were_added_and_no_values_have_no_mean():
    tally = Tally(CPU)
    tally.add("kl/token", torch.tensor([1.0, 3.0, math.nan]), torch.tensor([True, True, False]))
    tally.add("kl/token", torch.tensor([5.0]))
    tally.add("policy/rho_max", torch.tensor([9.0, 2.0]), torch.tensor([False, True]))
    tally.add("policy/rho_max", torch.tensor([-1.0]))
    tally.add("advantage/max", torch.zeros(0))
    tally.add("train/loss", torch.tensor(0.25))
    tally.add("train/loss", torch.tensor(0.5))
    found = reduced(tally)
    assert found == {
        "kl/token": 3.0,
        "policy/rho_max": 2.0,
        "train/loss": 0.75,
        **dict.fromkeys(SUMS[1:], 0.0),
    }


def test_the_metrics_of_several_updates_are_over_all_of_their_tokens_and_a_sum_is_their_mean():
    """Two updates of 1 and of 3 tokens, with gradients of the norms 2 and 4."""
    first = Tally(CPU)
    second = Tally(CPU)
    for tally, kl, loss in ((first, [1.0], 0.5), (second, [2.0, 2.0, 5.0], 1.0)):
        tally.add("kl/token", torch.tensor(kl))
        tally.add("policy/rho_max", torch.tensor(kl))
        tally.add("tokens", torch.ones(len(kl), dtype=torch.bool))
        tally.add("train/loss", torch.tensor(loss))
        tally.add("dense_sq", torch.tensor(9.0))
        tally.add("advantage_sq", torch.tensor(kl))
        tally.add("advantage/mean", torch.tensor(kl))
        tally.add("minus_advantage", -torch.tensor(kl))
    found = Tally.over_updates([first, second]).totals()
    assert found["kl/token"] == 2.5 and found["policy/rho_max"] == 5.0
    assert found["train/loss"] == 0.75 and found["tokens"] == 4.0
    plans = [make_plan(LONG_AND_SHORT, num_tokens=1), make_plan(LONG_AND_SHORT, num_tokens=4)]
    row = batch_metrics(found, plans, [2.0, 4.0])
    assert row["train/updates"] == 2.0 and row["train/grad_norm"] == 3.0
    assert row["grad/dense_norm"] == 3.0 and row["policy/kept_frac"] == 0.8
    assert Tally.over_updates([second]).totals() == second.totals()


def micro_batch(
    batch: RolloutBatch,
    sparse: list[float],
    *,
    out: int | None = None,
    teachers: tuple[float, ...] = (1.0,),
) -> MicroBatch:
    """A micro-batch whose response tokens have weight 1, except that the token `out` has weight 0.

    Args:
        teachers: the weights of the teachers.
    """
    weight = torch.ones(len(sparse))
    if out is not None:
        weight[out] = 0.0
    scored = ScoredBatch(
        rollout=batch, scores=(), rewards=make_rewards(batch, [0.0] * batch.num_sequences)
    )
    credit = HybridObjective(AlgorithmConfig(), 8).credit(
        scored, make_plan(batch, teacher_weights=())
    )
    columns = credit.learned(torch.float32)._replace(
        token_weight=weight, sparse=torch.tensor(sparse)
    )
    rows = [
        HiddenTeacher(
            hidden=torch.zeros(len(sparse), 1),
            lm_head=torch.zeros(23, 1),
            weight=torch.full((len(sparse),), of_teacher),
        )
        for of_teacher in teachers
    ]
    return collate(train_sequences(scored.rollout, columns, rows))


def head_stats(logprobs: list[float], entropy: list[float], kl: list[float]) -> HeadStats:
    return HeadStats(
        logprobs=torch.tensor(logprobs),
        kl=torch.tensor(kl),
        entropy=torch.tensor(entropy),
        bounded=torch.tensor([value > -1 for value in logprobs]),
        dense_sq=torch.tensor(9.0, dtype=torch.float64),
        sparse_sq=torch.tensor(16.0, dtype=torch.float64),
        dense_sparse=torch.tensor(-6.0, dtype=torch.float64),
    )


# The sampler's log-prob of every token is -1.
LONG_AND_SHORT = make_batch([((1, 2), [(5, 6, 7, 8, 9, 2), (2,)])])


@pytest.mark.usefixtures("alone")
def test_a_step_is_measured_over_its_live_tokens():
    """Six of seven tokens are live. Their ratios rho are 1, 2, 1, 1, 1 and 1/2, whose sum is 6.5
    and whose squares sum to 8.25; rho - 1 - log rho sums to 0.5. Their advantages are 2, 1, 0, 0, 0
    and -3. The two gradients have the squared norms 9 and 16 and the inner product -6, so their
    cosine is -6 / 12.
    """
    tally, log2 = Tally(CPU), math.log(2)
    stats = head_stats(
        [-1, -1 + log2, -1, -1, -1, -50, -1 - log2], [1, 2, 3, 4, 5, 99, 7], [1, 1, 1, 1, 1, 99, 3]
    )
    count_micro(
        tally,
        torch.tensor(0.5),
        stats,
        micro_batch(LONG_AND_SHORT, [-2.0, -1.0, 0.0, 0.0, 0.0, -99.0, 3.0], out=5),
        0,
    )
    found = reduced(tally)
    row = batch_metrics(found, [make_plan(LONG_AND_SHORT, num_tokens=12)], [2.5])
    by_hand = {
        "train/loss": 0.5,
        "train/grad_norm": 2.5,
        "grad/dense_norm": 3.0,
        "grad/sparse_norm": 4.0,
        "grad/dense_sparse_ratio": 0.75,
        "grad/logit_cosine": -0.5,
        "kl/token": 8 / 6,
        "kl/sequence": 4.0,
        "entropy/token": 22 / 6,
        "entropy/token_q1": (1 + 2 + 7) / 3,
        "entropy/token_q2": 3.0,
        "entropy/token_q3": (4 + 5) / 2,
        "advantage/mean": 0.0,
        "advantage/std": math.sqrt(14 / 6),
        "advantage/min": -3.0,
        "advantage/max": 2.0,
        "advantage/positive_frac": 2 / 6,
        "advantage/abs_q1": (2 + 1 + 3) / 3,
        "advantage/abs_q2": 0.0,
        "advantage/abs_q3": 0.0,
        "policy/rho_mean": 6.5 / 6,
        "policy/rho_max": 2.0,
        "policy/ess": 6.5**2 / (6 * 8.25),
        "policy/bounded_frac": 1 / 6,
        "policy/logprob_gap": 2 * log2 / 6,
        "policy/logprob_gap_max": log2,
        "policy/kl_sampler": 0.5 / 6,
        "policy/kept_frac": 0.5,
        "train/updates": 1.0,
    }
    # The last quarter has no live token: the long response's token in it has weight 0.
    assert row == pytest.approx(by_hand, abs=1e-6)
    typed = learner_stats(found, {}, 0.5, optimizer_steps=1)
    assert typed.logprob_gap == pytest.approx(2 * log2 / 6) and typed.learn_s == 0.5
    assert typed.token_kl == pytest.approx(8 / 6) and typed.sparse_norm == 4.0


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("teachers", "kl"),
    [((0.5,), 2 * 4.0), ((0.25, 0.75), 4.0), ((1.25, -0.25), 4.0), ((0.0,), None), ((), None)],
)
def test_the_divergence_of_a_row_is_that_of_teachers_whose_weights_add_up_to_1(
    teachers: tuple[float, ...], kl: float | None
):
    """The head pass gives the weighted sum, here 1 to 7 with mean 4. If this sum were the metric, a
    schedule of the weights that follows the metric would influence itself.
    """
    tally = Tally(CPU)
    stats = head_stats([-1.0] * 7, [0.0] * 7, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    micro = micro_batch(LONG_AND_SHORT, [0.0] * 7, teachers=teachers)
    count_micro(tally, torch.tensor(0.0), stats, micro, 0)
    row = batch_metrics(reduced(tally), [make_plan(LONG_AND_SHORT)], [1.0])
    assert row.get("kl/token") == kl
    assert row.get("kl/sequence") == (kl and 3.5 * kl)  # seven tokens of two responses


@pytest.mark.usefixtures("alone")
def test_the_divergence_of_a_response_leaves_out_responses_without_a_teacher():
    """The long response has the divergences 1 to 6; the other response has no teacher."""
    tally = Tally(CPU)
    stats = head_stats([-1.0] * 7, [0.0] * 7, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    micro = micro_batch(LONG_AND_SHORT, [0.0] * 7)
    (teacher,) = micro.teachers
    of_long = torch.tensor([1.0, 1, 1, 1, 1, 1, 0])
    micro = replace(micro, teachers=(replace(teacher, weight=of_long),))
    count_micro(tally, torch.tensor(0.0), stats, micro, 0)
    row = batch_metrics(reduced(tally), [make_plan(LONG_AND_SHORT)], [1.0])
    assert row["kl/token"] == 3.5
    assert row["kl/sequence"] == 21.0


@pytest.mark.usefixtures("alone")
def test_tokens_that_older_weights_sampled_do_not_count_as_a_gap_between_sampler_and_learner():
    """Version 0 sampled all tokens and version 1 learns, so they differ because of an update."""
    tally = Tally(CPU)
    count_micro(
        tally,
        torch.tensor(0.0),
        head_stats([-3.0] * 7, [1.0] * 7, [0.0] * 7),
        micro_batch(LONG_AND_SHORT, [0.0] * 7),
        1,
    )
    found = reduced(tally)
    row = batch_metrics(found, [make_plan(LONG_AND_SHORT)], [1.0])
    assert learner_stats(found, {}, 0.0, optimizer_steps=1).logprob_gap is None
    assert (
        "policy/logprob_gap" not in row
        and "policy/logprob_gap_max" not in row
        and row["policy/kl_sampler"] > 0
    )


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("source", "sampled"), [(Source.teacher, True), (Source.data, False)])
def test_only_tokens_that_the_student_sampled_are_compared_with_the_learner(
    source: Source, sampled: bool
):
    tally = Tally(CPU)
    batch = replace(LONG_AND_SHORT, source=source)
    count_micro(
        tally,
        torch.tensor(0.0),
        head_stats([-3.0] * 7, [1.0] * 7, [0.0] * 7),
        micro_batch(batch, [0.0] * 7),
        0,
    )
    row = batch_metrics(reduced(tally), [make_plan(batch)], [1.0])
    assert (
        "policy/logprob_gap" not in row
        and "policy/kl_sampler" not in row
        and row["entropy/token"] == 1.0
    )
    assert ("policy/rho_mean" in row) == ("policy/ess" in row) == sampled


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({"entropy/token": math.nan, "kl/token": math.nan}, "the student's probabilities"),
        ({"entropy/token": 1.0, "kl/token": math.inf}, "the divergence from a teacher"),
        ({"entropy/token": 1.0, "advantage/mean": -math.inf}, "a reward, or a teacher's"),
        ({"entropy/token": 1.0, "kl/token": 0.1, "advantage/mean": 0.0}, "lower train.lr"),
    ],
)
def test_the_remedy_of_a_step_that_is_not_finite_names_the_first_value_that_was_not(
    found: dict[str, float], sentence: str
):
    assert remedy(found).startswith(sentence)
    assert ("lower train.lr" in remedy(found)) is (
        sentence in ("the student's probabilities", "lower train.lr")
    )


def test_the_quarters_of_a_response_depend_only_on_its_own_length():
    # token t of a response of n tokens is in quarter 4 t // n; the lengths are 4, 2, 8 and 1
    batch = make_batch([((1, 2), [(5, 6, 7, 8), (5, 2)]), ((1,), [(5, 6, 7, 8, 9, 5, 6, 2), (2,)])])
    assert quarters(micro_batch(batch, [0.0] * 15)).tolist() == [
        0,
        1,
        2,
        3,
        0,
        2,
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        0,
    ]


def test_the_inner_product_of_both_gradients_is_that_of_the_gradients_alone():
    g = torch.Generator().manual_seed(1)
    logits, teacher = (torch.randn(5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    eye = torch.eye(4, dtype=torch.float64)  # as output head, so that hidden states are logits
    terms = token_columns(
        token_ids=torch.tensor([0, 3, 1, 2, 2]),
        token_weight=torch.tensor([0.5, 0.25, 0.0, 0.25, 1.0], dtype=torch.float64),
        sparse=torch.tensor([1.0, -2.0, 9.0, 0.5, 3.0], dtype=torch.float64),
        sampler_logprobs=torch.zeros(5, dtype=torch.float64),
    )
    given = (HiddenTeacher(hidden=teacher, lm_head=eye, weight=torch.ones(5)),)

    def gradient(teachers, terms) -> tuple[torch.Tensor, HeadStats]:
        hidden = logits.clone().requires_grad_()
        loss, stats = hybrid_head_loss(hidden, eye, teachers, terms, HeadRule(chunk=2))
        loss.backward()
        return hidden.grad, stats

    dense, _ = gradient(given, terms._replace(sparse=torch.zeros(5, dtype=torch.float64)))
    sparse, _ = gradient((), terms)
    _, stats = gradient(given, terms)
    assert (
        float(stats.dense_sparse) == pytest.approx(float((dense * sparse).sum()), rel=1e-12)
        and abs(float(stats.dense_sparse)) > 0.01
    )


# -- metrics of objectives -------------------------------------------------------------------------

# The rewards of the second group are equal, so it has no pair.
PAIR = make_batch([((1,), [(5, 2), (6, 7, 8, 2)]), ((1, 2), [(5,), (6,)])])


SEEN = (-0.5, -0.5, -2.0, -1.0, -1.0, -1.0, -9.0, -9.0)


def watched(loss: str, seen: Sequence[float] = SEEN, **changes) -> dict[str, float]:
    rewards = make_rewards(PAIR, [1.0, 0.0, 1.0, 1.0])
    scored = ScoredBatch(
        rollout=PAIR,
        scores=(make_scores(PAIR, [-1.0] * 8),),
        rewards=rewards,
        learner_logprobs=np.array(seen, np.float32),
        learner_values=np.arange(8.0, dtype=np.float32),
    )
    objective = PairObjective(AlgorithmConfig(pair=PairConfig(loss=loss, **changes)))
    credit = objective.credit(scored, make_plan(PAIR, num_groups=1))
    tally = Tally(CPU)
    count_credits(tally, [credit])
    return {name: value for name, value in reduced(tally).items() if name.startswith("pair/")}


@pytest.mark.usefixtures("alone")
def test_a_pair_is_measured_by_its_scores():
    # log p: -1 of two tokens and -5 of four; log q: -2 and -4; so s_w = 1, s_l = -1
    assert watched("dpo") == pytest.approx(
        {
            "pair/loss": math.log1p(math.exp(-0.1 * 2)),  # beta 0.1
            "pair/accuracy": 1.0,
            "pair/margin": 2.0,
            "pair/chosen_score": 1.0,
            "pair/rejected_score": -1.0,
            "pair/score_max": 1.0,
            "pair/clamped_frac": 0.0,
            "pair/chosen_logprob": -0.5,
            "pair/rejected_logprob": -1.25,
            "pair/rejected_ratio": math.exp(-1),
        }
    )


@pytest.mark.usefixtures("alone")
def test_a_pair_of_equal_scores_counts_as_half_ranked():
    as_reference = [-1.0] * 8  # the reference log-prob of each token, so s_w = s_l = 0
    assert watched("dpo", as_reference)["pair/accuracy"] == 0.5


@pytest.mark.usefixtures("alone")
def test_a_clamp_is_counted_and_only_log_ratios_have_an_exponential():
    assert watched("dil_ukl", clamp=0.5)["pair/clamped_frac"] == 1.0
    assert watched("slic").keys().isdisjoint({"pair/rejected_ratio"})
    by_value = watched("bradley_terry")  # the values at the last tokens are 1 and 5
    assert (
        by_value["pair/margin"] == -4.0
        and by_value["pair/accuracy"] == 0.0
        and by_value["pair/score_max"] == 5.0
    )
    assert by_value.keys().isdisjoint({"pair/rejected_ratio", "pair/chosen_logprob"})


# -- from headers and scalars ----------------------------------------------------------------------


def scored_by(name: str, values: list[float], k: int) -> Rewards:
    batch = make_batch([((1,), [(2,)] * k)] * (len(values) // k))
    return replace(make_rewards(batch, values), part_names=(name,))


def test_a_group_passes_with_any_response_and_groups_of_equal_rewards_are_counted():
    row = reward_metrics(
        [scored_by("it", [1, 0, 0, 0], 2), scored_by("it", [0.5, 0.5, math.nan, 1], 2)]
    )
    assert row["reward/mean"] == pytest.approx(3 / 7) and row["reward/error_rate"] == 1 / 8
    assert (
        row["reward/pass_at_k"] == 1 / 3 and row["reward/equal_groups_frac"] == 2 / 3
    )  # whether the rewards of the group with the failed call are equal is not known
    assert row["reward/it/mean"] == pytest.approx(3 / 7)


def test_the_order_of_given_pairs_is_no_reward():
    ranked = replace(scored_by("it", [1, 0], 2), part_names=(), parts=np.zeros((0, 2), np.float32))
    assert reward_metrics([ranked]) == {}
    assert reward_metrics([ranked, scored_by("it", [1, 1], 2)])["reward/mean"] == 1.0


def header(source: Source = Source.student, version: int = 3) -> ChunkHeader:
    batch = replace(
        LONG_AND_SHORT,
        source=source,
        policy_versions=np.full_like(LONG_AND_SHORT.policy_versions, version),
    )
    return chunk_header(batch, [1.0, 2.0])


def test_lengths_ends_and_staleness_come_from_headers():
    read = replace(
        make_rewards(LONG_AND_SHORT, [0, 0]),
        compressed=np.array([0.5, np.nan]),
        repeated=np.array([0.25, np.nan]),
    )
    cut = replace(
        header(version=1), truncated=np.array([True, False]), aborted=np.array([False, True])
    )
    row = rollout_metrics([header(), cut, header(Source.data, 0)], [read], 3)
    assert row["rollout/length_mean"] == 3.5 and row["rollout/length_max"] == 6.0
    assert row["rollout/truncated_frac"] == 1 / 6 and row["rollout/eos_frac"] == 4 / 6
    assert row["rollout/compressed"] == 0.5 and row["rollout/repeated"] == 0.25
    assert (
        row["policy/staleness_mean"] == 1.0 and row["policy/staleness_max"] == 2.0
    )  # responses of the data have no version
    assert "rollout/compressed" not in rollout_metrics(
        [header()], [make_rewards(LONG_AND_SHORT, [0, 0])], 3
    )


def test_repetition_is_measured_in_ids_and_in_text():
    # of the three 4-grams 1212, 2121 and 1212, one is a repetition
    assert (
        repeated_share([1, 2, 1, 2, 1, 2]) == pytest.approx(1 / 3)
        and repeated_share([1, 2, 3, 4, 5]) == 0.0
    )
    assert math.isnan(repeated_share([1, 2, 3])) and math.isnan(compressed_share(""))
    assert compressed_share("so it is 4. " * 50) < 0.1 < 0.9 < compressed_share("7*3-9")
    assert compressed_share("\ud800") > 0, "half a surrogate pair, as a cut response may end"


# -- the glossary ----------------------------------------------------------------------------------


def probed() -> dict[str, float]:
    """The metrics of diagnostics, from a batch from which nothing is learned."""
    micro = micro_batch(LONG_AND_SHORT, [0.0] * 7)
    torch.manual_seed(0)
    student = Student(tiny_model(tiny_tokenizer()), HeadRule(), with_value=False)
    return gradient_geometry(student, [micro], torch.device("cpu"))


FOUND = dict.fromkeys(SUMS + MEANS + MAXIMA, 1.0)
NAMED = replace(LONG_AND_SHORT, uids=("a/1@0",))
READ = replace(make_rewards(LONG_AND_SHORT, [0, 1]), compressed=np.ones(2), repeated=np.ones(2))


def record() -> StepRecord:
    """The record of step 4 with weights of version 3: one chunk of 100 bytes and 7 response
    tokens.
    """
    plan = make_plan(LONG_AND_SHORT, step=3)
    reported = EngineStats(kv_use=0.5, running=2, prefix_queries=8, prefix_hits=2)
    headers = [replace(header(), nbytes=100, engine=reported)]
    scores = [ScoreHeader(teacher="main", nbytes={"teacher_hidden": 70}, score_s=1.5)]
    return StepRecord(
        steps_done=4,
        headers=headers,
        rewards=[READ],
        scores=scores,
        plan=BatchPlan.one_update(plan),
        stats=learner_stats(FOUND, batch_metrics(FOUND, [plan], [1.0]), 2.5, optimizer_steps=1),
        cost=step_cost(headers, scores, 4_000_000_000),
        probe_gap=0.01,
        num_late=1,
        num_sampled=4,
        in_flight_bytes=340,
        materialized_bytes=0,
        restarts=2,
        step_s=3.5,
        sync_s=2.0,
        phases={"time/rollout_s": 0.5},
        work=[
            ("rollout/0", Work(tokens=7, busy_s=2.0, peak_bytes={"rollout": 100, "sync": 90})),
            ("learner/0", Work(tokens=7, busy_s=0.5, peak_bytes={"learn": 80, "sync": 70})),
        ],
    )


def test_each_data_source_has_its_share_lengths_and_rewards():
    """Source a has one prompt with responses of 6 and 1 tokens and rewards 1 and 0; b has two
    prompts with responses of 1 token, one of whose rewards failed; c has none.
    """
    of_a = replace(LONG_AND_SHORT, uids=("a/1@0",))
    of_b = replace(
        make_batch([((1,), [(2,), (2,)]), ((1,), [(2,), (2,)])]), uids=("b/1@0", "b/2@0")
    )
    headers = [chunk_header(of_a, [1.0, 2.0]), chunk_header(of_b, [1.0] * 4)]
    rewards = [make_rewards(of_a, [1, 0]), make_rewards(of_b, [1, 1, 1, math.nan])]
    assert source_metrics(headers, rewards, {"a": 0.5, "b": 2.0, "c": 0.0}) == {
        "data/a/share": 1 / 3,
        "data/a/epochs": 0.5,
        "data/a/length_mean": 3.5,
        "data/a/truncated_frac": 0.0,
        "data/a/reward_mean": 0.5,
        "data/b/share": 2 / 3,
        "data/b/epochs": 2.0,
        "data/b/length_mean": 1.0,
        "data/b/truncated_frac": 0.0,
        "data/b/reward_mean": 1.0,
        "data/c/share": 0.0,
        "data/c/epochs": 0.0,
    }
    assert source_metrics(headers, rewards, {}) == {}, "there is a single source"
    from_data = [replace(r, part_names=()) for r in rewards]
    assert "data/a/reward_mean" not in source_metrics(headers, from_data, {"a": 0.5})


def test_a_row_has_metrics_of_every_part_of_the_step():
    row = step_row(record())
    by_hand = {
        "train/step": 4.0,
        "rollout/late_frac": 0.25,
        "policy/probe_gap": 0.01,
        "policy/staleness_max": 0.0,
        "transfer/bytes_rollout": 100.0,
        "transfer/bytes_scores": 70.0,
        "transfer/token_bytes/teacher_hidden": 10.0,
        "transfer/inflight_bytes": 340.0,
        "perf/weights_gb_per_s": 2.0,
        "perf/tokens_per_s": 2.0,
        "cluster/restarts": 2.0,
        "time/scorers_busy_s": 1.5,
        "time/learner_busy_s": 2.5,
        "time/rollout_s": 0.5,
        "engine/rollout/kv_use": 0.5,
        "engine/rollout/prefix_hit_rate": 0.25,
        "perf/rollout/tokens_per_s_min": 3.5,
        "perf/learner/tokens_per_s_mean": 14.0,
        "memory/rollout/sync_bytes": 90.0,
        "memory/learner/learn_bytes": 80.0,
    }
    assert {key: row[key] for key in by_hand} == pytest.approx(by_hand)


def everything() -> set[str]:
    """Every key that any row of metrics has."""
    saving = Saving()
    saving.start(1, lambda: None)
    saving.settle()
    rows = [
        saving.take(),
        step_row(record()),
        source_metrics([chunk_header(NAMED, [1.0, 2.0])], [READ], {"a": 1.0}),
        summary([READ], []).metrics,
        accuracy_of_sources(["a/1"], np.ones(1, np.float32)),
        heldout_metrics(FOUND),
        probed(),
    ]
    others = (
        {f"teacher/{name}" for name in COMPARED}
        | {f"time/{phase}_s" for phase in PHASES}
        | {"eval/accuracy_teacher/main"}
        | set(set_statistics(np.ones((1, 2)), [1, 1], [False, False], 2).metrics("hard"))
        | {key.replace("eval/", "eval/hard/") for key in HELDOUT.values()}
    )
    return {key for row in rows for key in row} | PROMISED | others


@pytest.mark.usefixtures("alone")
def test_every_key_is_in_the_glossary_and_every_entry_is_a_key():
    keys = everything()
    assert sorted(key for key in keys if explain(key) is None) == []
    assert sorted(m.key for m in METRICS if not any(explain(key) is m for key in keys)) == []
    assert len({m.key for m in METRICS}) == len(METRICS) and all(
        m.formula and m.reading for m in METRICS
    )


@pytest.mark.usefixtures("alone")
def test_the_dashboard_asks_for_gauges_of_metrics_that_some_row_has():
    gauges = {f"ray_{gauge_name(key)}" for key in everything()}
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = [name for query in queries for name in re.findall(r"(\w+)\{", query)]
    assert len(names) == len(queries) >= 20, "each query reads one gauge"
    assert sorted(set(names) - gauges) == []
    variable = next(v for v in dashboard["templating"]["list"] if v["name"] == "run")
    assert re.findall(r"label_values\((\w+), run\)", variable["query"]) == [
        f"ray_{gauge_name('train/step')}"
    ]


def test_the_most_particular_entry_explains_a_key():
    assert (
        explain("reward/countdown/mean").key == "reward/<name>/mean"
        and explain("time/step_s").key == "time/step_s"
    )
    assert (
        explain("time/rollout_s").key == "time/<phase>_s"
        and explain("entropy/token_q4").key == "entropy/token_q<quarter>"
    )
    assert explain("reward/a/b/mean") is None and explain("kl/tokens") is None


FOLLOWED = {
    "algorithm.reward_weight={kind: feedback, value: 1, metric: reward/maen, target: 0.5}": (
        "algorithm.reward_weight.metric=reward/maen"
    ),
    "+teachers.main.schedule={kind: feedback, value: 1, metric: kl/tokens, target: 0.1}": (
        "teachers.main.schedule.metric=kl/tokens"
    ),
    "checkpoint.best=eval/acuracy": "checkpoint.best=eval/acuracy",
}


@pytest.mark.parametrize("override", FOLLOWED)
def test_a_metric_that_no_step_has_cannot_be_followed(override: str):
    settings = load_config(
        ["experiment=quickstart", "run.dir=here", "checkpoint.every=20", "eval.every=20", override]
    )
    with pytest.raises(ConfigError) as error:
        check_metrics(settings)
    assert (
        str(error.value) == f"{FOLLOWED[override]}: there is no such metric; choose one of "
        "hybridrl/tracking/METRICS.md, e.g. reward/mean"
    )


def test_a_weight_follows_what_each_step_measures_and_the_best_checkpoint_an_evaluation_too():
    feedback = "algorithm.reward_weight={{kind: feedback, value: 1, metric: {}, target: 0.5}}"
    given = [
        "experiment=quickstart",
        "run.dir=here",
        "checkpoint.every=20",
        "eval.every=20",
        "checkpoint.best=eval/accuracy",
    ]
    check_metrics(load_config([*given, feedback.format("reward/mean")]))
    with pytest.raises(
        ConfigError,
        match=r"^algorithm\.reward_weight\.metric=eval/accuracy: is not measured in every step; ",
    ):
        check_metrics(load_config([*given, feedback.format("eval/accuracy")]))


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        ("eval/hard/accuracy", None),
        ("eval/hard/pass_at_6", None),
        (
            "eval/hrad/accuracy",
            "checkpoint.best=eval/hrad/accuracy: there is no set hrad; eval.sets has hard",
        ),
        (
            "eval/hard/pass_at_8",
            "checkpoint.best=eval/hard/pass_at_8: eval.sets.hard.samples=6 measures pass_at_1, "
            "pass_at_2, pass_at_4, pass_at_6; choose one of them",
        ),
    ],
)
def test_the_best_checkpoint_is_chosen_by_what_a_set_measures(metric: str, sentence: str | None):
    settings = load_config(
        [
            "experiment=quickstart",
            "run.dir=here",
            "checkpoint.every=20",
            "eval.every=20",
            "+eval.sets.hard={task: countdown, samples: 6}",
            f"checkpoint.best={metric}",
        ]
    )
    if sentence is None:
        check_metrics(settings)
        return
    with pytest.raises(ConfigError) as error:
        check_metrics(settings)
    assert str(error.value) == sentence


def test_a_teacher_of_any_name_has_its_own_entry():
    assert explain("eval/accuracy_teacher/loss").key == "eval/accuracy_teacher/<name>"


def test_the_curves_of_the_report_are_of_metrics_in_the_glossary():
    assert [key for panel in PANELS for key in panel.needs if explain(key) is None] == []


def test_the_page_of_metrics_is_up_to_date():
    written = Path(__file__).parent.parent.parent / "hybridrl" / "tracking" / "METRICS.md"
    assert written.read_text() == page(), (
        "python -m hybridrl.tracking.metrics_page > hybridrl/tracking/METRICS.md"
    )
