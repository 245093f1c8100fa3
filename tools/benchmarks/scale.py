"""Measures the controller's cost of a step at the sizes of a large cluster, with idle workers.

Each worker is a process of its own as long as the memory suffices. With more workers, each process
answers for several of them, which makes no difference to the controller.
"""

import argparse
import ctypes
import gc
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import ray

from benchmarks.fake_workers import Work
from benchmarks.stage import Stage, settings_of
from hybridrl.runtime.calls import Meter
from hybridrl.settings.run import RunSettings

SAMPLES = 2
"""The number of responses in a group."""
PROMPT_TOKENS = 8
MARGIN = 1.25
"""A cost counts as more than linear if it grows by more than this factor times its axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    engines: int
    scorers: int
    ranks: int
    groups: int  # groups of a wave; each is a chunk of its own
    tokens: int = 16  # tokens of a response

    @property
    def workers(self) -> int:
        return self.engines + self.scorers + self.ranks

    def settings(self, steps: int) -> RunSettings:
        return settings_of(
            f"rollout.engines={self.engines}",
            f"scorer.replicas={self.scorers}",
            f"learner.ranks={self.ranks}",
            f"train.prompts_per_step={self.groups}",
            f"train.samples_per_prompt={SAMPLES}",
            f"train.steps={steps}",
            "rollout.groups_per_chunk=1",
            f"rollout.max_new_tokens={self.tokens}",
            f"rollout.max_model_len={self.tokens + PROMPT_TOKENS + 8}",
        )

    def shrunk(self, workers: int) -> "Size":
        """A size with about `workers` workers in the same proportions, at least one of each
        kind.
        """
        share = workers / self.workers
        return replace(
            self,
            engines=max(1, round(self.engines * share)),
            scorers=max(1, round(self.scorers * share)),
            ranks=max(1, round(self.ranks * share)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of one step in the controller's process."""

    wall_s: float
    cpu_s: float  # CPU seconds of all threads, including Ray's
    main_s: float  # CPU seconds of the controller's thread
    calls: int  # number of calls to workers
    flight_bytes: int  # bytes of the wave's rollouts and scores, as the workers report them
    store_bytes: int  # growth of the object store's shared memory


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engines", type=int, default=256)
    parser.add_argument("--scorers", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=128)
    parser.add_argument("--groups", type=int, default=100_000)
    parser.add_argument(
        "--processes", type=int, default=112, help="of workers; 100 MB of memory each"
    )
    parser.add_argument("--few", type=int, default=14, help="processes that answer for all workers")
    parser.add_argument("--base-groups", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all"
    )


def run(options: argparse.Namespace) -> dict:
    whole = Size(
        engines=options.engines,
        scorers=options.scorers,
        ranks=options.ranks,
        groups=options.groups,
    )
    results: dict = {"whole": asdict(whole), "base_groups": options.base_groups}
    common = replace(whole.shrunk(options.processes), groups=options.base_groups)
    few = whole.shrunk(options.few)
    if "agreement" in options.parts:
        with stage_of(common) as stage:
            results["processes"] = measured(stage, common, options.repeats, processes=common)
    with stage_of(few) as stage:
        if "agreement" in options.parts:
            results["shared"] = measured(stage, common, options.repeats, processes=few)
        if "axes" in options.parts:
            results["axes"] = axes(stage, whole, few, options)
        if "whole" in options.parts:
            results["step"] = measured(stage, whole, 1, processes=few, warm_up=0)
    return results


PARTS = ("agreement", "axes", "whole")


def stage_of(size: Size) -> Stage:
    """A stage with a process for each worker of `size`."""
    stage = Stage(size.settings(steps=1))
    stage.assign(Work())
    return stage


