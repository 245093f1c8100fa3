"""The connection to Ray: to a running cluster, or to a local one that this process starts."""

import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from hybridrl.core.errors import PlacementError
from hybridrl.runtime.head_node import HEAD
from hybridrl.runtime.ray_internals import (
    Record,
    ignore_unfetched_errors,
    node_address,
    node_cpus,
    node_id,
    nodes_of_bundles,
)
from hybridrl.settings.run import ClusterConfig, RunSettings

LOCAL = "local"
"""The address with which Ray starts a cluster on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine of the cluster."""

    id: str
    address: str
    cpus: int


class Connection(Protocol):
    """The functions of Ray that the placement of workers needs."""

    def open(self, settings: RunSettings) -> None:
        """Raises:
        PlacementError: nothing answers at the cluster's address.
        """

    def close(self) -> None: ...

    def resources(self) -> dict[str, float]:
        """The resources of all nodes together, by Ray's names: "CPU", "GPU"."""

    def free_resources(self) -> dict[str, float]:
        """As `resources`, without those that workers have taken."""

    def reserve(
        self, bundles: Sequence[dict[str, float]], *, spread: bool, limit_s: float
    ) -> PlacementGroup | None:
        """Reserve all bundles of resources at once.

        Args:
            spread: place them on different nodes where possible.
            limit_s: how long to wait for room, in seconds.

        Returns:
            The reserved bundles; None: there was no room within `limit_s`.
        """

    def release(self, group: PlacementGroup) -> None: ...

    def nodes(self, group: PlacementGroup) -> dict[int, Node]:
        """The node of each bundle, by the bundle's index."""


class RayConnection:
    """The real connection. If this process is already connected to a Ray, that one is used and left
    running.
    """

    def __init__(self) -> None:
        self._owned = False

    def open(self, settings: RunSettings) -> None:
        """Raises:
        PlacementError: there is no cluster at the address, or this process is connected to another
            one.
        """
        if ray.is_initialized():
            check_connected(settings.cluster.address)
        else:
            connect(settings)
            self._owned = True

    def close(self) -> None:
        if self._owned:
            ray.shutdown()
            self._owned = False

    def resources(self) -> dict[str, float]:
        return ray.cluster_resources()

    def free_resources(self) -> dict[str, float]:
        return ray.available_resources()

    def reserve(
        self, bundles: Sequence[dict[str, float]], *, spread: bool, limit_s: float
    ) -> PlacementGroup | None:
        group = placement_group(list(bundles), strategy="SPREAD" if spread else "PACK")
        if group.wait(limit_s):
            return group
        remove_placement_group(group)
        return None

    def release(self, group: PlacementGroup) -> None:
        if not HEAD.is_silent:
            remove_placement_group(group)

    def nodes(self, group: PlacementGroup) -> dict[int, Node]:
        by_id = {node_id(record): node_of(record) for record in ray.nodes()}
        bundles = nodes_of_bundles(placement_group_table(group))
        return {bundle: by_id[node] for bundle, node in bundles.items()}


def node_of(record: Record) -> Node:
    """The node that an entry of ray.nodes() describes."""
    return Node(id=node_id(record), address=node_address(record), cpus=node_cpus(record))


def object_store_bytes() -> float:
    """The total size of the object stores of all nodes; infinite if Ray does not report it."""
    return ray.cluster_resources().get("object_store_memory", math.inf)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C, SIGTERM and SIGHUP while the block lasts: if Ray's shutdown is interrupted,
    its processes stay for a minute. Does nothing outside the main thread, where Python cannot
    handle signals.
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


def starts_ray(cluster: ClusterConfig) -> bool:
    """Whether a run would start its own Ray, on this machine only."""
    address = cluster.address or os.environ.get("RAY_ADDRESS") or LOCAL
    return address == LOCAL and not ray.is_initialized()


def connect(settings: RunSettings) -> None:
    """Start Ray here, or join the cluster at cluster.address or RAY_ADDRESS.

    Raises:
        PlacementError: there is no cluster at that address, or Ray does not start here.
    """
    source = "cluster.address" if settings.cluster.address else "RAY_ADDRESS"
    address = settings.cluster.address or os.environ.get(source) or LOCAL
    local = address == LOCAL
    try:
        check_answers(address, settings.deadlines.placement_s)
        # Calls that depend on the result of a failed worker fail too. They are repeated, and the
        # errors of the old ones are never fetched.
        ignore_unfetched_errors()
        with private_token() if local else nullcontext(), sighup_blocked():
            ray.init(
                address=address,
                include_dashboard=False if local else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:  # Ray raises a plain Exception if its node starts too late
        reason = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
        if local:
            raise PlacementError(
                f"Ray could not be started on this machine: {reason}; its logs are in /tmp/ray, "
                "and hybridrl doctor checks memory and disks"
            ) from error
        here = "set it to null" if source == "cluster.address" else "unset it"
        raise PlacementError(
            f"{source}={address}: no Ray cluster there ({reason}); give the address that "
            f"cluster/head.sh printed and set RAY_AUTH_MODE=token, or {here} to run here"
        ) from error


def check_connected(address: str | None) -> None:
    """Check that `address` is that of the cluster that this process is connected to.

    Args:
        address: cluster.address; null and addresses without a port match any cluster.

    Raises:
        PlacementError: it is that of another cluster; the message names both.
    """
    connected = ray.get_runtime_context().gcs_address
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdigit() or "//" in host:
        return
    there = connected.rpartition(":")
    try:
        same = {socket.gethostbyname(host), host} & {socket.gethostbyname(there[0]), there[0]}
    except OSError:
        same = {host} & {there[0]}
    if not same or port != there[2]:
        raise PlacementError(
            f"cluster.address={address}: this process is connected to the Ray at {connected} "
            "already; call ray.shutdown() first, or leave cluster.address out to use that one"
        )


@contextmanager
def sighup_blocked() -> Iterator[None]:
    """Block SIGHUP, so that processes started in the block, and their children, never get it; this
    process gets it after the block.

    A closed terminal sends it to all of them, and Ray's own processes would end before the driver
    has saved what was learned. Ray does the same with SIGINT.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def private_token() -> Iterator[None]:
    """Make the token of a local cluster, which Ray creates in the block, readable only by its
    owner. Ray makes it readable by every user of the machine.
    """
    token = Path.home() / ".ray" / "auth_token"
    token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        yield
    finally:
        if token.is_file() and token.stat().st_uid == os.geteuid():
            token.chmod(0o600)


def check_answers(address: str, limit_s: float) -> None:
    """Check that a process accepts connections at `address`, if it has the form HOST:PORT. Ray
    itself would try for minutes and then end this process.

    Raises:
        OSError: no connection was accepted within `limit_s`.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=limit_s).close()
