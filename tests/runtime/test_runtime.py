"""Placement rules, the connection to Ray, and the errors of a worker."""

import ast
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import ray
from omegaconf import OmegaConf

from hybridrl.cli import main
from hybridrl.controller.evaluation import evaluate
from hybridrl.core.errors import (
    ConfigError,
    DataError,
    FleetExhausted,
    HybridRLError,
    PlacementError,
    WeightSyncError,
    WorkerDied,
    WorkerError,
    WorkerTimeout,
)
from hybridrl.core.failpoints import VARIABLE
from hybridrl.runtime import calls
from hybridrl.runtime.actor_group import ActorGroup, Slot, ask_for_stacks
from hybridrl.runtime.cluster import Cluster, Team, device_of, gpu_share
from hybridrl.runtime.fleet import Fleet
from hybridrl.runtime.host import visible_gpus
from hybridrl.runtime.prometheus_sink import PrometheusSink
from hybridrl.runtime.ray_connection import Node, check_connected, starts_ray
from hybridrl.runtime.reward_group import RewardGroup
from hybridrl.runtime.rollout_group import RolloutGroup, closed_by
from hybridrl.runtime.start_up import StartUp
from hybridrl.runtime.worker_env import worker_env
from hybridrl.settings.algorithm import AlgorithmConfig
from hybridrl.settings.choices import Device, WeightTransfer
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import ClusterConfig, RunSettings
from hybridrl.settings.shares import shares
from hybridrl.types import Prompt, RunInfo

BASE = ["run.dir=here", "experiment=quickstart"]
JUDGE = "{function:reward_model,options:{path:rm}}"
SHARED = "cluster.colocate=true rollout.gpu_memory_utilization=0.4"

# -- placement rules -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            "rollout.weight_transfer=nccl cluster.device=cpu",
            "rollout.weight_transfer=nccl: needs GPUs, cluster.device is cpu",
        ),
        (
            "rollout.weight_transfer=ipc",
            "rollout.weight_transfer=ipc: learner and engine must use the same GPU; set "
            "cluster.colocate=true",
        ),
        (
            f"rollout.weight_transfer=ipc rollout.tensor_parallel=2 {SHARED}",
            "rollout.weight_transfer=ipc: hands over memory of one GPU",
        ),
        (
            f"rollout.weight_transfer=nccl {SHARED}",
            "rollout.weight_transfer=nccl: NCCL refuses two ranks on one GPU",
        ),
        (
            "rollout.weight_transfer=nccl lora.rank=4 lora.sync=adapter",
            "rollout.weight_transfer=nccl: carries whole weights, and lora.sync=adapter sends",
        ),
        (
            f"rollout.tensor_parallel=2 {SHARED}",
            "rollout.tensor_parallel=2: under cluster.colocate=true",
        ),
        (f"rollout.engines=2 {SHARED}", "rollout.engines=2: under cluster.colocate=true"),
        (
            f"rollout.engines=2 rollout.weight_transfer=ipc {SHARED}",
            "rollout.engines=2: under cluster.colocate=true",
        ),
        (
            "cluster.colocate=true",
            "rollout.gpu_memory_utilization=0.9: under cluster.colocate=true",
        ),
        (
            "cluster.colocate=true rollout.gpu_memory_utilization=0.51",
            "rollout.gpu_memory_utilization=0.51: under cluster.colocate=true",
        ),
        (
            "cluster.take_turns=true",
            "cluster.take_turns=true: needs GPUs that engines and learner share; set",
        ),
        (
            "cluster.take_turns=true cluster.colocate=true schedule=pipelined",
            "cluster.take_turns=true: engines sleep while the learner works, and pipeline.ahead=2",
        ),
        (
            "cluster.take_turns=true cluster.colocate=true rollout.oversample=0.5 "
            "rollout.groups_per_chunk=1",
            "cluster.take_turns=true: an engine sleeps when it has no request left, and",
        ),
        ("scorer.replicas=2", "scorer.replicas=2: a step has 1 chunks"),
        (
            "reward.workers=5 rollout.engines=2 rollout.groups_per_chunk=24",
            "reward.workers=5: a step has 4 chunks",
        ),
        ("reward.gpus=2", "reward.gpus=2: a reward model computes on one GPU; set it to 0 or 1"),
        (
            "reward.gpus=1",
            "reward.gpus=1: only a reward_model uses a GPU, and no reward",
        ),
        (
            f"reward.gpus=1 +reward.functions.rm={JUDGE} {SHARED}",
            "reward.gpus=1: under cluster.colocate=true a reward worker would fill a GPU",
        ),
        ("rollout.kv_cache_bytes=0", "rollout.kv_cache_bytes=0: must be positive, or null"),
    ],
)
def test_a_placement_that_cannot_work_is_refused_in_one_sentence(overrides: str, sentence: str):
    with pytest.raises(ConfigError) as caught:
        load_config([*BASE, *overrides.split()])
    message = str(caught.value)
    assert message.startswith(sentence)
    assert "; " in message or "null" in message, "there is a remedy"
    assert "\n" not in message and len(message) < 240


