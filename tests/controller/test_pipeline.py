"""Sampling ahead of learning: when prompts are drawn, which are drawn again, and which are stored
in a checkpoint.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import ray

from hybridrl.controller.coefficients import Coefficients
from hybridrl.controller.evaluator import Evaluator
from hybridrl.controller.pipeline import Pipeline
from hybridrl.controller.preemption import Preemption
from hybridrl.controller.reward_errors import check_reward_errors
from hybridrl.controller.sampling import Arrived, PendingChunk, Sampling, first_groups
from hybridrl.core.errors import (
    DataError,
    FleetExhausted,
    Preempted,
    RewardError,
    WorkerDied,
    WorkerError,
    WorkerTimeout,
)
from hybridrl.data.prompts import PromptSource
from hybridrl.rollout.replay import Replay
from hybridrl.runtime.actor_group import ActorGroup
from hybridrl.runtime.calls import Pending, await_first, gather, outcomes, settle
from hybridrl.runtime.chunk import Chunk
from hybridrl.runtime.engine_load import EngineLoad
from hybridrl.runtime.fleet import Fleet as EngineFleet
from hybridrl.settings.choices import Source
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings
from hybridrl.settings.shares import chunk_size
from hybridrl.types import NO_VERSION, ChunkHeader, GenerateOrder, Prompt, Rewards
from tests.support.batches import make_batch, make_rewards

PROMPTS = [Prompt(uid=f"p{i}", input_ids=(1, 2), text="", columns={}) for i in range(5)]


def settings(*overrides: str) -> RunSettings:
    sizes = ["train.prompts_per_step=2", "train.steps=6", "rollout.groups_per_chunk=1"]
    return load_config(["run.dir=here", "experiment=quickstart", *sizes, *overrides])


def pending(number: int) -> Pending:
    return Pending(ref=number, worker="engine", call="generate", deadline_s=1.0)


def drawn(prompts: list[Prompt], wave: str) -> list[PendingChunk]:
    order = GenerateOrder(
        wave=wave, chunk=0, num_chunks=1, group_size=2, temperature=1.0, max_new_tokens=1, seed=0
    )
    chunks = [
        Chunk(order=order, prompts=(p,), header=pending(0), batch=pending(0)) for p in prompts
    ]
    return [
        PendingChunk(writer=None, chunk=chunk, reward_weights=(), rewards=pending(0))
        for chunk in chunks
    ]


class NoEngine:
    """A stand-in for the engines of a run while none of them serves."""

    def generate(self, prompts, *, watch, **how):
        watch()
        raise AssertionError("the wait for an engine is not watched")

    def again(self, chunk, watch):
        self.generate(chunk.prompts, watch=watch)

    def lose(self, error, watch):
        self.generate((), watch=watch)


def raised(error: Exception) -> None:
    raise error


class Recorder:
    """A stand-in for Sampling that records the waves that are drawn."""

    def __init__(self) -> None:
        self.waves: list[tuple[str, list[str]]] = []

    def draw(self, prompts, *, step, wave, seed, reward_weights):
        self.waves.append((wave, [p.uid for p in prompts]))
        return drawn(prompts, wave)


def pipeline(*overrides: str) -> tuple[Pipeline, Recorder, PromptSource]:
    given, recorder, source = settings(*overrides), Recorder(), PromptSource(PROMPTS, 0)
    return Pipeline(given, recorder, source, Coefficients(given), store_bytes=1e9), recorder, source


def test_with_the_sync_schedule_a_wave_is_drawn_when_its_step_begins():
    made, recorder, _ = pipeline()
    for step in range(3):
        assert made.take(step).step == step
        assert [wave for wave, _ in recorder.waves] == [f"train-{s}" for s in range(step + 1)]


def test_with_the_pipelined_schedule_two_further_steps_are_under_way_and_none_after_the_last():
    made, recorder, _ = pipeline("schedule=pipelined")
    assert made.take(0).step == 0 and len(recorder.waves) == 1, (
        "the size of a wave is not known yet"
    )
    made.wave_bytes = 10
    assert made.take(1).step == 1 and len(recorder.waves) == 4
    assert [made.take(step).step for step in (2, 3, 4, 5)] == [2, 3, 4, 5]
    assert [wave for wave, _ in recorder.waves] == [f"train-{s}" for s in range(6)]


def test_sampling_waits_while_the_waves_ahead_would_fill_the_store():
    """Waves have 10 bytes, and the wave of the present step counts too: three waves fit into 30
    bytes, two into 29 or 20, and one into 19. The wave of the present step is always drawn.
    """
    for limit, ahead in ((30, 2), (29, 1), (20, 1), (19, 0), (9, 0)):
        made, _, _ = pipeline("schedule=pipelined", f"pipeline.max_inflight_bytes={limit}")
        made.wave_bytes = 10
        made.take(0)
        assert len(made.waves) == ahead


def stopped() -> Preemption:
    preemption = Preemption()
    preemption.signal_name = "SIGTERM"
    return preemption


def test_a_stop_signal_ends_the_wait_for_an_engine_and_the_prompts_are_drawn_again():
    made, _, source = pipeline()
    workers = SimpleNamespace(rollout=NoEngine(), teacher_rollout=None, replay=None)
    made.sampling = Sampling(settings(), workers, stopped())
    with pytest.raises(Preempted):
        made.take(0)
    resumed = PromptSource(PROMPTS, 0)
    resumed.load_state_dict(source.state_dict(made.in_flight()))
    assert resumed.next_batch(5) == PromptSource(PROMPTS, 0).next_batch(5)


def test_the_prompts_of_a_wave_for_which_no_engine_can_be_had_are_drawn_again():
    made, recorder, source = pipeline()
    recorder.draw = lambda *_, **__: raised(FleetExhausted("rollout/0 cannot be replaced"))
    with pytest.raises(FleetExhausted):
        made.take(0)
    assert source.next_batch(5) == PromptSource(PROMPTS, 0).next_batch(5)


def test_the_datas_responses_to_held_out_prompts_come_in_chunks_as_large_as_in_a_training_step():
    """A step has 4 prompts, of which the data answers half."""
    given = settings("train.prompts_per_step=4")
    given = replace(given, algorithm=replace(given.algorithm, data_fraction=0.5))
    asked: list[list[str]] = []

    def generate(prompts: list[Prompt], *, wave: str) -> list[Chunk]:
        asked.append([p.uid for p in prompts])
        return [drawn(prompts[:1], wave)[0].chunk]

    replay = SimpleNamespace(generate=generate, rank=lambda chunks: [pending(0) for _ in chunks])
    workers = SimpleNamespace(replay=replay, rewards=None, scorers=[])
    under_way = Sampling(given, workers, None).heldout(PROMPTS, wave="eval-data-0")
    assert asked == [["p0", "p1"], ["p2", "p3"], ["p4"]] and len(under_way) == 3


def test_a_stop_signal_ends_the_wait_for_the_worker_in_the_place_of_one_that_failed(monkeypatch):
    lost = WorkerDied("engine", "generate", "killed", 0)
    sampling = Sampling(settings(), NoEngine(), stopped())
    waited = drawn(PROMPTS[:1], "train-0")
    monkeypatch.setattr("hybridrl.controller.sampling.settle", lambda *_: ([lost], [lost]))
    with pytest.raises(Preempted):
        sampling.headers(waited)
    waited[0].writer = NoEngine()
    with pytest.raises(Preempted):
        sampling._sample_again(waited[0])


def test_further_waves_of_a_step_have_further_prompts_and_names_of_their_own():
    """With algorithm.dynamic_sampling a run draws again while too few groups are usable."""
    made, recorder, _ = pipeline()
    first = made.take(0)
    second = made.redraw(0)
    assert [wave for wave, _ in recorder.waves] == ["train-0", "train-0.1"]
    uids = [uid for _, drawn in recorder.waves for uid in drawn]
    assert len(set(uids)) == made.num_sampled == 4, "no prompt is in both"
    assert [prompt.uid for prompt in made.in_flight()] == uids
    made.settle(returning=second.prompts)
    assert made.in_flight() == []
    made.take(1)
    assert recorder.waves[2] == ("train-1", [prompt.uid for prompt in second.prompts])
    assert first.step == second.step == 0


@pytest.mark.parametrize(
    ("failed", "learns", "refused"), [(1, True, False), (2, True, True), (4, False, False)]
)
def test_more_failed_rewards_than_reward_max_error_rate_end_a_run_that_learns_from_them(
    failed: int, learns: bool, refused: bool
):
    """There are four responses in two chunks, and the rate is a quarter. Responses of the data do
    not count, because no function judges them.
    """
    values = [math.nan] * failed + [1.0] * (4 - failed)
    batch = make_batch([((1,), [(2,), (2,)])])
    rewards = [make_rewards(batch, values[:2]), make_rewards(batch, values[2:])]
    ranks = Replay().rank(make_batch([((1,), [(2,)] * 8)]))
    message = r"^step 7: 50\.0% of the reward calls failed, reward\.max_error_rate is 25\.0%; see"
    with pytest.raises(RewardError, match=message) if refused else nullcontext():
        check_reward_errors([*rewards, ranks], 0.25, step=7, learned_from=learns)
    check_reward_errors([ranks], 0.25, step=7, learned_from=learns)


def test_more_prompts_are_drawn_than_a_step_takes_when_oversampling():
    made, recorder, _ = pipeline("rollout.oversample=0.5")
    made.take(0)
    assert len(recorder.waves[0][1]) == 3


def test_prompts_that_come_back_come_first_and_keep_their_epoch():
    source = PromptSource(PROMPTS, 0)
    first = source.next_batch(4)
    source.put_back(first[1:3])
    again = source.next_batch(4)
    assert [p.uid for p in again[:2]] == [p.uid for p in first[1:3]]
    assert again[2].uid.endswith("@0") and again[3].uid.endswith("@1")


def test_a_resumed_source_first_returns_the_prompts_that_were_in_flight_or_came_back():
    uninterrupted = PromptSource(PROMPTS, 0)
    stopped = PromptSource(PROMPTS, 0)
    stopped.next_batch(2)  # trained on
    in_flight, returned = stopped.next_batch(2), stopped.next_batch(3)
    stopped.put_back(returned[1:])
    resumed = PromptSource(PROMPTS, 0)
    resumed.load_state_dict(stopped.state_dict(in_flight))
    assert resumed.next_batch(5)[:4] == [*in_flight, *returned[1:]]
    uninterrupted.next_batch(7)
    assert resumed.next_batch(3) == uninterrupted.next_batch(4)[1:], "then the order continues"


def test_a_state_that_names_a_prompt_which_the_data_lacks_is_refused():
    with pytest.raises(DataError, match="prompt p9, which was drawn but not trained on"):
        PromptSource(PROMPTS, 0).load_state_dict({"epoch": 0, "position": 0, "owed": ["p9@0"]})


def test_every_engine_gets_a_chunk_however_large_chunks_may_be():
    assert [chunk_size(10, 96, engines) for engines in (1, 2, 3)] == [10, 5, 4]
    assert chunk_size(10, 1, 2) == 1 and chunk_size(0, 8, 2) == 1


def test_the_prompts_of_a_skipped_batch_stay_in_flight_until_a_step_is_made():
    """Two prompts are drawn per step. The first batch is skipped: its first prompt returns to the
    source and is drawn again, and its second one stays in flight.
    """
    made, _, source = pipeline()
    first = made.take(0).prompts
    made.skip(returning=first[:1])
    assert [p.uid for p in made.in_flight()] == [first[1].uid]
    second = made.take(0).prompts
    assert second[0] == first[0] and [p.uid for p in made.in_flight()] == [
        first[1].uid,
        *(p.uid for p in second),
    ]
    resumed = PromptSource(PROMPTS, 0)
    resumed.load_state_dict(source.state_dict(made.in_flight()))
    assert resumed.next_batch(3) == [first[1], *second]
    made.settle([])
    assert made.in_flight() == [] == made.skipped


@pytest.fixture(scope="module")
def alone():
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.graph
def test_a_chunk_goes_to_the_engine_with_the_fewest_tokens_to_do(alone):
    """Idle engines take turns. Then engine 0 has 12 pending tokens and engine 1 none, so three
    chunks of 5 tokens go to engine 1 before the next one goes to engine 0.
    """
    load = EngineLoad(2)
    assert load.assign([5, 5, 5, 5], {0, 1}) == [0, 1, 0, 1]
    never = ray.remote(num_cpus=99)(lambda: None).remote()
    load.add(0, 12, Pending(ref=never, worker="rollout/0", call="generate", deadline_s=1.0))
    load.add(
        1, 99, Pending(ref=ray.put("done"), worker="rollout/1", call="generate", deadline_s=1.0)
    )
    assert load.assign([5, 5, 5, 5], {0, 1}) == [1, 1, 1, 0] and load.assign([5, 5], {0}) == [0, 0]


class Fleet:
    """A stand-in for the workers of a run; `then` is called for each worker that is lost."""

    def __init__(
        self,
        silent: Pending | None = None,
        then: Callable[[WorkerError], None] = lambda error: None,
    ) -> None:
        self.silent_call = silent
        self.then = then
        self.lost: list[str] = []
        self.cancelled: list[str] = []
        self.engines = [self]
        self.scorers = []
        self.replay = None
        self.rewards = self

    def silent(self) -> Pending | None:
        return self.silent_call

    def lose(self, error: WorkerError, watch: Callable[[], None]) -> None:
        watch()  # as the product does while it waits for the new worker
        self.silent_call = None
        self.lost.append(error.worker)
        self.then(error)

    def cancel(self, chunks) -> None:
        self.cancelled += [chunk.prompts[0].uid for chunk in chunks]

    def score_one(self, chunk: Chunk, weights) -> Pending:
        return pending(0)

    def again(self, chunk: Chunk, watch: Callable[[], None]) -> Chunk:
        watch()  # as the product does while no engine serves
        return replace(chunk, header=under_way("rollout/0"))


def under_way(worker: str) -> Pending:
    return Pending(
        ref=ray.remote(num_cpus=99)(lambda: None).remote(),
        worker=worker,
        call="generate",
        deadline_s=60.0,
    )


def ended(value: object, worker: str = "rollout/0") -> Pending:
    return Pending(ref=ray.put(value), worker=worker, call="generate", deadline_s=60.0)


def died(worker: str) -> Pending:
    @ray.remote(num_cpus=1, max_retries=0)
    def die() -> None:
        raise WorkerDied(worker, "generate", "on purpose")

    return Pending(ref=die.remote(), worker=worker, call="generate", deadline_s=60.0)


def sampled(headers: list[Pending]) -> list[PendingChunk]:
    return [
        replace(d, chunk=replace(d.chunk, header=h))
        for d, h in zip(drawn(PROMPTS, "train-0"), headers, strict=False)
    ]


@pytest.mark.graph
def test_a_worker_that_is_silent_is_lost_although_no_call_of_it_is_awaited(alone):
    """The pending call of another worker then gives neither a result nor an error."""
    silent = replace(under_way("rollout/1"), call="ping", deadline_s=0.1)
    values, [lost] = settle([ended("x"), under_way("rollout/0")], lambda: silent)
    assert values == ["x", None] and isinstance(lost, WorkerTimeout) and lost.worker == "rollout/1"
    with pytest.raises(WorkerTimeout, match="rollout/1 failed in ping"):
        gather([ended("x"), under_way("rollout/0")], lambda: silent)


@pytest.mark.graph
def test_a_silent_worker_is_reported_with_the_ping_that_it_did_not_answer(alone):
    """The error names the ping, not its other pending call, whose deadline is longer."""
    ping = replace(under_way("rollout/0"), call="ping", deadline_s=0.25)
    first, second = outcomes([ended("x"), under_way("rollout/0")], lambda: ping)
    assert first == "x"
    assert str(second).startswith("rollout/0 failed in ping: no answer within 0.25 s")


@pytest.mark.graph
def test_of_several_calls_one_that_ends_is_waited_for_and_else_all_fail_at_the_deadline(alone):
    assert await_first([under_way("rollout/0"), ended("x")]) == []
    late = [replace(under_way(f"rollout/{i}"), deadline_s=0.1) for i in (0, 1)]
    assert [error.worker for error in await_first(late)] == ["rollout/0", "rollout/1"]


@pytest.mark.graph
def test_the_waits_for_new_workers_end_with_what_their_watch_raises(alone):
    """These are the waits of a fleet that has no serving engine, and for a worker that is
    rebuilt.
    """
    group = SimpleNamespace(
        size=1,
        replace=lambda error: 0,
        members=lambda index: range(1),
        submit=lambda index, method, deadline_s: under_way("scorer/0"),
    )
    engines = EngineFleet(group, settings().deadlines, None, lambda engine: None)
    engines.lose(WorkerDied("rollout/0", "generate", "killed", 0))
    with pytest.raises(Preempted):
        engines.admit(stopped().check)
    assert list(engines.joining) == [0], "it can still join"
    with pytest.raises(Preempted):
        ActorGroup.rebuild(group, WorkerDied("scorer/0", "score", "killed", 0), 60, stopped().check)


def one_is_silent() -> tuple[list[PendingChunk], Fleet]:
    """Two chunks, of which one is done, and a fleet with a silent worker. When this worker is
    replaced, the other chunk is done too.
    """
    waited = sampled([ended("x"), under_way("rollout/0")])

    def arrive(error: WorkerError) -> None:
        waited[1].chunk = replace(waited[1].chunk, header=ended("y"))

    return waited, Fleet(silent=replace(under_way("rollout/1"), call="ping"), then=arrive)


@pytest.mark.graph
def test_sampling_replaces_a_silent_worker_and_continues_to_wait(alone):
    waited, fleet = one_is_silent()
    assert Sampling(settings(), fleet, Preemption()).headers(waited) == ["x", "y"]
    assert fleet.lost == ["rollout/1"]


@pytest.mark.graph
def test_a_stop_signal_ends_the_wait_for_a_batch_and_not_that_of_an_evaluation(alone):
    """The step before an evaluation has been learned, but its row is not written yet."""
    waited, fleet = one_is_silent()
    with pytest.raises(Preempted):
        Sampling(settings(), fleet, stopped()).headers(waited)
    evaluator = Evaluator(settings(), fleet, Coefficients(settings()), [])
    assert evaluator.sampling.headers(waited) == ["x", "y"]


@pytest.mark.graph
def test_of_more_chunks_than_needed_those_of_a_dead_engine_do_not_count_as_done(alone):
    """The first chunk is sampled again; only the second one is done, and the others are stopped."""
    waited, fleet = sampled([died("rollout/1"), ended("x"), under_way("rollout/0")]), Fleet()
    ray.wait([waited[0].chunk.header.ref], timeout=60)
    for d in waited:
        d.writer = fleet
    done, late = Sampling(settings(), fleet, Preemption()).first(waited, 1)
    assert done == waited[1:2] and late == [waited[0], waited[2]]
    assert fleet.lost == ["rollout/1"] and fleet.cancelled == [
        waited[0].chunk.prompts[0].uid,
        waited[2].chunk.prompts[0].uid,
    ]


def header(oldest: list[int], source: Source = Source.student) -> ChunkHeader:
    n = len(oldest)
    return ChunkHeader(
        uids=tuple(f"p{i}" for i in range(n // 2)),
        source=source,
        group_size=2,
        num_tokens=np.full(n, 4),
        response_lengths=np.full(n, 2),
        truncated=np.zeros(n, bool),
        aborted=np.zeros(n, bool),
        oldest_version=np.array(oldest),
        newest_version=np.array(oldest),
        mean_policy_version=0.0,
        nbytes=0,
        finish_s=np.zeros(n, np.float32),
    )


def rewards(n: int) -> Rewards:
    ones = np.ones(n, np.float32)
    return Rewards(
        uids=(),
        values=ones,
        part_names=(),
        parts=ones[None],
        errors=ones < 0,
        keep=ones > 0,
        compressed=ones,
        repeated=ones,
    )


def test_groups_with_a_token_that_is_too_old_are_left_out_and_come_again():
    """At step 5 with max_staleness=1, version 3 is too old, and one sequence of the second group
    has this version.
    """
    sampling = Sampling.__new__(Sampling)
    sampling.settings = settings(
        "pipeline.ahead=3", "pipeline.max_staleness=1", "pipeline.on_stale=drop"
    )
    mixed, fresh = header([4, 5, 5, 3]), header([4, NO_VERSION])
    assert sampling._used(mixed, rewards(4), 5) == (0,) and sampling._used(
        fresh, rewards(2), 5
    ) == (0,)
    assert sampling._used(header([3, 3], Source.data), rewards(2), 5) == (0,), "data has no version"
    (one,) = drawn(PROMPTS[:1], "train-5")
    chunk = replace(one.chunk, prompts=tuple(PROMPTS[:2]))
    arrived = [
        Arrived(drawn=replace(one, chunk=chunk), header=mixed, rewards=rewards(4), groups=(0,))
    ]
    assert [p.uid for p in sampling.stale_prompts(arrived, 5)] == ["p1"]
    assert [a.groups for a in first_groups(arrived, 2)] == [(0,)]


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        ([], 2),  # every group whose rewards are kept
        (["algorithm=dpo", "algorithm.data_fraction=0"], 1),  # groups with different rewards
    ],
)
def test_the_loss_is_averaged_over_pairs_where_pairs_are_ranked_and_over_groups_elsewhere(
    overrides: list[str], count: int
):
    judged = replace(rewards(4), values=np.array([0.0, 1.0, 1.0, 1.0], np.float32))
    arrived = [Arrived(drawn=None, header=header([5] * 4), rewards=judged, groups=(0, 1))]
    sampling = Sampling(settings(*overrides), None, Preemption())
    assert sampling.num_pairs(arrived) == count
