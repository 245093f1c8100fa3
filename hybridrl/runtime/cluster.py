"""Placement of workers: the node, the devices and the number of threads of each."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
from ray.util.placement_group import PlacementGroup

from hybridrl.core.errors import ConfigError, PlacementError
from hybridrl.core.trace import VARIABLE
from hybridrl.runtime.actor_group import Slot
from hybridrl.runtime.ray_connection import Connection, Node, RayConnection, undisturbed
from hybridrl.runtime.worker_env import worker_env
from hybridrl.settings.choices import Device, WeightTransfer
from hybridrl.settings.run import RunSettings

CPU_SHARE = 0.01
"""CPUs that a worker requests from Ray. Ray only counts them and reserves no cores: workers on CPU
share the cores.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """The number of workers of one kind, and the resources that each needs."""

    name: str
    size: int
    gpus: int  # per worker if the device is cuda
    heavy: bool  # whether a worker computes with many threads


class Seat(NamedTuple):
    """The bundle of resources that one worker of a team gets."""

    team: Team
    bundle: int


class Cluster:
    """A connection to Ray with one placement group for the whole run. Use as a context manager.

    Example:
        with Cluster(settings) as cluster:
            slots = cluster.place([Team(name="learner", size=2, gpus=1, heavy=True)])

    Args:
        connection: how Ray is reached; None: a RayConnection.
    """

    device: str
    """cpu or cuda; set inside the context."""

    def __init__(self, settings: RunSettings, connection: Connection | None = None) -> None:
        self.settings = settings
        self.connection = RayConnection() if connection is None else connection
        self.group: PlacementGroup | None = None

    def __enter__(self) -> "Cluster":
        """Raises:
        PlacementError: nothing answers at the cluster's address.
        ConfigError: cluster.device=cuda without GPUs.
        """
        self.connection.open(self.settings)
        try:
            self.device = device_of(
                self.settings.cluster.device,
                self.connection.resources().get("GPU", 0),
                torch.version.cuda,
            )
        except ConfigError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with undisturbed():
            if self.group is not None:
                self.connection.release(self.group)
            self.connection.close()

    @property
    def weight_transfer(self) -> WeightTransfer:
        """The backend of weight transfer, with rollout.weight_transfer=auto resolved.

        Raises:
            ConfigError: a backend for GPUs was chosen and the device is the CPU.
        """
        chosen = self.settings.rollout.weight_transfer
        if chosen in (WeightTransfer.nccl, WeightTransfer.ipc) and self.device == "cpu":
            raise ConfigError(
                f"rollout.weight_transfer={chosen}: needs GPUs, but cluster.device=auto chose cpu "
                "here; use object_store or auto"
            )
        return self.settings.weight_transfer(on_cpu=self.device == "cpu")

    def place(self, teams: list[Team]) -> dict[str, list[Slot]]:
        """Reserve places for all workers at once.

        Raises:
            PlacementError: the cluster cannot hold them within deadlines.placement_s; lists demand
                and supply.
        """
        colocated = self.device == "cuda" and self.settings.cluster.colocate
        gpus = self._gpus_per_worker(teams, colocated=colocated)
        bundles, seats = shared_bundles(teams) if colocated else own_bundles(teams, gpus)
        self.group = self._reserve(bundles)
        nodes = self.connection.nodes(self.group)
        crowd = Counter((seat.team.name, nodes[seat.bundle].id) for seat in seats)
        slots: dict[str, list[Slot]] = {team.name: [] for team in teams}
        for team, bundle in seats:
            node = nodes[bundle]
            slots[team.name].append(
                Slot(
                    group=self.group,
                    bundle=bundle,
                    node_id=node.id,
                    node_ip=node.address,
                    num_cpus=CPU_SHARE / 8 if colocated else CPU_SHARE,
                    num_gpus=gpus[team.name],
                    env=self._environment(team, node, crowd[team.name, node.id]),
                )
            )
        return slots

    def _gpus_per_worker(self, teams: list[Team], *, colocated: bool) -> dict[str, float]:
        """The number of GPUs, or the share of one GPU, of each worker, by the name of its team."""
        if self.device == "cpu":
            return {team.name: 0.0 for team in teams}
        if colocated:
            share = gpu_share(sum(team.gpus > 0 for team in teams))
            return {team.name: share if team.gpus else 0.0 for team in teams}
        return {team.name: float(team.gpus) for team in teams}

    def _environment(self, team: Team, node: Node, crowd: int) -> dict[str, str]:
        """The environment of a worker.

        Args:
            crowd: the number of workers of the team on the node.
        """
        threads = 1
        if team.heavy:
            chosen = self.settings.cluster.threads_per_worker
            threads = chosen or max(1, node.cpus // crowd)
        take_turns = not self.settings.pipeline.ahead and threads * crowd <= node.cpus
        environment = worker_env(
            threads, self.device, self.settings.model.dtype, take_turns=take_turns
        )
        return environment | ({VARIABLE: "1"} if self.settings.diagnostics.trace else {})

    def _reserve(self, bundles: list[dict[str, float]]) -> PlacementGroup:
        limit = self.settings.deadlines.placement_s
        group = self.connection.reserve(bundles, spread=self.settings.cluster.spread, limit_s=limit)
        if group is None:
            demand = {kind: sum(b.get(kind, 0) for b in bundles) for kind in ("CPU", "GPU")}
            supply = {kind: self.connection.resources().get(kind, 0) for kind in ("CPU", "GPU")}
            free = {kind: self.connection.free_resources().get(kind, 0) for kind in ("CPU", "GPU")}
            raise PlacementError(
                f"the cluster could not place {len(bundles)} workers within "
                f"deadlines.placement_s={limit:g}: demand {demand}, supply {supply}, free now "
                f"{free}; lower rollout.engines, learner.ranks or scorer.replicas, or add nodes"
            )
        return group


def shared_bundles(teams: list[Team]) -> tuple[list[dict[str, float]], list[Seat]]:
    """One bundle per GPU. Worker i of each team gets bundle i, modulo the number of bundles."""
    width = max(team.size for team in teams if team.gpus)
    bundles = [{"CPU": 1.0, "GPU": 1.0} for _ in range(width)]
    return bundles, [Seat(team, i % width) for team in teams for i in range(team.size)]


def own_bundles(
    teams: list[Team], gpus: dict[str, float]
) -> tuple[list[dict[str, float]], list[Seat]]:
    """One bundle per worker.

    Args:
        gpus: GPUs of each worker, by the name of its team.
    """
    members = [team for team in teams for _ in range(team.size)]
    bundles = [
        {"CPU": CPU_SHARE} | ({"GPU": gpus[team.name]} if gpus[team.name] else {})
        for team in members
    ]
    return bundles, [Seat(team, bundle) for bundle, team in enumerate(members)]


def device_of(chosen: Device, gpus: float, cuda_build: str | None) -> str:
    """The device of a run, cpu or cuda. Ray counts GPUs through NVIDIA's driver, so it reports them
    even if torch is built without CUDA.

    Args:
        chosen: cluster.device.
        gpus: number of GPUs of the Ray cluster.
        cuda_build: torch.version.cuda; None: torch is a build for CPUs.

    Raises:
        ConfigError: cuda is required and is not available.
    """
    if chosen is Device.cuda and not gpus:
        raise ConfigError(
            "cluster.device=cuda: the Ray cluster has no GPU; use cluster.device=cpu or start Ray "
            "with --num-gpus"
        )
    if chosen is Device.cuda and not cuda_build:
        raise ConfigError(
            "cluster.device=cuda: the installed torch is a build for CPUs; use cluster.device=cpu "
            "or install the gpu extra"
        )
    return "cuda" if chosen is not Device.cpu and gpus and cuda_build else "cpu"


def gpu_share(teams: int) -> float:
    """The share of a GPU that each of `teams` workers requests from Ray, rounded down to a multiple
    of Ray's unit of 0.0001, so that the shares add up to at most 1.
    """
    return math.floor(10_000 / max(teams, 1)) / 10_000