@pytest.mark.parametrize(
    "overrides",
    [
        SHARED,
        f"rollout.weight_transfer=ipc {SHARED}",
        f"rollout.engines=2 learner.ranks=2 {SHARED}",
        f"rollout.engines=2 rollout.weight_transfer=object_store {SHARED}",
        f"rollout.engines=2 lora.rank=4 lora.sync=adapter {SHARED}",
        "cluster.colocate=true rollout.gpu_memory_utilization=0.5",
        "cluster.colocate=true cluster.device=cpu",
        "cluster.colocate=true cluster.take_turns=true rollout.gpu_memory_utilization=0.9",
        "rollout.weight_transfer=nccl rollout.tensor_parallel=2",
        "scorer.replicas=4 reward.workers=4 rollout.engines=2 rollout.groups_per_chunk=24",
    ],
)
def test_a_placement_that_works_is_accepted(overrides: str):
    taken = OmegaConf.structured(load_config([*BASE, *overrides.split()]))
    for key, value in (override.split("=") for override in overrides.split()):
        assert str(OmegaConf.select(taken, key)).lower().endswith(value)


def test_every_prompt_is_answered_once_whatever_shares_the_teacher_and_the_data_have():
    halves = AlgorithmConfig(data_fraction=0.5, teacher_fraction=0.5)
    assert [shares(1, halves, step) for step in range(4)] == [
        (0, 0, 1),
        (0, 1, 0),
        (0, 0, 1),
        (0, 1, 0),
    ]
    assert [shares(4, halves, step) for step in range(3)] == [(0, 2, 2)] * 3


