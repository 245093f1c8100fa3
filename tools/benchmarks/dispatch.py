"""Measures the controller's time for one large batch: draw, headers, rewards, plan, update.

It is compared with a controller that fetches the whole batch.
"""

import argparse
import gc
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import ray

from benchmarks.fake_workers import Work
from benchmarks.stage import Stage, settings_of
from hybridrl.batch.groups import join, select_groups
from hybridrl.controller.controller import Controller
from hybridrl.controller.pipeline import Wave
from hybridrl.types import ScoredBatch

GROUP = 8
PROMPT_TOKENS = 768
PUBLISHED_S = 135.0
TARGET_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    sequences: int
    tokens: int  # tokens of a sequence, including its prompt
    support: int  # K, the number of teacher scores for each response token

    @property
    def response(self) -> int:
        return self.tokens - PROMPT_TOKENS

    @property
    def nbytes(self) -> int:
        """The bytes of the rollouts and scores, computed from their dtypes."""
        return self.sequences * (
            self.tokens * (4 + 1 + 4 + 4 + 4) + self.response * 8 * self.support
        )


SIZES = [
    *(Size(sequences=512, tokens=tokens, support=100) for tokens in (1024, 2048, 4096, 8192)),
    *(Size(sequences=512, tokens=32768, support=k) for k in (0, 8, 16, 32)),
    *(Size(sequences=n, tokens=32768, support=100) for n in (64, 128)),
]
WHOLE = Size(sequences=512, tokens=32768, support=100)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store-gb",
        type=float,
        default=6.0,
        help="of Ray's object store; larger batches are left out",
    )
    parser.add_argument("--shrink", type=int, default=1, help="divides the sequences of every size")
    parser.add_argument("--repeats", type=int, default=3)


