"""Measures the gain of schedule=pipelined with a device for each phase, and on this machine's CPU.

The devices are workers that only wait. The gain of rollout.oversample is also measured, for a few
responses that take much longer than most.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.fake_workers import Work
from benchmarks.stage import Stage, settings_of, trained_by

WEIGHTS = {"pack_s": 0.03, "load_s": 0.02}
MIXES = {
    "engine slowest": Work(generate_s=0.8, score_s=0.3, learn_s=0.4, **WEIGHTS),
    "scorer slowest": Work(generate_s=0.3, score_s=0.8, learn_s=0.4, **WEIGHTS),
    "learner slowest": Work(generate_s=0.3, score_s=0.4, learn_s=0.8, **WEIGHTS),
    "all alike": Work(generate_s=0.6, score_s=0.6, learn_s=0.6, **WEIGHTS),
}
TAIL = Work(generate_s=0.3, spread=1.0, score_s=0.1, learn_s=0.2, **WEIGHTS)
OVERSAMPLE = (0, 0.25)
PROMPTS = 16
WARM_UP = 3
DRAIN = 2
SIZE = [f"train.prompts_per_step={PROMPTS}", "train.samples_per_prompt=2"]
TARGET = 1.05
"""Bound on the seconds per step over max(g, s, t) + w."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=int, default=8, help="timed steps of each mix; 0 leaves the waits out"
    )
    parser.add_argument(
        "--tail-steps",
        type=int,
        default=20,
        help="timed steps of each turn of the heavy tail; 0 leaves it out",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every wait")
    parser.add_argument(
        "--real-steps",
        type=int,
        default=12,
        help="steps of each turn of the quickstart on the CPU; 0 leaves it out",
    )
    parser.add_argument(
        "--turns", type=int, default=2, help="turns of each variant of the quickstart"
    )


def scaled(work: Work, scale: float) -> Work:
    g, s, t, _ = work.phases
    return replace(
        work,
        generate_s=g * scale,
        score_s=s * scale,
        learn_s=t * scale,
        pack_s=work.pack_s * scale,
        load_s=work.load_s * scale,
    )


def step_seconds(stage: Stage, work: Work, steps: int, *overrides: str) -> float:
    """The mean seconds of `steps` steps after a warm-up. The run has DRAIN more steps at its end,
    in which nothing is drawn ahead any more.
    """
    return timed_steps(stage, work, steps, *overrides)[0]


def timed_steps(
    stage: Stage, work: Work, steps: int, *overrides: str
) -> tuple[float, list[dict[str, float]]]:
    """The mean seconds of a timed step, and the rows of metrics of the timed steps.

    Raises:
        AssertionError: a prompt was lost or used twice.
    """
    stage.assign(work)
    controller = stage.controller(
        settings_of(*SIZE, f"train.steps={WARM_UP + steps + DRAIN}", *overrides)
    )
    ends = []
    rows = []
    for _ in range(WARM_UP + steps + DRAIN):
        rows.append(controller.step())
        ends.append(time.perf_counter())
    trained = trained_by(controller)
    source = controller.prompts
    come_again = {p.uid for p in source.returned}
    handed_out = source.epoch * len(source.prompts) + source.position
    assert len(trained) == len(ends) * PROMPTS, "a step trained on too few"
    assert len({*trained, *come_again}) == len(trained) + len(come_again) == handed_out, (
        "a prompt was lost or came twice"
    )
    return (ends[WARM_UP + steps - 1] - ends[WARM_UP - 1]) / steps, rows[WARM_UP : WARM_UP + steps]


def run(options: argparse.Namespace) -> dict:
    results: dict = {"target": TARGET}
    if options.steps or options.tail_steps:
        with Stage(settings_of(*SIZE)) as stage:
            if options.steps:
                results["waits"] = waits(stage, options)
            if options.tail_steps:
                results["tail"] = tail(stage, options.tail_steps, options.scale)
    if options.real_steps:
        from benchmarks.quickstart import compare_schedules  # importing it takes seconds

        results["quickstart"] = compare_schedules(options.real_steps, options.turns)
    return results


def waits(stage: Stage, options: argparse.Namespace) -> dict:
    """Compare the seconds per step of each mix and schedule with g + s + t + w and max(g, s, t)
    + w.
    """
    rows = {}
    print(
        f"{'seconds per step':18s} {'sync':>7s} {'g+s+t+w':>8s} {'streamed':>9s} "
        f"{'pipelined':>10s} {'max+w':>7s} {'ratio':>6s}  gain"
    )
    for name, mix in MIXES.items():
        work = scaled(mix, options.scale)
        *phases, w = work.phases
        one_chunk = f"rollout.groups_per_chunk={PROMPTS}"
        chunk_each = "rollout.groups_per_chunk=1"
        few = max(options.steps // 3, 1)
        sync, streamed = (step_seconds(stage, work, few, size) for size in (one_chunk, chunk_each))
        pipelined = step_seconds(stage, work, options.steps, one_chunk, "schedule=pipelined")
        limit = max(phases) + w
        rows[name] = {
            "phases": work.phases,
            "sync": sync,
            "sum": sum(work.phases),
            "streamed": streamed,
            "pipelined": pipelined,
            "limit": limit,
            "ratio": pipelined / limit,
        }
        verdict = "reached" if pipelined / limit <= TARGET else "MISSED"
        print(
            f"{name:18s} {sync:7.3f} {sum(work.phases):8.3f} {streamed:9.3f} "
            f"{pipelined:10.3f} {limit:7.3f} {pipelined / limit:6.3f}  "
            f"{sync / pipelined:.2f}x  target {TARGET}: {verdict}"
        )
    return rows


def tail(stage: Stage, steps: int, scale: float) -> list[dict[str, float]]:
    """The seconds of a step and of its responses, without and with rollout.oversample.

    The times of groups are log-normal with p95 / median = 5; a group that is drawn again takes a
    new random time. More groups do not slow the others, so the cost of rollout.oversample for a
    fully used engine is not included.
    """
    results = []
    for share in OVERSAMPLE:
        how = ("rollout.groups_per_chunk=1", f"rollout.oversample={share}")
        step_s, rows = timed_steps(stage, scaled(TAIL, scale), steps, *how)
        keys = {
            "p50": "time/response_s_p50",
            "p95": "time/response_s_p95",
            "max": "time/response_s_max",
            "late": "rollout/late_frac",
        }
        seen = {name: statistics.fmean(row[key] for row in rows) for name, key in keys.items()}
        results.append({"oversample": share, "step": step_s, **seen})
        times = "  ".join(f"{name} {seen[name]:.3f}" for name in ("p50", "p95", "max"))
        print(
            f"heavy tail, rollout.oversample={share:<4}: step {step_s:.3f} s, responses "
            f"{times}, {seen['late']:.0%} cancelled"
        )
    print(
        f"rollout.oversample={OVERSAMPLE[1]} makes a step "
        f"{results[0]['step'] / results[1]['step']:.2f}x as fast"
    )
    return results


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = {"waits": draw_waits, "tail": draw_tail, "quickstart": draw_quickstart}
    parts = {name: part for name, part in parts.items() if name in results}
    figure, axes = pyplot.subplots(
        1, len(parts), figsize=(5.5 * len(parts), 4), squeeze=False, layout="constrained"
    )
    for axis, (name, part) in zip(axes[0], parts.items(), strict=True):
        part(axis, results[name])
        axis.set_ylabel("s per step")
    figure.savefig(path, dpi=110)


def draw_waits(axis, rows: dict) -> None:
    for i, kind in enumerate(("sync", "streamed", "pipelined")):
        axis.bar(
            [x + (i - 1) * 0.27 for x in range(len(rows))],
            [row[kind] for row in rows.values()],
            0.27,
            label=kind,
        )
    for x, row in enumerate(rows.values()):
        axis.hlines(
            row["limit"],
            x - 0.42,
            x + 0.42,
            colors="black",
            linestyles="dashed",
            label=None if x else "max(g, s, t) + w",
        )
    axis.set_xticks(range(len(rows)), rows, fontsize=8)
    axis.set_title("A device for each phase (workers that wait)", fontsize=10)
    axis.margins(y=0.35)
    axis.legend(fontsize=8, ncols=2)


def draw_tail(axis, rows: list[dict[str, float]]) -> None:
    kinds = ("p50", "p95", "max", "step")
    for i, row in enumerate(rows):
        places = [x + (i - 0.5) * 0.4 for x in range(len(kinds))]
        axis.bar(
            places,
            [row[kind] for kind in kinds],
            0.4,
            label=f"rollout.oversample={row['oversample']}",
        )
    axis.set_xticks(
        range(len(kinds)), [*(f"response {kind}" for kind in kinds[:3]), "step"], fontsize=8
    )
    axis.set_title("A heavy tail of responses (workers that wait)", fontsize=10)
    axis.legend(fontsize=8)


def draw_quickstart(axis, results: dict) -> None:
    variants = results["variants"]
    axis.bar(
        range(len(variants)),
        [statistics.median(v["step_s"]) for v in variants.values()],
        color="tab:gray",
    )
    axis.set_xticks(
        range(len(variants)), [name.replace(", ", ",\n") for name in variants], fontsize=8
    )
    axis.set_title("Quickstart on one CPU for all", fontsize=10)