@pytest.mark.parametrize("data", [0.0, 0.1, 0.29, 0.4, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("teacher", [0.0, 0.05, 0.1, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("prompts", [1, 2, 3, 4, 7, 100])
def test_a_share_too_small_for_a_prompt_of_each_step_gets_one_every_few_steps(
    prompts: int, teacher: float, data: float
):
    if teacher + data > 1:
        teacher = 1 - data
    algorithm = AlgorithmConfig(data_fraction=data, teacher_fraction=teacher)
    total = np.zeros(3)
    for step in range(300):
        drawn = shares(prompts, algorithm, step)
        assert sum(drawn) == prompts and min(drawn) >= 0
        total += drawn
        due = np.array([1 - data - teacher, teacher, data]) * prompts * (step + 1)
        assert abs(total - due).max() <= 1 + 1e-9


def test_a_tenth_of_four_prompts_is_one_prompt_in_two_or_three_steps():
    # 0.4, 0.8, 1.2, ... prompts after each step are rounded to 0, 1, 1, 2, 2, 2, 3, 3, 4, 4.
    tenth = AlgorithmConfig(teacher_fraction=0.1)
    assert [shares(4, tenth, step)[1] for step in range(10)] == [0, 1, 0, 1, 0, 0, 1, 0, 1, 0]
    assert shares(96, AlgorithmConfig(teacher_fraction=0.25), 7) == (72, 24, 0)


@pytest.mark.parametrize("teams", range(1, 40))
def test_the_shares_of_a_gpu_fit_into_it_in_the_unit_that_ray_rounds_to(teams: int):
    """Ray rounds shares to 1/10000 of a GPU."""
    assert (
        teams * round(gpu_share(teams) * 10_000)
        <= 10_000
        < (teams + 1) * round(gpu_share(teams) * 10_000) + 10_000 / teams
    )


# -- the connection --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "gpus", "cuda_build", "device"),
    [
        (Device.auto, 8, "13.0", "cuda"),
        (Device.auto, 8, None, "cpu"),  # torch's CPU build on a machine with GPUs
        (Device.auto, 0, "13.0", "cpu"),
        (Device.cpu, 8, "13.0", "cpu"),
        (Device.cuda, 8, "13.0", "cuda"),
    ],
)
def test_the_device_is_cuda_only_where_cluster_and_torch_both_have_it(
    wanted: Device, gpus: int, cuda_build: str | None, device: str
):
    assert device_of(wanted, gpus, cuda_build) == device


@pytest.mark.parametrize(
    ("gpus", "cuda_build", "reason"),
    [(0, "13.0", "the Ray cluster has no GPU"), (8, None, "a build for CPUs")],
)
def test_cuda_is_refused_without_a_gpu_or_with_a_torch_for_cpus(
    gpus: int, cuda_build: str | None, reason: str
):
    with pytest.raises(ConfigError, match=reason):
        device_of(Device.cuda, gpus, cuda_build)


def test_an_address_without_a_ray_cluster_ends_at_once_in_one_sentence():
    with socket.socket() as closed:
        # The socket is bound but not listening: no other process can take the port, and connections
        # to it are refused.
        closed.bind(("127.0.0.1", 0))
        for address in (f"127.0.0.1:{closed.getsockname()[1]}", "nonsense"):
            sentence = rf"cluster\.address={address}: no Ray cluster there \(.+\); give .*RAY_AUTH_"
            with pytest.raises(PlacementError, match=sentence) as caught:
                Cluster(load_config([*BASE, f"cluster.address={address}"])).__enter__()
            assert "\n" not in str(caught.value) and not ray.is_initialized()


def test_a_ray_that_is_late_to_start_is_an_error_in_one_sentence(monkeypatch: pytest.MonkeyPatch):
    """Ray raises a bare Exception in this case, which happens on an overloaded machine."""

    def late(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(PlacementError, match=r"^Ray could not be started on this machine: The "):
        Cluster(load_config(BASE)).__enter__()


@pytest.mark.parametrize(
    ("address", "same"),
    [
        ("127.0.0.1:6379", True),
        ("localhost:6379", True),
        (None, True),
        ("auto", True),
        ("127.0.0.1:6380", False),
        ("10.0.0.1:6379", False),
    ],
)
def test_a_process_that_is_connected_to_another_ray_is_refused(
    monkeypatch: pytest.MonkeyPatch, address: str | None, same: bool
):
    context = SimpleNamespace(gcs_address="127.0.0.1:6379")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    expected = (
        nullcontext()
        if same
        else pytest.raises(PlacementError, match=rf"^cluster\.address={address}: this process is")
    )
    with expected:
        check_connected(address)


@pytest.mark.parametrize(
    ("device", "dtype", "mapped", "precision"),
    [
        ("cpu", "float32", "0", None),
        ("cuda", "float32", None, "ieee"),
        ("cuda", "bfloat16", None, None),
    ],
)
def test_a_worker_keeps_freed_memory_on_the_cpu_and_multiplies_float32_exactly_on_a_gpu(
    device: str, dtype: str, mapped: str | None, precision: str | None
):
    env = worker_env(1, device, dtype, take_turns=True)
    assert (env.get("MALLOC_MMAP_MAX_"), env.get("TRITON_F32_DEFAULT")) == (mapped, precision)


@pytest.mark.parametrize(
    ("address", "variable", "connected", "starts"),
    [
        (None, None, False, True),
        (None, "local", False, True),
        ("head:6379", None, False, False),
        (None, "head:6379", False, False),
        (None, None, True, False),
    ],
)
def test_a_run_starts_a_ray_where_no_address_names_one_and_the_process_has_none(
    address: str | None,
    variable: str | None,
    connected: bool,
    starts: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    monkeypatch.setattr("ray.is_initialized", lambda: connected)
    assert starts_ray(ClusterConfig(address=address)) is starts


def test_a_fault_that_the_environment_asks_for_is_met_by_the_workers_too(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert VARIABLE not in worker_env(1, "cpu", "float32", take_turns=True)
    monkeypatch.setenv(VARIABLE, "learner.step:do=kill")
    assert worker_env(1, "cpu", "float32", take_turns=True)[VARIABLE] == "learner.step:do=kill"


NVIDIA_SMI = """#!/bin/sh
echo "GPU-1f00-aa, 0"
echo "GPU-2e11-bb, 1"
echo "GPU-2e22-cc, 2"
"""


@pytest.mark.parametrize(
    ("given", "visible"),
    [
        ([3], {"CUDA_VISIBLE_DEVICES": "3"}),
        ([2, 5], {"CUDA_VISIBLE_DEVICES": "2,5"}),
        (
            ["GPU-2e22-cc", "GPU-1f00-aa"],
            {"CUDA_VISIBLE_DEVICES": "2,0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
        ),
        (["GPU-2e11"], {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}),
    ],
)
def test_a_worker_sees_the_gpus_that_ray_gave_it_by_their_numbers(
    given: list, visible: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert visible_gpus(given) == visible


@pytest.mark.parametrize("given", ["MIG-1f00-aa", "GPU-2e", "GPU-9"])
def test_a_slice_of_a_gpu_or_a_gpu_of_another_node_is_refused_in_one_sentence(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(
        PlacementError, match=f"{given}: does not name one GPU of this node, which has GPU-1f00"
    ):
        visible_gpus([given])


def test_gpus_that_nvidia_smi_cannot_number_are_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PlacementError, match="start Ray with the GPUs' numbers"):
        visible_gpus(["GPU-1f00-aa"])


class FakeConnection:
    """A stand-in for Ray with room for `room` workers on one node. `events` records the calls."""

    def __init__(
        self,
        node: Node | None = None,
        *,
        room: int = 9,
        at_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.node = node
        self.room = room
        self.at_close = at_close
        self.events: list[str] = []

    def open(self, settings: RunSettings) -> None:
        self.events.append("opened")

    def close(self) -> None:
        self.at_close()
        self.events.append("closed")

    def resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def free_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def reserve(
        self, bundles: Sequence[dict[str, float]], *, spread: bool, limit_s: float
    ) -> int | None:
        if len(bundles) > self.room:
            return None
        self.events.append(f"reserved {len(bundles)}")
        return len(bundles)

    def release(self, group: int) -> None:
        self.events.append("released")

    def nodes(self, group: int) -> dict[int, Node]:
        return dict.fromkeys(range(group), self.node)


@pytest.mark.parametrize(
    ("overrides", "device", "size", "threads", "spins"),
    [
        ("", "cpu", 1, "2", "10000"),
        ("", "cpu", 2, "1", "10000"),
        ("", "cuda", 1, "2", "0"),
        ("cluster.threads_per_worker=2", "cpu", 2, "2", "0"),
        ("schedule=pipelined", "cpu", 1, "2", "0"),
    ],
)
def test_threads_spin_only_where_no_other_worker_needs_the_core(
    overrides: str, device: str, size: int, threads: str, spins: str
):
    connection = FakeConnection(Node(id="n", address="127.0.0.1", cpus=2))
    with Cluster(load_config([*BASE, *overrides.split()]), connection) as cluster:
        cluster.device = device
        for slot in cluster.place([Team(name="w", size=size, gpus=0, heavy=True)])["w"]:
            assert (slot.env["OMP_NUM_THREADS"], slot.env["GOMP_SPINCOUNT"]) == (threads, spins)
    assert connection.events == ["opened", f"reserved {size}", "released", "closed"]


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_cut_short_the_end_of_ray(second: signal.Signals):
    def leave(signum: int, frame: object) -> None:
        raise SystemExit(signum)  # as Ray's own handler of SIGTERM does

    connection = FakeConnection(at_close=lambda: signal.raise_signal(second))
    before = signal.signal(second, leave)
    try:
        with pytest.raises(KeyboardInterrupt), Cluster(load_config(BASE), connection):
            raise KeyboardInterrupt
        assert connection.events == ["opened", "closed"]
        assert signal.getsignal(second) is leave
    finally:
        signal.signal(second, before)


def test_a_refused_device_closes_the_connection():
    connection = FakeConnection()
    cluster = Cluster(load_config([*BASE, "cluster.device=cuda"]), connection)
    with pytest.raises(ConfigError, match="the Ray cluster has no GPU"):
        cluster.__enter__()
    assert connection.events == ["opened", "closed"]


def test_the_error_of_a_cluster_without_room_for_the_workers_lists_demand_and_supply():
    connection = FakeConnection(room=2)
    with (
        Cluster(load_config([*BASE, "cluster.device=cpu"]), connection) as cluster,
        pytest.raises(
            PlacementError, match=r"could not place 3 workers.*'CPU': 0\.03.*supply \{'CPU': 2\.0"
        ),
    ):
        cluster.place([Team(name="w", size=3, gpus=0, heavy=False)])
    assert connection.events[-1] == "closed" and "released" not in connection.events


# -- errors of a worker ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slot() -> Iterator[Slot]:
    """A slot on a Ray that this process starts, whose gauges are collected twice a second."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_metrics_report_interval_ms", "500")  # by default 10 s
        with Cluster(load_config([*BASE, "cluster.device=cpu"])) as cluster:
            [slot] = cluster.place([Team(name="w", size=1, gpus=0, heavy=False)])["w"]
            env = {**slot.env, "PYTHONPATH": str(Path(__file__).parents[2])}
            yield replace(slot, env=env)
    assert not ray.is_initialized(), "its end has ended Ray"


@pytest.mark.graph
@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (DataError("row 3: no prompt"), DataError, "row 3: no prompt"),
        (
            OSError(28, "No space left"),
            WorkerError,
            "w/0 failed in its constructor: OSError: [Errno 28] No space left; see logs/w-0.log",
        ),
    ],
)
def test_what_a_constructor_raises_reaches_the_first_call(
    slot: Slot, tmp_path: Path, concurrent: bool, error: Exception, kind: type, text: str
):
    path = f"tests.support.failing_worker:{'AsyncFailing' if concurrent else 'Failing'}"
    group = ActorGroup(
        "w", path, [slot], [{"error": error}], log_dir=str(tmp_path), concurrent=concurrent
    )
    for _ in range(2):
        with pytest.raises(HybridRLError) as caught:
            group.call_all("ping", deadline_s=60)
        assert type(caught.value) is kind and str(caught.value) == text
    assert "Traceback" in (tmp_path / "w-0.log").read_text()
    group.close()


@pytest.mark.graph
def test_the_error_of_a_worker_that_died_names_the_worker_rays_reason_and_the_log(
    slot: Slot, tmp_path: Path
):
    group = ActorGroup(
        "w", "tests.support.failing_worker:Failing", [slot], [{}], log_dir=str(tmp_path)
    )
    assert group.call_all("ping", deadline_s=60) == ["here"]
    with pytest.raises(WorkerDied, match=r"^w/0 failed in die: .*exit.*; see logs/w-0\.log$"):
        group.call_all("die", deadline_s=60)
    group.close()


@pytest.mark.graph
def test_all_workers_of_a_unit_are_replaced_when_one_of_them_dies_and_no_others(
    slot: Slot, tmp_path: Path
):
    """Each unit of two workers has a common address. Worker 3 dies, and workers 2 and 3 get a new
    one.
    """
    small = replace(slot, num_cpus=0.0)
    asked: list[range] = []

    def renewed(members: range) -> list[dict[str, object]]:
        asked.append(members)
        return [{"meeting": "c"} for _ in members]

    group = ActorGroup(
        "w",
        "tests.support.failing_worker:Named",
        [small] * 4,
        [{"meeting": name} for name in "aabb"],
        log_dir=str(tmp_path),
        max_restarts=1,
        unit=2,
        renewed=renewed,
    )
    before = group.pids()
    with pytest.raises(WorkerDied, match=r"^w/3 failed in die") as caught:
        group.submit(3, "die", deadline_s=60).result()
    group.rebuild(caught.value, 60)
    assert asked == [range(2, 4)]
    assert group.call_all("met_at", deadline_s=60) == ["a", "a", "c", "c"]
    assert [old == new for old, new in zip(before, group.pids(), strict=True)] == [
        True,
        True,
        False,
        False,
    ]
    assert group.replace(WorkerDied("w/2", "score", "killed", 0)) is None, "it is a new one already"
    with pytest.raises(FleetExhausted):
        group.replace(WorkerDied("w/2", "score", "killed", 1))
    group.close()


@pytest.mark.graph
def test_a_lost_value_is_no_fault_of_the_worker_that_was_to_receive_it(slot: Slot, tmp_path: Path):
    group = ActorGroup(
        "w", "tests.support.failing_worker:Failing", [slot], [{}], log_dir=str(tmp_path)
    )
    _, gone = group.submit_pair(0, "lose_value", deadline_s=60)
    with pytest.raises(
        WorkerDied,
        match=r"^the object store failed in keeping values: a value that w/0 .* in take was lost "
        r"with its node$",
    ):
        group.submit(0, "take", gone.ref, deadline_s=60).result()
    assert group.call_all("ping", deadline_s=60) == ["here"]
    rollout = engine(slot, tmp_path, "")
    with pytest.raises(WorkerDied, match=r"^the object store"):
        rollout.load_weights("version 1", gone.ref)
    assert rollout.group.epochs == [0]
    for made in (rollout, group):
        made.close()


class Answers:
    """An object store with its own clock, in which a result arrives every `seconds`, and `count`
    results in all. The result of a call is the call's name.
    """

    def __init__(self, seconds: float, count: int) -> None:
        self.seconds = seconds
        self.count = count
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def check(self) -> None: ...

    def wait(self, refs: Sequence[str], count: int, timeout_s: float) -> list[str]:
        self.now += self.seconds
        self.count -= 1
        return list(refs[:1]) if self.count >= 0 else []

    def fetch(self, pending: calls.Pending, timeout_s: float) -> str:
        return pending.ref


@pytest.mark.parametrize(
    ("answers", "expected", "failed"),
    [
        (Answers(9.0, count=3), ["a", "b", "c"], []),  # 27 s in all
        (Answers(11.0, count=0), None, ["reward/0 failed in score: no answer within 10 s"]),
        (Answers(6.0, count=1), None, ["reward/0 failed in score: no answer within 10 s"]),
    ],
)
def test_a_deadline_counts_from_the_last_answer_because_one_worker_may_have_many_calls(
    answers: Answers, expected: list[str] | None, failed: list[str]
):
    pending = [
        calls.Pending(ref=name, worker="reward/0", call="score", deadline_s=10.0) for name in "abc"
    ]
    results, failures = calls.settle(pending, store=answers, clock=answers.clock)
    assert [str(error).partition(";")[0] for error in failures] == failed
    assert expected is None or results == expected
    if failed:
        assert results[-1] is failures[0], "calls of a failed worker that are under way fail too"


@pytest.mark.parametrize(
    ("worker", "call", "remedy"),
    [
        ("reward/0", "score", "raise deadlines.reward_s"),
        ("scorer-main/0", "score", "raise deadlines.score_s"),
        ("rollout/0", "generate", "raise deadlines.rollout_s"),
        ("rollout/0", "ping", "raise deadlines.start_s or deadlines.heartbeat_s"),
        ("learner/0", "learn", "raise deadlines.learn_s"),
        ("rollout/0", "begin_job", "raise deadlines.start_s or deadlines.sync_s"),
        ("learner/0", "another", "raise the deadline of such calls"),
    ],
)
def test_a_call_without_an_answer_names_the_setting_of_its_deadline(
    worker: str, call: str, remedy: str
):
    late = calls.Pending(ref="a", worker=worker, call=call, deadline_s=10.0)
    answers = Answers(11.0, count=0)
    _, [error] = calls.settle([late], store=answers, clock=answers.clock)
    assert error.reason == f"no answer within 10 s; if it only needed longer, {remedy}"


def test_each_call_that_a_group_names_has_the_setting_of_its_deadline():
    named = set()
    for file in Path(calls.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and any(k.arg == "deadline_s" for k in node.keywords):
                named |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    names = {name for name in named if isinstance(name, str)}
    assert {"ping", "load_weights", "keep_start"} <= names
    known = {call for of_setting in calls.SETTINGS.values() for call in of_setting}
    assert names - known == {"ping", "score"}, "of these the worker decides"


class SlowAnswers(Answers):
    """An object store whose results arrive just before a wait would end. It counts the references
    that the waits examine.
    """

    examined = 0

    def wait(self, refs: Sequence[str], count: int, timeout_s: float) -> list[str]:
        self.examined += len(refs)
        return list(refs[:count])


def test_twice_the_calls_cost_twice_the_examined_references_and_not_four_times():
    """One wait for each result would examine 1024 * 1025 / 2 = 524800 references."""
    examined = []
    for number in (1024, 2048):
        answers = SlowAnswers(0.0, number)
        pending = [
            calls.Pending(ref=f"{i}", worker="reward/0", call="score", deadline_s=10.0)
            for i in range(number)
        ]
        results, failures = calls.settle(pending, store=answers, clock=answers.clock)
        assert results == [f"{i}" for i in range(number)] and not failures
        examined.append(answers.examined)
    assert examined[0] < 40 * 1024 and examined[1] < 2.2 * examined[0]


def test_a_wait_for_some_of_the_results_takes_no_more_than_these():
    answers = SlowAnswers(0.0, 1024)
    pending = [
        calls.Pending(ref=f"{i}", worker="reward/0", call="score", deadline_s=10.0)
        for i in range(1024)
    ]
    results, _ = calls.settle(pending, count=3, store=answers, clock=answers.clock)
    assert [result for result in results if result is not None] == ["0", "1", "2"]


def test_only_the_process_that_writes_the_log_gets_the_signal_for_its_stacks(tmp_path: Path):
    """The signal would end a process that has no handler for it, such as `cat`."""
    for log, status in (("w-0.log", -signal.SIGUSR1), ("other.log", 0)):
        with (
            (tmp_path / log).open("w") as out,
            subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out) as process,
        ):
            ask_for_stacks(process.pid, str(tmp_path / "w-0.log"))
            process.stdin.close()
            assert process.wait(60) == status


class Engines(RolloutGroup):
    worker = "tests.support.failing_worker:Engine"


class Judges(RewardGroup):
    worker = "tests.support.failing_worker:Judge"


def engine(
    slot: Slot,
    folder: Path,
    points: str,
    *,
    count: int = 1,
    backend: WeightTransfer = WeightTransfer.object_store,
) -> Engines:
    settings, place = (
        load_config([*BASE, "deadlines.sync_s=60"]),
        replace(slot, num_cpus=0, env={**slot.env, VARIABLE: points}),
    )
    return Engines(
        settings,
        [place] * count,
        model=settings.model,
        device="cpu",
        backend=backend,
        log_dir=str(folder),
    )


@pytest.mark.graph
def test_when_the_only_engine_dies_at_a_sync_another_serves_the_weights(slot: Slot, tmp_path: Path):
    rollout = engine(slot, tmp_path, f"engine.load_weights:do=kill:once={tmp_path / 'fired'}")
    rollout.load_weights("version 1", ray.put(b""))
    assert rollout.fleet.serving == {0} and rollout.group.epochs == [1]
    assert not rollout.fleet.joining
    rollout.close()


@pytest.mark.graph
def test_a_new_engine_that_fails_like_the_one_before_it_ends_the_run(slot: Slot, tmp_path: Path):
    rollout = engine(slot, tmp_path, "engine.generate:do=raise")
    with pytest.raises(
        FleetExhausted, match=r"^rollout/0 failed in generate: RuntimeError: failpoint"
    ):
        rollout.probe([], num_tokens=1, temperature=0.0)
    assert rollout.group.epochs == [1], (
        "one replacement was tried, cluster.max_restarts allows more"
    )
    rollout.close()


@pytest.mark.graph
def test_an_engine_that_has_answered_is_replaced_again_after_the_same_error(
    slot: Slot, tmp_path: Path
):
    group = engine(slot, tmp_path, "").group
    group.replace(WorkerError("rollout/0", "generate", "out of memory", 0))
    header, _ = group.submit_pair(0, "generate", None, None, deadline_s=60)
    assert calls.gather([header]) == ["header"]
    assert group.replace(WorkerError("rollout/0", "generate", "out of memory", 1)) == 0
    with pytest.raises(FleetExhausted, match="failed at once with the same error"):
        group.replace(WorkerError("rollout/0", "generate", "out of memory", 2))
    group.close()


@pytest.mark.graph
def test_each_worker_is_announced_once_when_it_is_up(slot: Slot, tmp_path: Path):
    group = ActorGroup(
        "w", "tests.support.failing_worker:Failing", [slot], [{}], log_dir=str(tmp_path)
    )
    lines: list[str] = []
    start_up = StartUp(lines.append)
    start_up.wait(group.submit_all("ping", deadline_s=60))
    start_up.watch()
    assert [line.partition(" after ")[0] for line in lines] == ["  w/0 is up"]
    group.close()


@pytest.mark.graph
def test_workers_that_do_not_start_in_time_write_their_stacks(slot: Slot, tmp_path: Path):
    group = ActorGroup(
        "w", "tests.support.failing_worker:Failing", [slot], [{}], log_dir=str(tmp_path)
    )
    group.call_all("ping", deadline_s=60)
    hanging = group.submit_all("hang", deadline_s=1)
    with pytest.raises(WorkerTimeout, match="w/0 failed in hang: no answer within 1 s"):
        StartUp(print).wait(hanging)
    # The signal that makes the worker write its stacks has ended the call.
    calls.gather([replace(call, deadline_s=60) for call in hanging])
    assert "most recent call first" in (tmp_path / "w-0.log").read_text()
    group.close()


@pytest.mark.graph
def test_weights_that_every_engine_refuses_are_the_fault_of_no_engine(slot: Slot, tmp_path: Path):
    rollout = engine(slot, tmp_path, "engine.load_weights:do=raise")
    with pytest.raises(
        WeightSyncError,
        match=r"^no engine loaded the weights: rollout/0 failed in load_weights: RuntimeError: "
        r"failpoint",
    ):
        rollout.load_weights("version 1", ray.put(b""))
    assert rollout.fleet.serving == {0} and rollout.group.epochs == [0]
    rollout.close()


@pytest.mark.graph
def test_a_ping_is_answered_however_many_chunks_wait_for_the_rest_of_their_wave(
    slot: Slot, tmp_path: Path
):
    group = ActorGroup(
        "w",
        "tests.support.failing_worker:Patient",
        [slot],
        [{}],
        log_dir=str(tmp_path),
        concurrent=True,
    )
    waiting = [group.submit(0, "wait", deadline_s=60) for _ in range(1200)]
    assert group.call_all("ping", deadline_s=60) == [0], "none of them has finished"
    assert group.call_all("go", deadline_s=60) == [None] and calls.gather(waiting) == [None] * 1200
    group.close()


@pytest.mark.graph
def test_an_engine_lost_in_an_evaluation_is_named_and_not_the_judge_that_waits_for_it(
    slot: Slot, tmp_path: Path
):
    rollout = engine(slot, tmp_path, "engine.generate:do=kill")
    rewards = Judges(rollout.settings, [replace(slot, num_cpus=0)], log_dir=str(tmp_path))
    prompts = [Prompt(uid="a", input_ids=(1,), text="", columns={})]
    with pytest.raises(WorkerDied, match=r"^rollout/0 failed in generate"):
        evaluate(
            rollout.settings.eval,
            rollout,
            rewards,
            prompts,
            wave="eval",
            step=0,
            temperature=1.0,
            seed=0,
        )
    rollout.close()
    rewards.group.close()


def test_an_engine_is_not_replaced_where_no_other_can_join():
    assert closed_by(load_config(BASE)) is None
    settings = load_config([*BASE, "cluster.colocate=true", "cluster.take_turns=true"])
    setting = closed_by(settings)
    fleet = Fleet(SimpleNamespace(size=2), settings.deadlines, setting, lambda engine: None)
    with pytest.raises(
        FleetExhausted,
        match=r"lost; with cluster\.take_turns=true a lost engine is not replaced, because the",
    ):
        fleet.lose(WorkerDied("rollout/0", "sleep", "lost", 0))


@pytest.mark.parametrize("chosen", [WeightTransfer.nccl, WeightTransfer.ipc])
def test_a_weight_transfer_between_gpus_is_refused_where_the_device_turns_out_to_be_cpu(
    chosen: WeightTransfer,
):
    colocate = SHARED.split() if chosen is WeightTransfer.ipc else []
    settings = load_config([*BASE, f"rollout.weight_transfer={chosen}", *colocate])
    with (
        Cluster(settings, FakeConnection()) as cluster,
        pytest.raises(
            ConfigError,
            match=rf"rollout\.weight_transfer={chosen}: needs GPUs, but cluster\.device=auto chose "
            r"cpu here",
        ),
    ):
        _ = cluster.weight_transfer


def test_a_config_error_ends_the_command_with_status_2(capsys: pytest.CaptureFixture):
    assert main(["train", *BASE, "scorer.replicas=2"]) == 2
    assert capsys.readouterr().err.startswith("hybridrl: scorer.replicas=2: ")


@pytest.mark.graph
def test_the_gauges_of_a_run_are_read_from_rays_port_as_prometheus_reads_them(slot: Slot):
    sink = PrometheusSink()
    sink.start(RunInfo(run_dir="/runs/a", name="a", total_steps=2, first_step=0, config={}))
    sink.log({"train/step": 1.0, "reward/mean": 0.25, "eval/accuracy": float("nan")})
    [node] = ray.nodes()
    port = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    end = time.monotonic() + 90
    found: dict[str, float] = {}
    while len(found) < 2 and time.monotonic() < end:
        with suppress(httpx.HTTPError):  # Ray's process for metrics is still starting
            lines = httpx.get(port, timeout=10).text.splitlines()
            found = {
                line.partition("{")[0]: float(line.rpartition(" ")[2])
                for line in lines
                if line.startswith("ray_hybridrl_") and 'run="a"' in line
            }
        time.sleep(0.2)
    assert found == {"ray_hybridrl_train_step": 1.0, "ray_hybridrl_reward_mean": 0.25}