def run(options: argparse.Namespace) -> dict:
    store = int(options.store_gb * 1e9)
    sizes = [
        Size(
            sequences=max(s.sequences // options.shrink, GROUP), tokens=s.tokens, support=s.support
        )
        for s in (*SIZES, WHOLE)
    ]
    settings = settings_for(sizes[0])
    rows = []
    print(
        f"{'sequences x tokens, K':24s} {'GB':>6s} {'driver s':>9s} {'CPU s':>7s} "
        f"{'bytes in driver':>16s} {'materialising s':>16s}"
    )
    with Stage(settings, store_bytes=store) as stage:
        for size in (s for s in sizes if s.nbytes < 0.9 * store):
            rows.append(
                measure(stage, size, options.repeats, with_other=2 * size.nbytes < 0.9 * store)
            )
            show(rows[-1])
    worst = max(row["driver_s"] for row in rows)
    verdict = (
        "reached"
        if worst <= TARGET_S and not any(row["driver_bytes"] for row in rows)
        else "MISSED"
    )
    print(
        f"slowest {worst:.3f} s, target {TARGET_S:.0f} s and 0 bytes: {verdict}; published by "
        f"others: {PUBLISHED_S:.0f} s"
    )
    whole_fits = sizes[-1].nbytes < 0.9 * store
    if not whole_fits:
        print(
            f"the whole batch of {WHOLE.nbytes / 1e9:.1f} GB does not fit the object store; its "
            "three axes grow apart from each other"
        )
    return {
        "target_s": TARGET_S,
        "published_s": PUBLISHED_S,
        "group_size": GROUP,
        "whole_batch_measured": whole_fits,
        "rows": rows,
    }


def settings_for(size: Size):
    groups = size.sequences // GROUP
    return settings_of(
        "algorithm=opd_full",
        "algorithm.support=topk",
        f"algorithm.topk.k={max(size.support, 1)}",
        "algorithm.topk.source=teacher",
        f"train.prompts_per_step={groups}",
        f"train.samples_per_prompt={GROUP}",
        "rollout.groups_per_chunk=1",
        f"rollout.max_new_tokens={size.response}",
        f"rollout.max_model_len={size.tokens}",
        f"train.max_tokens_per_micro_batch={2 * size.tokens}",
    )


def measure(stage: Stage, size: Size, repeats: int, *, with_other: bool) -> dict:
    stage.assign(Work(support=size.support))
    walls: list[float] = []
    cpus: list[float] = []
    fetched = 0.0
    others: list[float] = []
    for _ in range(repeats):
        wall, cpu, row = ours(stage.controller(settings_for(size), prompt_tokens=PROMPT_TOKENS))
        walls.append(wall)
        cpus.append(cpu)
        fetched += row["controller/materialized_bytes"]
        gc.collect()
    payload = row["transfer/bytes_rollout"] + row["transfer/bytes_scores"]
    for _ in range(repeats if with_other else 0):
        others.append(
            materialising(stage.controller(settings_for(size), prompt_tokens=PROMPT_TOKENS))
        )
        gc.collect()
    return {
        "sequences": size.sequences,
        "tokens": size.tokens,
        "support": size.support,
        "bytes": payload,
        "driver_s": statistics.median(walls),
        "driver_cpu_s": statistics.median(cpus),
        "driver_bytes": fetched,
        "materialising_s": statistics.median(others) if others else None,
    }


def ours(controller: Controller) -> tuple[float, float, dict]:
    """Take a step; returns wall and CPU seconds of the controller, and the metrics of the step.

    The time between the draw and the headers, in which the workers are busy, does not count.
    """
    began = time.perf_counter()
    cpu = cpu_seconds()
    wave = controller.pipeline.draw(0)
    draw_s = time.perf_counter() - began
    draw_cpu_s = cpu_seconds() - cpu
    wait_for(wave)
    controller.pipeline.waves.append(wave)
    began = time.perf_counter()
    cpu = cpu_seconds()
    row = controller.step()
    return draw_s + time.perf_counter() - began, draw_cpu_s + cpu_seconds() - cpu, row


def materialising(controller: Controller) -> float:
    """The seconds that a controller needs to fetch all rollouts and scores, join them and store the
    result as one shard.
    """
    wave = controller.pipeline.draw(0)
    wait_for(wave)
    began = time.perf_counter()
    parts = [
        ScoredBatch(
            rollout=ray.get(d.chunk.batch.ref),
            rewards=ray.get(d.rewards.ref),
            scores=tuple(ray.get(call.scores.ref) for call in d.scores),
        )
        for d in wave.drawn
    ]
    batch = join(parts)
    shard = select_groups(batch, range(len(batch.rollout.uids)))
    sent = ray.put(shard)
    took = time.perf_counter() - began
    del sent
    return took


def wait_for(wave: Wave) -> None:
    refs = [d.rewards.ref for d in wave.drawn] + [
        call.scores.ref for d in wave.drawn for call in d.scores
    ]
    _, late = ray.wait(refs, num_returns=len(refs), timeout=600, fetch_local=False)
    assert not late, f"{len(late)} of {len(refs)} are missing after 600 s"


def cpu_seconds() -> float:
    """The CPU seconds of this process, including those of Ray's threads."""
    times = os.times()
    return times.user + times.system


def show(row: dict) -> None:
    other = (
        f"{row['materialising_s']:16.2f}"
        if row["materialising_s"] is not None
        else f"{'does not fit':>16s}"
    )
    name = f"{row['sequences']} x {row['tokens']}, {row['support']}"
    print(
        f"{name:24s} {row['bytes'] / 1e9:6.2f} {row['driver_s']:9.3f} {row['driver_cpu_s']:7.3f} "
        f"{row['driver_bytes']:16.0f} {other}",
        flush=True,
    )


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(results["rows"], key=lambda row: row["bytes"])
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axis.loglog(
        [r["bytes"] / 1e9 for r in rows],
        [r["driver_s"] for r in rows],
        "o",
        label="driver holds references",
    )
    fetching = [r for r in rows if r["materialising_s"] is not None]
    axis.loglog(
        [r["bytes"] / 1e9 for r in fetching],
        [r["materialising_s"] for r in fetching],
        "s",
        label="driver materialises (one node)",
    )
    axis.axhline(
        results["target_s"],
        color="black",
        linestyle="dashed",
        label=f"target {results['target_s']:.0f} s",
    )
    axis.set_xlabel("GB of rollouts and scores in the batch")
    axis.set_ylabel("s in the driver")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
