"""Measures how long a checkpoint of the learner stops the run, and how long until it is on disk.

It is written once between two updates while the run waits, and once in the background of an update.
The figures for 7B are computed from the measured rates and are marked as such.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import ray

from benchmarks.overhead import MODELS, placed, problem
from benchmarks.stage import settings_of
from hybridrl.run_dir.checkpoint import Checkpointer, RunState, Unfinished, read_manifest
from hybridrl.runtime.calls import gather
from hybridrl.runtime.cluster import Cluster
from hybridrl.runtime.learner_group import LearnerGroup
from hybridrl.settings.run import RunSettings
from hybridrl.types import BatchPlan

PARAMETERS_7B = 7_615_616_512
"""The number of parameters of Qwen2.5-7B."""
BYTES_A_PARAMETER = 12
"""fp32 weights and Adam's two moments."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))


def run(options: argparse.Namespace) -> dict:
    with Cluster(settings_of()):  # all models share one Ray
        rows = {
            name: placed(measure, settings_of(*MODELS[name]), options.repeats)
            for name in options.models
        }
    for name, row in rows.items():
        print(
            f"{name:8s} {row['bytes'] / 1e9:.3f} GB: held {row['foreground_s']:.2f} s in the "
            f"foreground, {row['hold_s']:.3f} s in the background, where it is on disk after "
            f"{row['background_s']:.2f} s; an update takes {row['update_s']:.2f} s alone and "
            f"{row['update_beside_s']:.2f} s beside it"
        )
    largest = max(rows.values(), key=lambda row: row["bytes"])
    estimates = [estimate(largest, ranks) for ranks in (1, 8)]
    for row in estimates:
        print(
            f"7B by arithmetic, {row['ranks']} ranks with a disk each: {row['bytes'] / 1e9:.1f} GB "
            f"in all, held {row['hold_s']:.1f} s, on disk after {row['background_s']:.0f} s"
        )
    return {"rows": rows, "estimates": estimates}


def estimate(row: dict, ranks: int) -> dict:
    """Extrapolate a measured model to Qwen2.5-7B, if each rank writes as fast as the one
    measured.
    """
    nbytes = PARAMETERS_7B * BYTES_A_PARAMETER
    times = nbytes / ranks / row["bytes"]
    return {
        "ranks": ranks,
        "bytes": nbytes,
        "hold_s": times * row["hold_s"],
        "background_s": times * row["background_s"],
    }


def measure(settings: RunSettings, slots: dict, logs: str, repeats: int) -> dict:
    learner = LearnerGroup(settings, slots["ours"], device="cpu", log_dir=logs)
    gather(learner.ready())
    plan, *values = problem(settings)
    batch = BatchPlan.one_update(plan)
    groups = [[[range(len(values[0].uids))]]]
    refs = [[ray.put(value) for value in values]]
    checkpointer = Checkpointer(Path(logs), settings.checkpoint)
    seconds: dict[str, list[float]] = {}

    def note(name: str, began: float) -> None:
        seconds.setdefault(name, []).append(time.perf_counter() - began)

    def begin(step: int, background: bool) -> Unfinished:
        kind = replace(settings.checkpoint, background=background)
        learner.configure(replace(settings, checkpoint=kind))
        state = RunState(step=step, weight_version=0, optimizer_steps=0, parts={}, metrics={})
        began.append(time.perf_counter())
        return checkpointer.begin(state, [learner])

    began: list[float] = []
    learner.learn(batch, groups, refs)  # creates Adam's moments
    for turn in range(1 + repeats):
        before = time.perf_counter()
        learner.learn(batch, groups, refs)
        note("update_s", before)
        checkpointer.finish(begin(2 * turn + 1, background=False))
        note("foreground_s", began[-1])
        unfinished = begin(2 * turn + 2, background=True)
        note("hold_s", began[-1])
        before = time.perf_counter()
        learner.learn(batch, groups, refs)
        note("update_beside_s", before)
        folder = checkpointer.finish(unfinished)
        note("background_s", began[-1])
    files = read_manifest(folder)["files"]
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return medians | {"bytes": sum(file["bytes"] for file in files.values()), "seconds": seconds}


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 2.6), layout="constrained")
    for height, row in enumerate(results["rows"].values()):
        axis.barh(height + 0.2, row["foreground_s"], 0.35, color="tab:gray", label="held, waiting")
        axis.barh(height - 0.2, row["background_s"], 0.35, color="tab:blue", label="on disk after")
        axis.barh(height - 0.2, row["hold_s"], 0.35, color="tab:red", label="held, in background")
    axis.set_yticks(range(len(results["rows"])), list(results["rows"]))
    axis.set_xlabel("s")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[:3], labels[:3], fontsize=8)
    figure.savefig(path, dpi=110)
