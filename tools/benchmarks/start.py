"""Measures the start of each worker of the quickstart alone, and of all workers together.

The time of a worker is from the start of its process until its first answer: import, model, engine.
If every worker had its own cores, all together would take as long as the slowest one.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.stage import settings_of
from hybridrl.runtime.calls import gather
from hybridrl.runtime.cluster import Cluster
from hybridrl.runtime.learner_group import LearnerGroup
from hybridrl.runtime.reward_group import RewardGroup
from hybridrl.runtime.scorer_group import ScorerGroup
from hybridrl.runtime.start_up import StartUp
from hybridrl.runtime.workers import (
    Slots,
    place_workers,
    start_engines,
    start_workers,
)
from hybridrl.settings.run import RunSettings

MODULES = {
    "driver": "hybridrl.launch.session",
    "engine": "vllm",
    "learner": "hybridrl.policy.learner",
    "scorer": "hybridrl.teachers.scorer",
    "reward": "hybridrl.rewards.worker",
}
"""The module that each process of a run imports before it does anything else."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--imports",
        nargs="+",
        choices=MODULES,
        default=list(MODULES),
        help="the processes whose imports are measured too",
    )
    parser.add_argument(
        "--workers",
        nargs="+",
        choices=[name for name in STARTS if name != TOGETHER],
        default=[name for name in STARTS if name != TOGETHER],
        help="the workers that are started alone; all together are always started too",
    )


def run(options: argparse.Namespace) -> dict:
    imports = {
        name: statistics.median(import_seconds(MODULES[name]) for _ in range(options.repeats))
        for name in options.imports
    }
    print("imports, s: " + "  ".join(f"{name} {s:.1f}" for name, s in imports.items()), flush=True)
    settings = settings_of()
    starts: dict[str, list[float]] = {name: [] for name in (*options.workers, TOGETHER)}
    with Cluster(settings):  # all workers share one Ray
        for _ in range(options.repeats):
            for name, seconds in starts.items():
                seconds.append(start_seconds(settings, STARTS[name]))
    for name, seconds in starts.items():
        print(f"{name:12s} {statistics.median(seconds):5.1f} s")
    ratio = together_over_slowest(starts)
    print(f"all together take {ratio:.2f} times the slowest alone, on {os.cpu_count()} cores")
    return {"imports_s": imports, "starts_s": starts, "ratio": ratio}


def together_over_slowest(starts: dict[str, list[float]]) -> float:
    """The median time of all workers together over that of the slowest worker alone."""
    medians = {name: statistics.median(seconds) for name, seconds in starts.items()}
    return medians.pop(TOGETHER) / max(medians.values())


def import_seconds(module: str) -> float:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", f"import {module}"], check=True, capture_output=True, timeout=300
    )
    return time.perf_counter() - started


Start = Callable[[RunSettings, Cluster, Slots, str], list]
"""A function that starts some workers, waits for their first answers, and returns their groups."""


def engine_alone(settings: RunSettings, cluster: Cluster, slots: Slots, logs: str) -> list:
    engines, _ = start_engines(settings, cluster, slots, logs, StartUp(lambda line: None))
    gather(engines.ready())
    return [engines]


def learner_alone(settings: RunSettings, cluster: Cluster, slots: Slots, logs: str) -> list:
    learner = LearnerGroup(settings, slots["learner"], device=cluster.device, log_dir=logs)
    gather(learner.ready())
    return [learner]


def scorer_alone(settings: RunSettings, cluster: Cluster, slots: Slots, logs: str) -> list:
    (teacher,) = settings.scored_teachers
    scorer = ScorerGroup(
        settings, slots[f"scorer-{teacher}"], teacher=teacher, device=cluster.device, log_dir=logs
    )
    gather(scorer.ready())
    return [scorer]


def reward_alone(settings: RunSettings, cluster: Cluster, slots: Slots, logs: str) -> list:
    rewards = RewardGroup(settings, slots["reward"], log_dir=logs)
    gather(rewards.ready())
    return [rewards]


def all_together(settings: RunSettings, cluster: Cluster, slots: Slots, logs: str) -> list:
    workers = start_workers(settings, cluster, slots, logs)
    return [workers.rollout, workers.learner, workers.rewards, *workers.scorers]


TOGETHER = "all together"
STARTS: dict[str, Start] = {
    "engine": engine_alone,
    "learner": learner_alone,
    "scorer": scorer_alone,
    "reward": reward_alone,
    TOGETHER: all_together,
}


def start_seconds(settings: RunSettings, start: Start) -> float:
    with (
        tempfile.TemporaryDirectory(prefix="hybridrl-bench-") as logs,
        Cluster(settings) as cluster,
    ):
        slots = place_workers(settings, cluster)
        started = time.perf_counter()
        groups = start(settings, cluster, slots, logs)
        seconds = time.perf_counter() - started
        for group in groups:
            group.group.close()
    return seconds


def draw(results: dict, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(6, 3))
    names = list(results["starts_s"])
    panel.barh(names, [statistics.median(results["starts_s"][name]) for name in names])
    panel.set(xlabel="s until the first answer")
    panel.invert_yaxis()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
