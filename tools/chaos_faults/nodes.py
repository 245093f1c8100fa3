"""Scenarios C1 and C2: a run on two Ray nodes, one of which dies, or is cut off and comes back.

The nodes are network namespaces that are joined by a pair of virtual interfaces, so that a network
partition is real; creating them needs root. Ray's health checks are tuned so that Ray gives up a
node after about 4.5 s instead of a minute.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from chaos_faults.finding import Finding
from chaos_faults.ground import STEP, Ground, last_step, next_save
from chaos_faults.ray_options import QUICK_HEALTH_CHECKS
from chaos_faults.training import START_S, training

HEAD = "10.231.77.1"
FAR = "10.231.77.2"
SPACES = ("hybridrl-head", "hybridrl-far")
LINK = "veth0"
"""The interface in each namespace. It is set for gloo, because gloo's default, the interface of the
host's name, exists in neither namespace.
"""
LOST = r"failed in .*(starting another worker|going back to the last checkpoint)"
DETECTED_S = 5.0
RESUMED_S = 60.0
CUT_S = 10.0


def lose_node(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """C1: all processes of the far node are killed at once."""
    return {"C1": on_two_nodes(ground, "the far node's processes killed", Nodes.kill_far)}


def cut_off(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """C2: the link is down for 10 s; answers of the far node's workers after that must be
    ignored.
    """

    def cut(nodes: "Nodes") -> None:
        ip("-n", SPACES[0], "link", "set", LINK, "down")
        nodes.later = lambda: ip("-n", SPACES[0], "link", "set", LINK, "up")

    return {"C2": on_two_nodes(ground, f"the link down for {CUT_S:g} s, then up", cut)}


def on_two_nodes(ground: Ground, description: str, strike: Callable[["Nodes"], None]) -> Finding:
    """Start a run on two nodes, cause a fault by `strike`, and judge how the run continues."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        outcome = "not run: two network namespaces need root and iproute2"
        return Finding(passed=False, outcome=outcome)
    run_dir = ground.run_dir("nodes")
    with two_nodes() as nodes:
        env = {**nodes.env, "RAY_ADDRESS": f"{HEAD}:6399"}
        settings = [*ground.overrides, "cluster.spread=true", "learner.ranks=2"]
        with training(settings, run_dir, env=env, within=("ip", "netns", "exec", SPACES[0])) as run:
            run.until(STEP)
            run.until(STEP)
            far_workers = [worker for worker in WORKERS if nodes.is_far(run.pid(worker))]
            at = time.time()
            strike(nodes)
            detected = run.until(LOST, 90)
            time.sleep(max(0.0, at + CUT_S - time.time()))
            nodes.later()
            recovered = run.until(STEP, 180)
            for _ in range(4):
                run.until(STEP, 120)
            saved = next_save(run, 120)
            reached = last_step(run)
        within = detected - at <= DETECTED_S and recovered - at <= RESUMED_S
        outcome = (
            f"{description}, {', '.join(far_workers)} on it; went on to step {reached} (bounds "
            f"{DETECTED_S:g} s and {RESUMED_S:g} s)"
        )
        return ground.judged(
            run_dir,
            saved,
            outcome,
            within=within and bool(far_workers),
            detected_s=detected - at,
            recovered_s=recovered - at,
        )


WORKERS = ("rollout/0", "rollout/1", "learner/0", "learner/1", "scorer-main/0", "reward/0")


class Nodes:
    """Two Ray nodes, each in its own network namespace."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.env = env
        self.later: Callable[[], object] = lambda: None  # called CUT_S after the fault to undo it

    def is_far(self, pid: int) -> bool:
        """Whether a process runs on the far node."""
        return os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat(f"/run/netns/{SPACES[1]}").st_ino

    def kill_far(self) -> None:
        """Kill all processes of the far node."""
        subprocess.run(["kill", "-9", *ip("netns", "pids", SPACES[1]).split()], check=False)


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Two Ray nodes in network namespaces, until the end of the `with` block."""
    sessions = Path(mkdtemp(prefix="ray-"))  # short: the path of a Unix socket holds 107 bytes
    own = {
        "HOME": str(sessions),
        "RAY_TMPDIR": str(sessions),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    nodes = Nodes({**QUICK_HEALTH_CHECKS, **own, "GLOO_SOCKET_IFNAME": LINK})
    try:
        for space in SPACES:
            ip("netns", "add", space)
        ip(
            "link",
            "add",
            LINK,
            "netns",
            SPACES[0],
            "type",
            "veth",
            "peer",
            "name",
            LINK,
            "netns",
            SPACES[1],
        )
        for space, address in zip(SPACES, (HEAD, FAR), strict=True):
            ip("-n", space, "addr", "add", f"{address}/24", "dev", LINK)
            ip("-n", space, "link", "set", LINK, "up")
            ip("-n", space, "link", "set", "lo", "up")
        start_ray(
            nodes,
            SPACES[0],
            ["--head", "--port=6399", f"--node-ip-address={HEAD}", "--include-dashboard=false"],
        )
        start_ray(nodes, SPACES[1], [f"--address={HEAD}:6399", f"--node-ip-address={FAR}"])
        yield nodes
    finally:
        for space in SPACES:
            pids = ip("netns", "pids", space).split()
            if pids:
                subprocess.run(["kill", "-9", *pids], check=False)
            ip("netns", "del", space)
        shutil.rmtree(sessions, ignore_errors=True)


def start_ray(nodes: Nodes, space: str, options: list[str]) -> None:
    """Start a Ray node in a namespace."""
    ray = str(Path(sys.executable).parent / "ray")
    command = [
        "ip",
        "netns",
        "exec",
        space,
        ray,
        "start",
        *options,
        "--num-cpus=2",
        "--object-store-memory=300000000",
    ]
    done = subprocess.run(
        command,
        env={**os.environ, **nodes.env},
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-500:]


def ip(*words: str) -> str:
    """Run `ip` with these arguments and return its output; a failure is ignored."""
    return subprocess.run(
        ["ip", *words], capture_output=True, text=True, check=False, timeout=30
    ).stdout
