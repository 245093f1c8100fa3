"""Measures how many copies each node sends, and the time, when weights go to engines on many nodes.

The nodes are Ray's own fake ones: each has an object store, and all share this machine.
"""

import argparse
import logging
import statistics
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import ray
from ray.cluster_utils import Cluster as FakeCluster

from benchmarks.fake_workers import Work
from benchmarks.stage import FakeLearner, FakeRollout, settings_of
from hybridrl.runtime.calls import gather
from hybridrl.runtime.cluster import Cluster, Team
from hybridrl.runtime.fan_out import rounds
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.runtime.weight_sync import WeightSync
from hybridrl.settings.choices import WeightTransfer

REPORT_S = 0.25
"""The interval between two reports of a node's counters."""
STABLE_S = 1.0
"""Counters that did not change for this time, which is several reports, are complete."""
LIMIT_S = 20.0
"""The longest wait for the counters to be complete."""


class DirectRollout(FakeRollout):
    """A group that leaves the copies to Ray."""

    def _copy_to_nodes(self, engines, packed) -> None: ...


WAYS: dict[str, type[RolloutGroup]] = {"Ray alone": DirectRollout, "in rounds": FakeRollout}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--engines-per-node", type=int, default=2)
    parser.add_argument("--mb", type=int, default=200, help="of the weights")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--extrapolate-nodes", type=int, default=32)
    parser.add_argument("--gb", type=float, default=14.0, help="of the extrapolated weights")
    parser.add_argument("--gb-per-s", type=float, default=12.5, help="of an extrapolated node")


def run(options: argparse.Namespace) -> dict:
    rows = []
    for nodes in options.nodes:
        rows += measure(nodes, options)
    many = options.extrapolate_nodes
    copies = {"Ray alone": float(many - 1), "in rounds": expected_copies(many)}
    seconds = {way: n * options.gb / options.gb_per_s for way, n in copies.items()}
    print(
        f"extrapolated to {many} nodes, {options.gb:g} GB at {options.gb_per_s:g} GB/s: "
        + ", ".join(f"{way} {copies[way]:.1f} copies = {seconds[way]:.1f} s" for way in copies)
    )
    extrapolated = {"nodes": many, "copies_in_turn": copies, "seconds": seconds}
    return {"mb": options.mb, "rows": rows, "extrapolated": extrapolated}


def expected_copies(nodes: int, trials: int = 1000) -> float:
    """The expected number of copies that are sent one after the other, summed over the busiest
    sender of each round. Ray fetches each copy from a node that it draws among those that have one.

    Args:
        nodes: the number of nodes, including the source.
    """
    rng = np.random.default_rng(0)
    holders = 1
    total = 0.0
    for receivers in rounds(range(nodes - 1)):
        busiest = [
            max(Counter(rng.integers(0, holders, len(receivers)).tolist()).values())
            for _ in range(trials)
        ]
        total += statistics.mean(busiest)
        holders += len(receivers)
    return total


def measure(nodes: int, options: argparse.Namespace) -> list[dict]:
    store = {"object_store_memory": 4 * options.mb * 1_000_000 + 100_000_000}
    system = {"metrics_report_interval_ms": int(1000 * REPORT_S)}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": system, **store}
    fake = FakeCluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes - 1):
            fake.add_node(num_cpus=1, **store)
        fake.wait_for_nodes()
        ray.init(address=fake.address, log_to_driver=False, logging_level=logging.ERROR)
        return [publish(way, nodes, options) for way in WAYS]
    finally:
        ray.shutdown()
        fake.shutdown()


def publish(way: str, nodes: int, options: argparse.Namespace) -> dict:
    """Publish some versions of the weights; returns the seconds of each, and the copies of the
    last.
    """
    engines = nodes * options.engines_per_node
    settings = settings_of(f"rollout.engines={engines}", "cluster.spread=true")
    backend = WeightTransfer.object_store
    with (
        tempfile.TemporaryDirectory(prefix="hybridrl-bench-") as logs,
        Cluster(settings) as cluster,
    ):
        slots = cluster.place(
            [
                Team(name="rollout", size=engines, gpus=0, heavy=True),
                Team(name="learner", size=1, gpus=0, heavy=True),
            ]
        )
        rollout = WAYS[way](
            settings,
            slots["rollout"],
            model=settings.model,
            device="cpu",
            backend=backend,
            log_dir=logs,
        )
        learner = FakeLearner(settings, slots["learner"], device="cpu", log_dir=logs)
        gather([*rollout.ready(), *learner.ready()])
        work = Work(weight_bytes=1_000_000 * options.mb)
        learner.group.call_all("assign", work, deadline_s=60.0)
        sync = WeightSync(learner, rollout, backend)
        seconds = []
        for version in range(1 + options.repeats):
            if version == options.repeats:
                before = settled_counters()
            began = time.perf_counter()
            sync.publish(version)
            seconds.append(time.perf_counter() - began)
        after = settled_counters()
        rollout.close()
        learner.close()
    used = len({slot.node_id for slot in slots["rollout"]})
    copies = {
        kind: sorted(
            (round((after[node][kind] - before[node][kind]) / work.weight_bytes) for node in after),
            reverse=True,
        )
        for kind in ("sent", "received")
    }
    row = {
        "way": way,
        "nodes": nodes,
        "nodes_with_engines": used,
        "engines": engines,
        "seconds": seconds[1:],
        **copies,
    }
    print(
        f"{nodes} nodes, {engines} engines, {options.mb} MB, {way}: "
        f"{statistics.median(seconds[1:]):.2f} s; copies sent by each node {copies['sent']}, "
        f"received {copies['received']}",
        flush=True,
    )
    return row


def settled_counters() -> dict[str, dict[str, float]]:
    """The counters when they no longer change and as much was received as was sent, because the two
    ends of a transfer report it at different times; or their values after LIMIT_S.
    """
    limit = time.monotonic() + LIMIT_S
    last = counters()
    since = time.monotonic()
    while time.monotonic() < limit:
        time.sleep(REPORT_S)
        found = counters()
        if found != last:
            last = found
            since = time.monotonic()
        sent, received = (sum(of[kind] for of in last.values()) for kind in ("sent", "received"))
        if time.monotonic() - since >= STABLE_S and sent == received:
            break
    return last


def counters() -> dict[str, dict[str, float]]:
    """The bytes that each node has sent and received, by Ray's metrics."""
    result = {}
    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address, timeout=10) as response:
            lines = response.read().decode().splitlines()
        values = [line for line in lines if line.startswith("ray_object_manager_bytes{")]
        result[node["NodeID"]] = {
            "sent": sum(float(v.split()[-1]) for v in values if 'Type="Pushed' in v),
            "received": sum(float(v.split()[-1]) for v in values if 'Type="Received"' in v),
        }
    return result


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5, 3.6), layout="constrained")
    for way in WAYS:
        rows = [row for row in results["rows"] if row["way"] == way]
        axis.plot([row["nodes"] for row in rows], [row["sent"][0] for row in rows], "o-", label=way)
    axis.set_xlabel("nodes")
    axis.set_ylabel("copies sent by the busiest node")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
