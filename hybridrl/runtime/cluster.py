"""Connection to Ray and placement: which worker runs on which node, with which devices and how many
threads.
"""

import logging
import math
import os
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from hybridrl.core import failpoints
from hybridrl.core.errors import ConfigError, PlacementError
from hybridrl.core.redact import worker_variables
from hybridrl.runtime.actor_group import Slot
from hybridrl.runtime.head_node import HEAD
from hybridrl.settings.choices import Device, WeightTransfer
from hybridrl.settings.run import RunSettings

CPU_SHARE = 0.01
"""Ray's CPUs are bookkeeping, not cores; workers on CPU share the cores, so they ask for next to
nothing.
"""

KEPT_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""glibc keeps freed memory; see worker_env."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """How many workers of one kind, and what each needs."""

    name: str
    size: int
    gpus: int  # per worker when the device is cuda
    heavy: bool  # computes with many threads


class Cluster:
    """A Ray connection with one placement group for the whole run. Use as a context manager.

    Raises:
        PlacementError: nothing answers at the cluster's address.
        ConfigError: cluster.device=cuda without GPUs.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self.group: PlacementGroup | None = None
        self.owns_ray = not ray.is_initialized()
        if self.owns_ray:
            connect(settings)
        try:
            self.device = device_of(
                settings.cluster.device, ray.cluster_resources().get("GPU", 0), torch.version.cuda
            )
        except ConfigError:
            self.__exit__()
            raise

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        with undisturbed():
            if self.group is not None and not HEAD.is_silent:
                remove_placement_group(self.group)
            if self.owns_ray:
                ray.shutdown()

    @property
    def weight_transfer(self) -> WeightTransfer:
        """The backend that rollout.weight_transfer=auto means here.

        Raises:
            ConfigError: a backend for GPUs was chosen and the device is the CPU.
        """
        chosen = self.settings.rollout.weight_transfer
        if chosen in (WeightTransfer.nccl, WeightTransfer.ipc) and self.device == "cpu":
            raise ConfigError(
                f"rollout.weight_transfer={chosen}: needs GPUs, and cluster.device=auto came out "
                "as cpu here; use object_store or auto"
            )
        if chosen is not WeightTransfer.auto:
            return chosen
        if self.device == "cpu":
            return WeightTransfer.object_store
        return WeightTransfer.ipc if self.settings.cluster.colocate else WeightTransfer.nccl

    def place(self, teams: list[Team]) -> dict[str, list[Slot]]:
        """Reserve everything at once.

        Raises:
            PlacementError: the cluster cannot hold it within deadlines.placement_s; lists demand
                and supply.
        """
        on_gpu = self.device == "cuda"
        colocated = on_gpu and self.settings.cluster.colocate
        share = gpu_share(sum(team.gpus > 0 for team in teams))
        gpus = {
            team.name: 0.0
            if not on_gpu
            else (share if colocated and team.gpus else float(team.gpus))
            for team in teams
        }
        if colocated:
            width = max(team.size for team in teams if team.gpus)
            bundles = [{"CPU": 1.0, "GPU": 1.0} for _ in range(width)]
            seats = [(team, i % width) for team in teams for i in range(team.size)]
        else:
            seats, bundles = [], []
            for team in teams:
                for _ in range(team.size):
                    seats.append((team, len(bundles)))
                    bundles.append(
                        {"CPU": CPU_SHARE} | ({"GPU": gpus[team.name]} if gpus[team.name] else {})
                    )
        self.group = self._reserve(bundles)
        nodes = bundle_nodes(self.group)
        crowd = Counter((team.name, nodes[bundle]["NodeID"]) for team, bundle in seats)
        slots: dict[str, list[Slot]] = {team.name: [] for team in teams}
        for team, bundle in seats:
            node = nodes[bundle]
            crowded = crowd[team.name, node["NodeID"]]
            threads = self._threads(team, node, crowded)
            take_turns = not self.settings.pipeline.ahead and threads * crowded <= cpus_of(node)
            slot = Slot(
                group=self.group,
                bundle=bundle,
                node_ip=node["NodeManagerAddress"],
                num_cpus=CPU_SHARE / 8 if colocated else CPU_SHARE,
                num_gpus=gpus[team.name],
                env=worker_env(
                    threads, self.device, self.settings.model.dtype, take_turns=take_turns
                ),
            )
            slots[team.name].append(slot)
        return slots

    def _reserve(self, bundles: list[dict[str, float]]) -> PlacementGroup:
        group = placement_group(
            bundles, strategy="SPREAD" if self.settings.cluster.spread else "PACK"
        )
        limit = self.settings.deadlines.placement_s
        if not group.wait(limit):
            remove_placement_group(group)
            demand = {kind: sum(b.get(kind, 0) for b in bundles) for kind in ("CPU", "GPU")}
            supply = {kind: ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU")}
            free = {kind: ray.available_resources().get(kind, 0) for kind in ("CPU", "GPU")}
            raise PlacementError(
                f"the cluster could not place {len(bundles)} workers within "
                f"deadlines.placement_s={limit:g}: demand {demand}, supply {supply}, free now "
                f"{free}; lower rollout.engines, learner.ranks or scorer.replicas, or add nodes"
            )
        return group

    def _threads(self, team: Team, node: dict, crowd: int) -> int:
        if not team.heavy:
            return 1
        return self.settings.cluster.threads_per_worker or max(1, cpus_of(node) // crowd)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No further Ctrl-C, SIGTERM or SIGHUP cuts the block short; a Ray whose end is broken off
    leaves processes for a minute.

    In a thread that gets no signals, do nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def connect(settings: RunSettings) -> None:
    """Start Ray here, or join the cluster at cluster.address or RAY_ADDRESS.

    Raises:
        PlacementError: there is no cluster at that address.
    """
    address = settings.cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    local = {"include_dashboard": False} if address == "local" else {}
    try:
        check_answers(address, settings.deadlines.placement_s)
        # calls that wait for a lost worker's result fail with it; they are made again, and nobody
        # asks for the old ones
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        with private_token() if address == "local" else nullcontext(), sighup_blocked():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
        raise PlacementError(
            f"cluster.address={address}: no Ray cluster there ({reason}); "
            "give the address that cluster/head.sh printed, or null to run here"
        ) from error


@contextmanager
def sighup_blocked() -> Iterator[None]:
    """Processes started meanwhile, and their children, do not get SIGHUP; this process gets it
    afterwards.

    A terminal that is closed sends it to all of them, and Ray's own would end before the driver has
    saved what was learned. Ray does the same with SIGINT.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def private_token() -> Iterator[None]:
    """Ray makes the token of a local cluster meanwhile, readable by every user of the machine;
    afterwards it is the owner's alone.
    """
    token = Path.home() / ".ray" / "auth_token"
    token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        yield
    finally:
        if token.is_file() and token.stat().st_uid == os.geteuid():
            token.chmod(0o600)


def check_answers(address: str, limit_s: float) -> None:
    """Raise OSError unless something listens at host:port; Ray itself would try for minutes and
    then end the process.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=limit_s).close()


def device_of(wanted: Device, gpus: float, cuda_build: str | None) -> str:
    """cpu or cuda. Ray counts GPUs through the driver, so they are there also for a torch without
    CUDA.

    Args:
        gpus: of the Ray cluster.
        cuda_build: torch.version.cuda; None: torch for CPUs.

    Raises:
        ConfigError: cuda is wanted and cannot be had.
    """
    if wanted is Device.cuda and not gpus:
        raise ConfigError(
            "cluster.device=cuda: the Ray cluster has no GPU; use cluster.device=cpu or start Ray "
            "with --num-gpus"
        )
    if wanted is Device.cuda and not cuda_build:
        raise ConfigError(
            "cluster.device=cuda: the installed torch is a build for CPUs; use cluster.device=cpu "
            "or install the gpu extra"
        )
    return "cuda" if wanted is not Device.cpu and gpus and cuda_build else "cpu"


def object_store_bytes() -> float:
    """Of all nodes together; infinite where Ray does not say."""
    return ray.cluster_resources().get("object_store_memory", math.inf)


def gpu_share(teams: int) -> float:
    """What each of `teams` workers asks of the GPU they share; rounded down to Ray's unit, so that
    all fit into 1.
    """
    return math.floor(10_000 / max(teams, 1)) / 10_000


def bundle_nodes(group: PlacementGroup) -> dict[int, dict]:
    """Ray's record of the node under each bundle."""
    by_id = {node["NodeID"]: node for node in ray.nodes()}
    return {
        int(bundle): by_id[node_id]
        for bundle, node_id in placement_group_table(group)["bundles_to_node_id"].items()
    }


def cpus_of(node: dict) -> int:
    return int(node["Resources"].get("CPU", 1))


def worker_env(threads: int, device: str, dtype: str, *, take_turns: bool) -> dict[str, str]:
    """Environment of a worker process: its share of the cores, no telemetry, no secret it does not
    need.

    Ray's dashboard shows it, so it holds no secret either. glibc gives a freed tensor of more than
    32 MiB back to the kernel and gets the next one as fresh pages, zeroed one by one: a quarter of
    a learner's step on CPU. The MALLOC variables make it keep them. A process that computes on a
    GPU frees its host memory: that of a model just loaded would be kept as long as the process
    lives.

    vLLM's attention for float32 on GPUs is a Triton kernel, whose products are TF32 unless Triton
    is told otherwise: too coarse for rollout.max_logprob_gap of float32.

    An engine decodes by thousands of small products a second. Threads that sleep between two of
    them take a third of its speed; those that wait in a loop take half of that of another worker on
    the same cores. So they loop, for half a millisecond at most, where workers compute one after
    another.

    Args:
        dtype: model.dtype.
        take_turns: the phases of a step do not overlap, and the workers of one phase have cores
            enough.
    """
    count, loops = str(threads), take_turns and device == "cpu"
    return worker_variables() | {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "GOMP_SPINCOUNT": "10000" if loops else "0",
        "KMP_BLOCKTIME": "1" if loops else "0",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TORCH_EXTENSIONS_DIR": os.environ.get(
            "TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions"
        ),
        # ninja lives beside python
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', '')}",
        "DS_ACCELERATOR": "cpu" if device == "cpu" else "cuda",
        **(KEPT_MEMORY if device == "cpu" else {}),
        **({"TRITON_F32_DEFAULT": "ieee"} if device == "cuda" and dtype == "float32" else {}),
        **(
            {failpoints.VARIABLE: os.environ[failpoints.VARIABLE]}
            if failpoints.VARIABLE in os.environ
            else {}
        ),
    }
