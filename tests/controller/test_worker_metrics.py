"""The metrics of a step's work, aggregated over the workers of each kind."""

from dataclasses import replace

import numpy as np

from hybridrl.controller.metrics import worker_times
from hybridrl.controller.sampling import Arrived, PendingChunk
from hybridrl.controller.worker_metrics import engine_metrics, work_metrics
from hybridrl.controller.worker_reports import work_of
from hybridrl.rollout.header import chunk_header
from hybridrl.runtime.calls import Pending
from hybridrl.runtime.chunk import Chunk
from hybridrl.runtime.scorer_group import ScoreCall
from hybridrl.settings.choices import Source
from hybridrl.types import ChunkHeader, EngineStats, LearnerStats, ScoreHeader, Work
from tests.support.batches import make_batch, make_rewards


def header(source: Source, engine: EngineStats | None) -> ChunkHeader:
    batch = replace(make_batch([((1, 2), [(5, 2), (2,)])]), source=source)
    return replace(chunk_header(batch, [1.0, 2.0]), engine=engine)


def score(teacher: str, engine: EngineStats | None) -> ScoreHeader:
    return ScoreHeader(teacher=teacher, nbytes={}, score_s=1.0, engine=engine)


def test_largest_values_are_of_one_engine_and_counts_are_over_all_of_a_kind():
    headers = [
        header(
            Source.student,
            EngineStats(kv_use=0.5, running=8, preemptions=1, prefix_queries=30, prefix_hits=15),
        ),
        header(
            Source.student,
            EngineStats(kv_use=0.25, running=4, waiting=2, preemptions=2, prefix_queries=10),
        ),
        header(Source.teacher, EngineStats(running=1)),
        header(Source.data, None),
    ]
    scores = [score("big", EngineStats(running=3)), score("small", None)]
    assert engine_metrics(headers, scores) == {
        "engine/rollout/kv_use": 0.5,
        "engine/rollout/running": 8.0,
        "engine/rollout/waiting": 2.0,
        "engine/rollout/preemptions": 3.0,
        "engine/rollout/prefix_hit_rate": 15 / 40,
        "engine/teacher/kv_use": 0.0,
        "engine/teacher/running": 1.0,
        "engine/teacher/waiting": 0.0,
        "engine/teacher/preemptions": 0.0,
        "engine/scorer-big/kv_use": 0.0,
        "engine/scorer-big/running": 3.0,
        "engine/scorer-big/waiting": 0.0,
        "engine/scorer-big/preemptions": 0.0,
    }


def test_the_slowest_worker_and_the_mean_of_a_kind_are_over_the_time_in_which_they_were_busy():
    """rollout/0 generates 300 tokens in 3 seconds, and rollout/1 100 tokens in 2 seconds."""
    reports = [
        ("rollout/0", Work(tokens=100, busy_s=2.0, peak_bytes={"rollout": 5, "sync": 9})),
        ("rollout/0", Work(tokens=200, busy_s=1.0, peak_bytes={"rollout": 8})),
        ("rollout/1", Work(tokens=100, busy_s=2.0, peak_bytes={"rollout": 7})),
        ("scorer-main/0", Work(tokens=0, busy_s=0.0, peak_bytes={})),
        ("learner/0", Work(tokens=40, busy_s=0.5, peak_bytes={"learn": 3})),
    ]
    assert work_metrics(reports) == {
        "perf/rollout/tokens_per_s_min": 50.0,
        "perf/rollout/tokens_per_s_mean": 75.0,
        "memory/rollout/rollout_bytes": 8.0,
        "memory/rollout/sync_bytes": 9.0,
        "perf/learner/tokens_per_s_min": 80.0,
        "perf/learner/tokens_per_s_mean": 80.0,
        "memory/learner/learn_bytes": 3.0,
    }


def called(worker: str) -> Pending:
    return Pending(ref=None, worker=worker, call="c", deadline_s=1.0)


def worked(tokens: int) -> Work:
    return Work(tokens=tokens, busy_s=1.0, peak_bytes={})


def arrived(writer: str, work: Work | None, scorers: tuple[str, ...]) -> Arrived:
    """A chunk of one response by `writer`, scored by `scorers`, each of which serves one
    teacher.
    """
    batch = make_batch([((1,), [(2,)])])
    chunk = Chunk(order=None, prompts=(), header=called(writer), batch=called(writer))
    drawn = PendingChunk(
        writer=None,
        chunk=chunk,
        reward_weights=(),
        rewards=called("reward/0"),
        scores=[ScoreCall(called(scorer), called(scorer)) for scorer in scorers],
    )
    header = replace(chunk_header(batch, [1.0]), work=work)
    return Arrived(drawn=drawn, header=header, rewards=make_rewards(batch, [0.0]), groups=(0,))


def test_each_report_has_the_name_of_the_worker_that_was_called_and_the_data_has_none():
    chunks = [
        arrived("rollout/1", worked(1), ("scorer-big/0", "scorer-small/0")),
        arrived("data/0", None, ("scorer-big/1", "scorer-small/0")),
    ]
    # The works are ordered by teacher; the small teacher is a server, which measures nothing.
    works = [worked(2), worked(3), None, None]
    scores = [replace(score("any", None), work=work) for work in works]
    stats = LearnerStats(
        logprob_gap=None,
        token_kl=None,
        sparse_norm=0.0,
        metrics={},
        learn_s=1.0,
        optimizer_steps=1,
        work=(worked(4), worked(5)),
    )
    assert work_of(chunks, scores, stats) == [
        ("rollout/1", worked(1)),
        ("scorer-big/0", worked(2)),
        ("scorer-big/1", worked(3)),
        ("learner/0", worked(4)),
        ("learner/1", worked(5)),
    ]


def test_responses_of_the_data_took_no_time_and_are_no_part_of_how_long_responses_took():
    """The student's responses took 1 and 2 s."""
    stats = LearnerStats(
        logprob_gap=None,
        token_kl=None,
        sparse_norm=0.0,
        metrics={},
        learn_s=0.0,
        optimizer_steps=1,
    )
    of_data = replace(header(Source.data, None), finish_s=np.zeros(2, np.float32))
    times = worker_times([header(Source.student, None), of_data, of_data], [], stats)
    assert times["time/response_s_p50"] == 1.5 and times["time/response_s_max"] == 2.0
    assert set(worker_times([of_data], [], stats)) == {
        "time/scorers_busy_s",
        "time/learner_busy_s",
    }