def axes(stage: Stage, whole: Size, few: Size, options: argparse.Namespace) -> dict:
    """Measure the costs along each axis, from a sixteenth of its full length on, while the other
    axes are short.
    """
    base = replace(few, groups=options.base_groups)
    together = [whole.shrunk(whole.workers // n) for n in (16, 4, 1)]
    lengths = {
        "engines": fourfold(whole.engines),
        "scorers": fourfold(whole.scorers),
        "ranks": fourfold(whole.ranks),
        "groups": [options.base_groups * 4**i for i in range(3)],
        "tokens": [16, 256, 4096],
    }
    rows: dict = {}
    for axis, values in lengths.items():
        rows[axis] = [
            measured(stage, replace(base, **{axis: value}), options.repeats, processes=few)
            for value in values
        ]
        print(f"{axis}: {growth(rows[axis], axis)}", flush=True)
    rows["workers"] = [
        measured(stage, replace(size, groups=base.groups), options.repeats, processes=few)
        for size in together
    ]
    return rows


def fourfold(largest: int) -> list[int]:
    return sorted({max(largest // 16, 1), max(largest // 4, 1), largest})


def growth(rows: Sequence[dict], axis: str) -> str:
    """A sentence that compares the growth of CPU time between an axis's last two points with the
    growth of the axis.
    """
    before, last = rows[-2:]
    times = last["size"][axis] / before["size"][axis]
    cost = last["cpu_s"] / before["cpu_s"]
    verdict = "at most linear" if cost <= MARGIN * times else "MORE than linear"
    return f"{times:.1f} times as many cost {cost:.2f} times as much: {verdict}"


def measured(stage: Stage, size: Size, repeats: int, *, processes: Size, warm_up: int = 1) -> dict:
    """The medians of the costs of `repeats` steps, and the memory that all of them need.

    Args:
        processes: the size of the stage, whose processes answer for the workers of `size`.
    """
    resident = trimmed_memory()
    controller = stage.controller(
        size.settings(steps=warm_up + repeats),
        engines=size.engines,
        scorers=size.scorers,
        ranks=size.ranks,
        prompt_tokens=PROMPT_TOKENS,
    )
    costs = [step_cost(controller) for _ in range(warm_up + repeats)][warm_up:]
    medians = {key: statistics.median(asdict(c)[key] for c in costs) for key in asdict(costs[0])}
    row = {
        "size": asdict(size),
        "processes": processes.workers,
        "memory_bytes": memory("VmHWM") - resident,
        **medians,
    }
    show(row)
    return row


def step_cost(controller) -> Cost:
    gc.collect()
    calls = Meter.calls
    store = store_bytes()
    wall = time.perf_counter()
    cpu = time.process_time()
    main = time.thread_time()
    row = controller.step()
    return Cost(
        wall_s=time.perf_counter() - wall,
        cpu_s=time.process_time() - cpu,
        main_s=time.thread_time() - main,
        calls=Meter.calls - calls,
        flight_bytes=int(row["transfer/bytes_rollout"] + row["transfer/bytes_scores"]),
        store_bytes=store_bytes() - store,
    )


def store_bytes() -> int:
    """The bytes in use in the object stores of all nodes."""
    name = "object_store_memory"
    return int(ray.cluster_resources().get(name, 0) - ray.available_resources().get(name, 0))


def trimmed_memory() -> int:
    """Return free memory to the system and reset VmHWM, the peak of resident memory, which needs
    Linux; returns the resident memory of this process in bytes.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(field: str) -> int:
    """VmRSS, the resident memory of this process in bytes, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"Linux has no {field} for process {os.getpid()}")


def show(row: dict) -> None:
    size = row["size"]
    print(
        f"{size['engines']:4d} engines {size['scorers']:3d} scorers {size['ranks']:4d} ranks "
        f"{size['groups']:6d} groups {size['tokens']:5d} tokens, {row['processes']:3d} processes: "
        f"wall {row['wall_s']:.2f} s, CPU {row['cpu_s']:.2f}, main thread {row['main_s']:.2f}; "
        f"{row['calls'] / size['groups']:.2f} calls a group, {row['memory_bytes'] / 1e6:.0f} MB, "
        f"in flight {row['flight_bytes'] / 1e6:.1f} MB, store {row['store_bytes'] / 1e6:.1f} MB",
        flush=True,
    )


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        axis: ([length(row, axis) for row in rows], rows)
        for axis, rows in results.get("axes", {}).items()
    }
    both = [results[way] for way in ("processes", "shared") if way in results]
    if both:
        panels["processes, same workers"] = ([row["processes"] for row in both], both)
    if "step" in results:
        panels["groups, one step"] = ([results["step"]["size"]["groups"]], [results["step"]])
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.2 * len(panels), 3.2), squeeze=False, layout="constrained"
    )
    for axis, (name, (values, rows)) in zip(axes[0], panels.items(), strict=True):
        for kind, label in {"cpu_s": "CPU of the process", "main_s": "main thread"}.items():
            axis.plot(values, [row[kind] for row in rows], "o-", label=label)
        axis.set_xlabel(name)
        axis.set_ylabel("s a step")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def length(row: dict, axis: str) -> int:
    """The position of a row on an axis; on the axis `workers` it is the sum of all kinds."""
    size = row["size"]
    if axis == "workers":
        return size["engines"] + size["scorers"] + size["ranks"]
    return size[axis]
