"""Runs the quickstart with real workers: sync and pipelined in turns, from the same weights."""

import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import ray

from benchmarks.stage import controller_of, settings_of, trained_by
from hybridrl.data.prompts import PromptSource
from hybridrl.launch.preparation import prepare_prompts
from hybridrl.runtime.cluster import Cluster
from hybridrl.runtime.ray_connection import connect
from hybridrl.runtime.workers import Workers, place_workers, start_workers
from hybridrl.settings.run import RunSettings
from hybridrl.types import Prompt

COMMON = ["train.lr=5e-4", "train.lr_warmup_steps=0", "train.lr_end=null"]
REPORTED = (
    "reward/mean",
    "policy/staleness_mean",
    "policy/staleness_max",
    "controller/materialized_bytes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """Running workers with a certain number of threads."""

    settings: RunSettings
    workers: Workers


@dataclass(slots=True, kw_only=True)
class Turns:
    """The results of the turns of one variant, one entry a turn."""

    # the time of a turn divided by its number of steps, including the first and the last step
    step_s: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)  # on held-out problems after the turn
    rows: list[list[dict[str, float]]] = field(default_factory=list)

    def summary(self) -> dict:
        rows = [row for turn in self.rows for row in turn]
        results = {"step_s": self.step_s, "accuracy_after": self.accuracy}
        for key in REPORTED:
            results[key] = statistics.fmean(row[key] for row in rows)
        results["policy/staleness_max"] = max(row["policy/staleness_max"] for row in rows)
        results["reward_last_5"] = statistics.fmean(
            row["reward/mean"] for turn in self.rows for row in turn[-5:]
        )
        results["workers_busy_s"] = statistics.median(busy_s(row) for row in rows)
        results["median_step_s"] = statistics.median(row["time/step_s"] for row in rows)
        return results


def busy_s(row: dict[str, float]) -> float:
    """The seconds of a sync step in which some worker was busy; the rest is controller and Ray.

    The step has one chunk: scoring and rewards begin together after sampling, so the longer of both
    counts, and all other phases follow one after the other. Reward workers do not measure their
    time; the time that the controller waited for them is used instead.
    """
    judged = max(row["time/scorers_busy_s"], row["time/reward_s"])
    return row["time/response_s_max"] + judged + row["time/learner_busy_s"] + row["time/sync_s"]


def compare_schedules(steps: int, turns: int) -> dict:
    """Run `turns` turns of `steps` steps of each variant, interleaved; returns all results.

    Each turn begins with the weights and the optimizer's state after the same first step.
    """
    connect(settings_of())
    try:
        with tempfile.TemporaryDirectory(prefix="hybridrl-bench-") as folder:
            return in_turns(steps, turns, Path(folder))
    finally:
        ray.shutdown()


def in_turns(steps: int, turns: int, folder: Path) -> dict:
    prompts, heldout = prepare_prompts(settings_of())
    grounds = {threads: ground(threads, folder) for threads in (2, 1)}
    first = controller_of(grounds[2].settings, grounds[2].workers, prompts, folder, heldout)
    first.step()
    first.learner.begin_save(str(folder))()
    before = first.evaluate()["eval/accuracy"]
    variants = {
        f"{schedule}, {threads} thread{'s' * (threads > 1)} a worker": (schedule, grounds[threads])
        for schedule in ("sync", "pipelined")
        for threads in (2, 1)
    }
    results = {name: Turns() for name in variants}
    for turn in range(1 + turns):  # the first one warms up
        for name, (schedule, on) in variants.items():
            take_turn(
                results[name] if turn else Turns(),
                schedule,
                on,
                steps if turn else 3,
                prompts,
                heldout,
                folder,
            )
    return report({name: seen.summary() for name, seen in results.items()}, before, steps)


def ground(threads: int, folder: Path) -> Ground:
    settings = settings_of(*COMMON, f"cluster.threads_per_worker={threads}", "train.steps=1")
    cluster = Cluster(settings).__enter__()
    slots = place_workers(settings, cluster)
    log_dir = str(folder / f"logs-{threads}")
    return Ground(
        settings=settings,
        workers=start_workers(settings, cluster, slots, log_dir),
    )


def take_turn(
    turns: Turns,
    schedule: str,
    on: Ground,
    steps: int,
    prompts: list[Prompt],
    heldout: list[Prompt],
    folder: Path,
) -> None:
    settings = settings_of(*COMMON, f"schedule={schedule}", f"train.steps={steps}")
    on.workers.learner.load_state(str(folder), 1)
    controller = controller_of(settings, on.workers, prompts, folder, heldout)
    started = time.perf_counter()
    rows = [controller.step() for _ in range(steps)]
    turns.step_s.append((time.perf_counter() - started) / steps)
    drawn = PromptSource(prompts, settings.run.seed).next_batch(
        steps * settings.train.prompts_per_step
    )
    assert sorted(trained_by(controller)) == sorted(p.uid for p in drawn), (
        "a prompt was lost or came twice"
    )
    turns.rows.append(rows)
    turns.accuracy.append(controller.evaluate()["eval/accuracy"])


def report(variants: dict[str, dict], before: float, steps: int) -> dict:
    best = min(
        statistics.median(v["step_s"]) for name, v in variants.items() if name.startswith("sync")
    )
    print(f"\nquickstart on this CPU, {steps} steps a turn, held-out accuracy before {before:.1%}")
    print(
        f"{'':34s} {'s/step':>7s} {'best sync/it':>12s} {'accuracy':>9s} {'reward':>7s} "
        f"{'staleness':>10s}"
    )
    for name, v in variants.items():
        seconds = statistics.median(v["step_s"])
        accuracy = statistics.fmean(v["accuracy_after"])
        age = f"{v['policy/staleness_mean']:.2f}, <= {v['policy/staleness_max']:.0f}"
        print(
            f"{name:34s} {seconds:7.3f} {best / seconds:12.3f} {accuracy:9.1%} "
            f"{v['reward_last_5']:7.3f} {age:>10s}"
        )
    for name, v in variants.items():
        if name.startswith("sync"):
            share = 1 - v["workers_busy_s"] / v["median_step_s"]
            print(
                f"{name}: {share:.1%} of a step is not workers' time (target 5 %: "
                f"{'reached' if share <= 0.05 else 'MISSED'})"
            )
            v["controller_share"] = share
    return {"steps": steps, "accuracy_before": before, "variants": variants}
