"""Steps and faults of the real graph: two Ray nodes, two vLLM engines, two DeepSpeed ranks, two
scorers and two reward workers.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import ray
import xxhash
from ray.cluster_utils import Cluster as RayNodes

from hybridrl.controller.controller import Controller
from hybridrl.controller.preemption import Preemption
from hybridrl.core.errors import (
    ConfigError,
    FleetExhausted,
    PlacementError,
    ServerError,
    SkippedStep,
    WeightSyncError,
    WorkerDied,
    WorkerTimeout,
)
from hybridrl.data.prompts import PromptSource
from hybridrl.launch.notices import naming_what_is_saved
from hybridrl.launch.preparation import prepare_prompts
from hybridrl.run_dir.checkpoint import Checkpointer
from hybridrl.run_dir.ledger import Ledger, check_ledger, drawn_uids, read_ledger
from hybridrl.runtime.calls import gather
from hybridrl.runtime.cluster import Cluster, Team
from hybridrl.runtime.learner_group import LearnerGroup
from hybridrl.runtime.residency import Phase, Residency
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.runtime.scorer_group import ScorerGroup
from hybridrl.runtime.workers import Slots, Workers, place_workers, start_workers
from hybridrl.settings.choices import Device, EvidenceKind, OnStale, Ratio, WeightTransfer
from hybridrl.settings.models import TeacherConfig
from hybridrl.settings.run import DeadlineConfig, RunSettings
from hybridrl.settings.servers import ServedConfig
from hybridrl.tracking.glossary import explain
from hybridrl.tracking.sink import Sinks
from hybridrl.types import LearnerStats, Prompt
from tests.support.batches import make_batch
from tests.support.graph import tiny_settings
from tests.support.scoring_server import scoring_server

pytestmark = pytest.mark.graph

PROMISED = {
    "train/step",
    "train/loss",
    "train/grad_norm",
    "grad/dense_norm",
    "grad/sparse_norm",
    "schedule/lambda",
    "kl/token",
    "reward/mean",
    "reward/error_rate",
    "rollout/length_mean",
    "rollout/truncated_frac",
    "policy/staleness_mean",
    "policy/rho_mean",
    "policy/ess",
    "policy/probe_gap",
    "perf/tokens_per_s",
    "time/step_s",
    "time/rollout_s",
    "time/score_s",
    "time/reward_s",
    "time/learn_s",
    "time/sync_s",
    "transfer/bytes_rollout",
    "transfer/bytes_scores",
    "transfer/bytes_weights",
    "controller/materialized_bytes",
}


@dataclass
class Graph:
    settings: RunSettings
    cluster: Cluster
    slots: Slots
    workers: Workers
    prompts: list[Prompt]
    heldout: list[Prompt]
    run_dir: Path

    def controller(self, settings: RunSettings, workers: Workers) -> Controller:
        made = Controller(
            settings,
            workers=workers,
            backend=WeightTransfer.object_store,
            prompts=PromptSource(self.prompts, settings.run.seed),
            heldout=self.heldout,
            inputs={},
            sinks=Sinks(required=[]),
            checkpointer=Checkpointer(self.run_dir, settings.checkpoint),
            ledger=Ledger(self.run_dir, 0),
            preemption=Preemption(),
        )
        made.publish_weights()
        return made


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    folder = tmp_path_factory.mktemp("graph")
    nodes = RayNodes(initialize_head=True, head_node_args={"num_cpus": 2})
    nodes.add_node(num_cpus=2)
    settings = tiny_settings(
        folder,
        "cluster.spread=true",
        "rollout.engines=2",
        "rollout.groups_per_chunk=2",
        "learner.ranks=2",
        "learner.zero_stage=2",
        "scorer.replicas=2",
        "reward.workers=2",
        "cluster.threads_per_worker=1",
        f"cluster.address={nodes.address}",
    )
    with Cluster(settings) as cluster:
        slots, log_dir = place_workers(settings, cluster), str(folder / "logs")
        workers = start_workers(settings, cluster, slots, log_dir)
        prompts, heldout = prepare_prompts(settings)
        yield Graph(settings, cluster, slots, workers, prompts, heldout, folder)
    nodes.shutdown()


@pytest.fixture(autouse=True)
def every_engine_serves(graph: Graph) -> None:
    """Replace the engines that an earlier test has lost, so that each test begins with all
    engines.
    """
    rollout = graph.workers.rollout
    rollout.group.restarts_left = graph.settings.cluster.max_restarts
    for index in {0, 1} - rollout.fleet.serving - rollout.fleet.joining.keys():
        epoch = rollout.group.epochs[index]
        rollout.lose(WorkerDied(f"rollout/{index}", "generate", "an earlier test", epoch))
    gather([*rollout.fleet.joining.values()])
    rollout.fleet.admit()


@contextmanager
def learning_by(graph: Graph, settings: RunSettings) -> Iterator[None]:
    """Give the shared learner these settings in the `with` block."""
    graph.workers.learner.configure(settings)
    try:
        yield
    finally:
        graph.workers.learner.configure(graph.settings)


@pytest.fixture
def controller(graph: Graph, tmp_path: Path) -> Controller:
    """The controller of a new run with the same workers."""
    return replace(graph, run_dir=tmp_path).controller(graph.settings, graph.workers)


def test_a_step_with_two_workers_of_each_kind_logs_every_promised_key_and_fetches_no_tokens(
    controller,
):
    row = controller.step()
    assert set(row) >= PROMISED and [key for key in row if explain(key) is None] == []
    assert row["train/step"] == 1 and all(np.isfinite(row[key]) for key in PROMISED)
    assert row["controller/materialized_bytes"] == 0
    assert all(row[f"engine/rollout/{key}"] >= 0 for key in ("kv_use", "running", "waiting"))
    assert row["memory/rollout/sync_bytes"] > 0 and row["memory/learner/sync_bytes"] > 0
    for workers, phase in (("rollout", "rollout"), ("scorer-main", "score"), ("learner", "learn")):
        assert row[f"memory/{workers}/{phase}_bytes"] > 0
        speed = f"perf/{workers}/tokens_per_s_"
        assert row[f"{speed}mean"] >= row[f"{speed}min"] > 0
    assert row["policy/staleness_mean"] == 0 and row["kl/token"] > 0 and row["grad/dense_norm"] > 0
    assert 0 < row["reward/mean"] < 1 and row["reward/equal_groups_frac"] < 1


def test_there_are_two_workers_of_each_kind_and_both_nodes_are_used(graph):
    nodes = graph.cluster.connection.nodes(graph.cluster.group)
    for name in ("learner", "rollout", "reward", "scorer-main"):
        assert len(graph.slots[name]) == 2
    assert len({nodes[slot.bundle].id for slots in graph.slots.values() for slot in slots}) == 2


def test_the_sampler_and_the_learner_agree_on_the_log_probs_after_every_sync(controller):
    for _ in range(2):
        row = controller.step()
        assert row["policy/logprob_gap"] < 1e-5, "nats, mean over all sampled tokens"
        assert abs(row["policy/rho_mean"] - 1) < 1e-5 and row["policy/ess"] > 0.9999


class Watched(Residency):
    """Makes workers take turns. When a phase is entered, `seen` gets the phase, the number of parts
    of each engine that are asleep, the engine's version, its unfinished requests, and the number of
    updates that the learner has made.
    """

    def __init__(self) -> None:
        super().__init__(takes_turns=True, phase=Phase.sample)
        self.seen: list[tuple[Phase, int, int, int, int]] = []

    def enter(self, phase: Phase, engines: Sequence[RolloutGroup], learner: LearnerGroup) -> None:
        super().enter(phase, engines, learner)
        state, other = engines[0].group.call_all("ping", deadline_s=60)
        assert state == other
        steps, _ = learner.group.call_all("ping", deadline_s=60)
        of_engine = (state["asleep"], state["version"], state["unfinished"])
        self.seen.append((phase, *of_engine, steps))


def test_in_turns_a_step_samples_awake_learns_with_sleeping_engines_and_wakes_them_for_weights(
    graph, tmp_path
):
    settings = replace(
        graph.settings, cluster=replace(graph.settings.cluster, colocate=True, take_turns=True)
    )
    watched = Watched()
    workers = replace(graph.workers, residency=watched)
    try:
        controller = replace(graph, run_dir=tmp_path).controller(settings, workers)
        row = controller.step()
        controller.save(row, last=True)
        controller.evaluate()
    finally:
        watched.enter(Phase.sample, workers.engines, workers.learner)
        workers.learner.acquire()  # because other tests take no turns
    before = watched.seen[0][-1]  # updates of other tests
    assert [(*seen[:-1], seen[-1] - before) for seen in watched.seen][1:-1] == [
        (Phase.sample, 0, 0, 0, 0),  # after the initial weights have arrived
        (Phase.sample, 0, 0, 0, 0),
        (Phase.learn, 2, 0, 0, 0),
        (Phase.sync, 1, 0, 0, 1),
        (Phase.sample, 0, 1, 0, 1),
        (Phase.learn, 2, 1, 0, 1),  # the checkpoint
        (Phase.sample, 0, 1, 0, 1),  # the evaluation
    ]
    assert row["time/turn_s"] > 0 and row["policy/probe_gap"] < 1e-5


def test_pipelined_steps_overlap_within_their_bound_and_lose_no_prompt(graph):
    """The tokens of the third step, two steps ahead, are requested while the engines serve version
    0, and sampled while versions 1 and 2 arrive.
    """
    pipelined = replace(graph.settings.pipeline, ahead=2, max_staleness=2)
    settings = replace(
        graph.settings, pipeline=pipelined, train=replace(graph.settings.train, steps=4)
    )
    controller = graph.controller(settings, graph.workers)
    rows, taken = [], []
    for _ in range(4):
        rows.append(controller.step())
        taken.append([p.uid for p in controller.pipeline.in_flight()])
        assert controller.state({}).parts["pipeline"]["prompts"]["owed"] == taken[-1]
    assert [len(uids) for uids in taken] == [0, 32, 16, 0], (
        "two waves of 16 are ahead once the size of one is known, and none after the fourth step"
    )
    assert (
        all(row["policy/staleness_max"] <= 2 for row in rows)
        and max(row["policy/staleness_max"] for row in rows) > 0
    )
    assert all(
        row["controller/materialized_bytes"] == 0 and row["rollout/late_frac"] == 0 for row in rows
    )
    assert controller.prompts.position == 64 and controller.prompts.returned == []


@pytest.mark.parametrize("policy", [OnStale.drop, OnStale.reweight])
def test_tokens_that_are_too_old_are_sampled_again_or_weighted_and_no_prompt_is_lost(
    graph, tmp_path, policy
):
    """Waves are drawn three versions ahead, but only a staleness of one version is allowed."""
    pipeline = replace(graph.settings.pipeline, ahead=3, max_staleness=1, on_stale=policy)
    algorithm = replace(
        graph.settings.algorithm, ratio=replace(graph.settings.algorithm.ratio, kind=Ratio.truncate)
    )
    settings = replace(
        graph.settings,
        pipeline=pipeline,
        algorithm=algorithm,
        train=replace(graph.settings.train, steps=6),
    )
    with learning_by(graph, settings):
        controller = replace(graph, run_dir=tmp_path).controller(settings, graph.workers)
        rows = [controller.step() for _ in range(6)]
    cursor = controller.pipeline.state_dict()["prompts"]
    check_ledger(tmp_path, 6, drawn_uids(graph.prompts, settings.run.seed, cursor))
    assert max(row["policy/staleness_max"] for row in rows) == 3
    late, off_policy = (
        [row[key] for row in rows] for key in ("rollout/late_frac", "policy/kl_sampler")
    )
    if policy is OnStale.drop:
        assert late == [0, 0, 0, 0.5, 0.5, 0.5] and max(off_policy[3:]) < 1e-9, (
            "the tokens that were learned from were sampled anew"
        )
    else:
        assert max(late) == 0 and max(off_policy) > 1e-6, "the old tokens were learned from"


def test_oversampling_trains_on_the_groups_that_are_done_first_and_returns_the_others(
    graph, monkeypatch
):
    rollout = replace(graph.settings.rollout, groups_per_chunk=1, oversample=0.25)
    controller = graph.controller(replace(graph.settings, rollout=rollout), graph.workers)
    monkeypatch.setattr(graph.workers.rollout, "settings", controller.settings)
    row = controller.step()
    assert row["rollout/late_frac"] == pytest.approx(4 / 20)
    assert len(controller.prompts.returned) == 4 and controller.prompts.position == 20
    returned = {p.uid for p in controller.prompts.returned}
    assert returned <= {p.uid for p in controller.prompts.next_batch(4)}


def test_an_engine_answers_pings_and_takes_new_weights_while_it_generates(graph, controller):
    rollout = graph.workers.rollout
    version = controller.publish_weights() and controller.weight_version
    manifest, packed = graph.workers.learner.pack_weights(version + 1)
    chunks = rollout.generate(
        graph.prompts[:32], wave="busy", group_size=32, temperature=1.0, seed=1
    )
    busy = [ping["unfinished"] for _ in range(5) for ping in gather(rollout.ready())]
    rollout.load_weights(manifest, packed)
    headers = gather([chunk.header for chunk in chunks])
    assert max(busy) > 0, "some ping was answered while requests were unfinished"
    spans = {(h.oldest_version.min(), h.newest_version.max()) for h in headers}
    assert (version, version + 1) in spans, "some chunk has tokens of both versions"
    assert all(version <= low <= high <= version + 1 for low, high in spans)


def test_an_abort_ends_a_wave_and_marks_what_it_cut(graph):
    rollout = graph.workers.rollout
    chunks = rollout.generate(
        graph.prompts[:32], wave="doomed", group_size=32, temperature=1.0, seed=2
    )
    aborted = sum(gather(rollout.abort()))
    headers = gather([chunk.header for chunk in chunks])
    cut = sum(int((h.response_lengths == 0).sum()) for h in headers)
    assert cut == aborted > 0 and sum(len(h.response_lengths) for h in headers) == 32 * 32


def test_the_same_seed_gives_the_same_tokens_and_log_probs_bit_by_bit(graph):
    def sample(wave: str, seed: int) -> list:
        chunks = graph.workers.rollout.generate(
            graph.prompts[:8], wave=wave, group_size=4, temperature=1.0, seed=seed
        )
        return [ray.get(chunk.batch.ref, timeout=60) for chunk in chunks]

    first, second, other = sample("one", 3), sample("two", 3), sample("three", 4)
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.input_ids, b.input_ids) and np.array_equal(
            a.rollout_logprobs, b.rollout_logprobs
        )
    assert any(
        not np.array_equal(a.input_ids, b.input_ids) for a, b in zip(first, other, strict=True)
    )


def test_an_engine_refuses_weights_whose_digest_is_not_what_was_sent(graph):
    manifest, packed = graph.workers.learner.pack_weights(99)
    with pytest.raises(WeightSyncError, match=r"version 99.*digest"):
        graph.workers.rollout.load_weights(replace(manifest, digest="0" * 32), packed)
    assert all(ping["version"] != 99 for ping in gather(graph.workers.rollout.ready()))
    graph.workers.rollout.load_weights(manifest, packed)
    assert all(ping["version"] == 99 for ping in gather(graph.workers.rollout.ready()))


def test_an_engine_refuses_weights_that_leave_a_parameter_out(graph):
    manifest, packed = graph.workers.learner.pack_weights(100)
    short = replace(
        manifest,
        **{key: getattr(manifest, key)[1:] for key in ("names", "dtypes", "shapes", "offsets")},
    )
    with pytest.raises(WeightSyncError, match="left untouched"):
        graph.workers.rollout.load_weights(short, packed)
    graph.workers.rollout.load_weights(manifest, packed)


def test_a_placement_that_cannot_be_met_lists_demand_and_supply(graph):
    settings = replace(graph.settings, deadlines=replace(graph.settings.deadlines, placement_s=1.0))
    with (
        Cluster(settings) as cluster,
        pytest.raises(PlacementError, match=r"could not place 1000 workers.*demand.*supply"),
    ):
        cluster.place([Team(name="rollout", size=1000, gpus=0, heavy=True)])


def test_gpus_that_the_cluster_lacks_are_refused_in_one_sentence(graph):
    settings = replace(graph.settings, cluster=replace(graph.settings.cluster, device=Device.cuda))
    with (
        pytest.raises(ConfigError, match=r"cluster\.device=cuda: the Ray cluster has no GPU"),
        Cluster(settings),
    ):
        pass


def test_a_stopped_scorer_ends_in_a_timeout_that_names_it(graph):
    group = graph.workers.scorers[0].group
    os.kill(pid := group.pids()[1], signal.SIGSTOP)
    try:
        with pytest.raises(
            WorkerTimeout, match=r"scorer-main/1 failed in ping: no answer within 1 s"
        ):
            group.call_all("ping", deadline_s=1.0)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert group.call_all("ping", deadline_s=60.0) == ["main", "main"]


def step_without_loss(controller: Controller) -> dict[str, float]:
    """Take a step during which a worker is lost, and check that it uses 16 prompts and loses
    none.
    """
    position = controller.prompts.position
    row = controller.step()
    assert (controller.prompts.position - position) % 64 == 16, "of 64 prompts an epoch"
    assert controller.prompts.returned == [] and row["policy/logprob_gap"] < 1e-5
    return row


def steps_on(controller: Controller) -> None:
    """Take a step during which a worker is lost, and check that it counts a restart."""
    restarts = controller.workers.restarts
    assert step_without_loss(controller)["cluster/restarts"] == restarts + 1


def test_a_killed_engine_is_replaced_while_the_other_answers_its_prompts(graph, controller):
    rollout = graph.workers.rollout
    os.kill(rollout.group.pids()[1], signal.SIGKILL)
    steps_on(controller)
    assert 0 in rollout.fleet.serving
    gather([*rollout.fleet.joining.values()])
    controller.step()
    assert rollout.fleet.serving == {0, 1}
    assert gather(rollout.ready())[1]["version"] == controller.weight_version


SHORT = DeadlineConfig(
    heartbeat_s=12.0,
    rollout_s=12.0,
    score_s=10.0,
    reward_s=10.0,
    learn_s=15.0,
    sync_s=15.0,
    save_s=15.0,
)


@pytest.fixture
def short_deadlines(graph: Graph) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for group in graph.workers.groups:
            reward = replace(group.settings.reward, timeout_s=4.0)
            short = replace(group.settings, deadlines=SHORT, reward=reward)
            patch.setattr(group, "settings", short)
        patch.setattr(graph.workers.rollout.fleet, "deadlines", SHORT)
        patch.setattr(graph.workers.rollout.fleet, "pings", {})  # these have longer deadlines
        yield


@pytest.mark.parametrize(
    ("kind", "silence"),
    [
        ("rollout/0", r"(ping|generate): no answer within 12 s"),
        ("reward/1", r"score: no answer within 10 s"),
    ],
    ids=["rollout/0", "reward/1"],
)
def test_a_worker_that_stops_is_replaced_at_its_deadline_and_the_others_write_their_stacks(
    graph, controller, short_deadlines, caplog, kind, silence
):
    name, index = kind.split("/")
    group = next(group.group for group in graph.workers.groups if group.group.name == name)
    log = graph.run_dir / "logs" / "learner-0.log"
    dumps = log.read_text().count("most recent call first")
    os.kill(group.pids()[int(index)], signal.SIGSTOP)
    steps_on(controller)
    (warning,) = [
        record.getMessage()
        for record in caplog.records
        if "starting another worker" in record.getMessage()
    ]
    assert re.match(rf"{kind} failed in {silence}", warning)
    wait_until(lambda: log.read_text().count("most recent call first") > dumps)


def test_an_engine_that_stops_while_weights_come_is_replaced_while_the_other_answers_its_prompts(
    graph, controller, short_deadlines
):
    log = graph.run_dir / "logs" / "learner-0.log"
    dumps, rollout = log.read_text().count("most recent call first"), graph.workers.rollout
    os.kill(rollout.group.pids()[0], signal.SIGSTOP)
    controller.publish_weights()
    assert rollout.fleet.serving == {1}
    wait_until(lambda: log.read_text().count("most recent call first") > dumps)
    [first_ping] = rollout.fleet.joining.values()
    step_without_loss(controller)
    [state] = gather([first_ping])
    assert state["version"] == -1, "it serves nothing before it has received the weights"
    row = controller.step()
    assert row["policy/staleness_mean"] == 0 and row["policy/logprob_gap"] < 1e-5
    assert (
        rollout.fleet.serving == {0, 1}
        and gather(rollout.ready())[0]["version"] == controller.weight_version
    )


def test_a_learner_rank_that_stops_is_reported_at_its_deadline(graph, controller, short_deadlines):
    """A run would then go back to its checkpoint, see tests/launch/test_faults.py. Here the rank
    continues, and its step is lost.
    """
    controller.probe.check()  # so that the update is the next call of the rank
    os.kill(pid := graph.workers.learner.group.pids()[1], signal.SIGSTOP)
    try:
        with pytest.raises(
            WorkerTimeout, match=r"learner/\d failed in learn: no answer within 15 s"
        ):
            controller.step()
    finally:
        os.kill(pid, signal.SIGCONT)
    gather(graph.workers.learner.ready())  # the rank has finished the lost step
    controller.pipeline.settle([])
    controller.publish_weights()


def wait_until(true: Callable[[], bool], limit_s: float = 30.0) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, "not within the limit"
        time.sleep(0.1)


def test_a_killed_scorer_is_replaced_and_scores_the_same_tokens(graph, controller):
    group, batch = graph.workers.scorers[0].group, make_batch([((4, 5), [(6, 7, 8), (9, 10)])])

    def scores() -> np.ndarray:
        return group.submit_pair(1, "score", batch, deadline_s=60.0)[1].result().logprobs

    before, pid = scores(), group.pids()[1]
    assert np.count_nonzero(before) == 3 + 2, "a log-prob for every response token"
    os.kill(pid, signal.SIGKILL)
    steps_on(controller)
    np.testing.assert_array_equal(scores(), before)
    assert group.pids()[1] != pid

    os.kill(pid := group.pids()[1], signal.SIGKILL)
    controller.save({}, last=True)  # asks every scorer for its state
    assert (
        group.pids()[1] != pid
        and controller.checkpointer.newest().state.step == controller.steps_done
    )


@contextmanager
def other_scorers(
    graph: Graph, settings: RunSettings, count: int, log_dir: Path
) -> Iterator[ScorerGroup]:
    """Start scorers with these settings, in addition to those of the graph."""
    slots = [replace(slot, num_cpus=0.0) for slot in graph.slots["scorer-main"][:count]]
    group = ScorerGroup(settings, slots, teacher="main", device="cpu", log_dir=str(log_dir))
    try:
        gather(group.ready())
        yield group
    finally:
        group.group.close()


def test_a_killed_rank_of_a_divided_teacher_is_replaced_with_its_replica_and_scores_are_the_same(
    graph, tmp_path
):
    divided = replace(graph.settings.teachers["main"], devices=2)
    settings = replace(graph.settings, teachers={"main": divided})
    batch = make_batch([((4, 5), [(6, 7, 8), (9, 10)])])
    with other_scorers(graph, settings, 2, tmp_path / "logs") as group:

        def scores() -> np.ndarray:
            _, sent = group.group.submit_pair(0, "score", batch, deadline_s=60.0)
            group.group.submit(1, "follow", batch, deadline_s=60.0).result()
            return sent.result().logprobs

        before, pids = scores(), group.group.pids()
        workers = replace(graph.workers, scorers=[group])
        controller = replace(graph, run_dir=tmp_path).controller(settings, workers)
        os.kill(pids[1], signal.SIGKILL)
        row = controller.step()
        assert row["policy/logprob_gap"] < 1e-5 and row["train/step"] == 1
        assert not set(pids) & set(group.group.pids()), "both ranks are other processes"
        np.testing.assert_array_equal(scores(), before)


def test_a_lost_server_is_followed_by_the_next_one_and_without_one_the_run_ends_at_its_checkpoint(
    graph, tmp_path
):
    with scoring_server() as first, scoring_server() as second:
        served = ServedConfig(fallbacks=[second.url], retry_s=0.0)
        teacher = TeacherConfig(url=first.url, evidence=EvidenceKind.drawn, served=served)
        settings = replace(graph.settings, teachers={"main": teacher})
        with (
            other_scorers(graph, settings, 1, tmp_path / "logs") as group,
            learning_by(graph, settings),
        ):
            workers = replace(graph.workers, scorers=[group])
            controller = replace(graph, run_dir=tmp_path).controller(settings, workers)
            controller.step()
            assert len(first.bodies) == 64, "16 prompts with 4 responses each"
            assert second.bodies == []
            first.script = [(500, "gone")] * 1000
            assert controller.step()["train/step"] == 2
            assert len(second.bodies) == 64
            controller.save({}, last=True)
            second.script = [(500, "gone")] * 1000
            sentence = rf"{second.url}.*; the same command goes on from step_000002$"
            ends = pytest.raises(ServerError, match=sentence)
            with ends, naming_what_is_saved(settings, tmp_path):
                controller.step()


def test_an_engine_with_other_weights_than_the_learner_is_named_before_anything_is_learned_from_it(
    graph, controller
):
    """The engine received the bytes that were sent, so its digest is right, but these are not the
    learner's weights.
    """
    learner, group = graph.workers.learner, graph.workers.rollout.group
    manifest, packed = learner.pack_weights(controller.weight_version)
    wrong = ray.get(packed).copy()
    wrong.view(np.float32)[:] *= 1.5
    sent = replace(manifest, digest=xxhash.xxh3_128_hexdigest(wrong))
    assert gather([group.submit(1, "load_weights", sent, wrong, deadline_s=60.0)]) == [sent.digest]
    controller.probe.start()
    before, steps = gather(learner.ready()), controller.steps_done
    with pytest.raises(
        WeightSyncError, match=r"rollout/1 and the learner differ by .* nats per token"
    ):
        controller.step()
    assert gather(learner.ready()) == before and controller.steps_done == steps
    controller.pipeline.settle([])
    controller.publish_weights()
    assert controller.probe.check() < 1e-5


class Disagreeing:
    """The learner of a graph, except that its statistics report `gap`, unless it is None."""

    def __init__(self, learner: LearnerGroup, gap: float | None = None) -> None:
        self.learner = learner
        self.device = learner.device
        self.gap = gap
        self.stats: list[LearnerStats] = []

    def learn(self, *arguments: object) -> LearnerStats:
        self.stats.append(self.learner.learn(*arguments))
        if self.gap is None:
            return self.stats[-1]
        return replace(self.stats[-1], logprob_gap=self.gap)


def test_a_step_whose_sampler_and_learner_differ_too_much_ends_the_run(graph, controller):
    controller.learner = Disagreeing(graph.workers.learner)
    row = controller.step()
    [stats] = controller.learner.stats
    assert stats.logprob_gap == row["policy/logprob_gap"] and stats.token_kl == row["kl/token"]
    assert stats.sparse_norm == row["grad/sparse_norm"]
    controller.learner = Disagreeing(graph.workers.learner, gap=9.0)
    with pytest.raises(
        WeightSyncError,
        match=r"^step 2: sampler and learner differ by 9 nats per token, rollout\.max_logprob_gap",
    ):
        controller.step()


class Skipping:
    """The learner of a graph, except that it skips its next `count` batches."""

    def __init__(self, learner: LearnerGroup, count: int) -> None:
        self.learner = learner
        self.device = learner.device
        self.remaining = count

    def learn(self, *arguments: object) -> LearnerStats:
        if self.remaining:
            self.remaining -= 1
            raise SkippedStep("on purpose")
        return self.learner.learn(*arguments)


def test_batches_that_are_left_out_are_passed_over_and_one_too_many_ends_the_run(graph, tmp_path):
    settings = replace(graph.settings, train=replace(graph.settings.train, max_skipped=2))
    controller = replace(graph, run_dir=tmp_path).controller(settings, graph.workers)
    controller.learner = Skipping(graph.workers.learner, 2)
    controller._step_or_skip()
    (line,) = read_ledger(tmp_path)
    assert (line["step"], len(line["passed_over"]), len(line["trained"])) == (1, 32, 16)
    controller.learner.remaining = 3
    with pytest.raises(SkippedStep, match="on purpose"):
        controller._step_or_skip()


def test_a_run_continues_without_an_engine_that_cannot_be_replaced_and_ends_without_the_last_one(
    graph, controller, caplog
):
    """Afterwards the graph has no engine; `every_engine_serves` starts new ones for the next
    test.
    """
    rollout = graph.workers.rollout
    rollout.group.restarts_left = 0
    os.kill(rollout.group.pids()[1], signal.SIGKILL)
    controller.step()
    assert (
        rollout.fleet.serving == {0}
        and "cluster.max_restarts is used up for rollout workers" in caplog.text
    )
    assert controller.step()["policy/probe_gap"] < 1e-5
    os.kill(rollout.group.pids()[0], signal.SIGKILL)
    with pytest.raises(
        FleetExhausted, match=r"rollout/0.*cluster.max_restarts is used up for rollout"
    ):
        controller.step()
