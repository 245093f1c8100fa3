"""Compares the plan with real workers: peak memory and bytes of the shipped models on CPUs.

Each worker runs in its own process, on sequences as long as the plan assumes. The measured memory
is the peak of resident memory less the size after imports, or that of the tensors on a GPU
(`tools/gpu_proof`). The constants of the plan were fitted to the tiny model; SmolLM2 tests them.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hybridrl.core.free_port import free_port
from hybridrl.models.arithmetic import with_arithmetic
from hybridrl.planning.edges import TOKEN_COLUMNS, checkpoint_bytes, score_bytes, weight_bytes
from hybridrl.planning.plan import GIB, make_plan
from hybridrl.runtime.worker_env import worker_env
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings

BASE = (
    "run.dir=bench",
    "tracking.wandb=disabled",
    "train.products=model",
    "checkpoint.background=false",  # so that no copy of the state is part of the measured memory
)
TINY = ("experiment=quickstart",)
SMOLLM2 = (
    "experiment=smollm2_arithmetic",
    "algorithm=hybrid",
    "train.prompts_per_step=4",
    "train.samples_per_prompt=4",
    "train.max_tokens_per_micro_batch=1024",
)
LIMIT_S = 540.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kind of worker under some settings."""

    name: str
    worker: str  # learner, scorer or engine
    overrides: tuple[str, ...]
    device: str = "cpu"

    @property
    def all_overrides(self) -> list[str]:
        return [*BASE, f"cluster.device={self.device}", *self.overrides]

    @property
    def settings(self) -> RunSettings:
        return with_arithmetic(load_config(self.all_overrides), None)


def dtype_of(name: str, teacher: str) -> tuple[str, ...]:
    return (f"model.dtype={name}", f"++teachers.{teacher}.dtype={name}")


def cases() -> Iterator[Case]:
    for model, of_model, teacher in (("tiny", TINY, "main"), ("SmolLM2", SMOLLM2, "initial")):
        for dtype in ("float32", "bfloat16"):
            settings = (*of_model, *dtype_of(dtype, teacher))
            for stage, ranks in ((1, 1), (3, 2)):
                zero = (f"learner.zero_stage={stage}", f"learner.ranks={ranks}")
                name = f"{model} {dtype} ZeRO {stage}, {ranks} rank{'s' * (ranks > 1)}"
                yield Case(name=name, worker="learner", overrides=(*settings, *zero))
            for worker in ("scorer", "engine"):
                yield Case(name=f"{model} {dtype}", worker=worker, overrides=settings)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", help="cases whose name and worker contain this")
    parser.add_argument(
        "--measured", type=Path, help="compare the measurements of this file, and run nothing"
    )


def run(options: argparse.Namespace) -> dict:
    earlier = json.loads(options.measured.read_text())["measured"] if options.measured else None
    found: dict[str, dict[str, int]] = {}
    rows = {}
    for case in cases():
        name = f"{case.worker}, {case.name}"
        if options.only not in name or (earlier is not None and name not in earlier):
            continue
        found[name] = measured(case) if earlier is None else earlier[name]
        rows[name] = compared(case, found[name])
        for what, (planned, seen) in rows[name].items():
            print(f"{name:42s} {what:12s} {planned:>14,d} {seen:>14,d} {planned / seen:6.2f}")
    return {"measured": found, "planned_and_measured": rows}


def compared(case: Case, found: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(planned, measured) bytes of the memory that this worker holds, and of what it sends or
    saves.
    """
    settings = case.settings
    plan = make_plan(settings, device=case.device, device_bytes=24 * GIB)
    sizes = plan.sizes
    teacher = plan.sizes.teachers[0]
    team = {"engine": "rollout", "scorer": f"scorer-{teacher.name}"}.get(case.worker, case.worker)
    rows = {"peak": (plan.peak(team), found["peak"] - found["imports"])}
    if case.worker == "learner":
        rows["weights"] = (weight_bytes(sizes), found["weights"])
        ranks = settings.learner.ranks
        rows["checkpoint"] = (checkpoint_bytes(sizes) // ranks, found["checkpoint"])
    if case.worker == "scorer":
        rows["scores"] = (score_bytes(sizes, teacher), found["scores"])
    if case.worker == "engine":
        planned = found["tokens"] * TOKEN_COLUMNS + (found["sequences"] + 1) * 8
        rows["responses"] = (planned, found["rollouts"])
    return rows


def measured(case: Case) -> dict[str, int]:
    """Run planned_worker.py; returns the sizes that rank 0 prints.

    Raises:
        RuntimeError: rank 0 printed none.
    """
    settings = case.settings
    ranks = settings.learner.ranks if case.worker == "learner" else 1
    port = free_port()
    threads = max((os.cpu_count() or 1) // ranks, 1)
    env = os.environ | worker_env(threads, case.device, settings.model.dtype, take_turns=True)
    command = [sys.executable, "-m", "benchmarks.planned_worker", case.worker]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(port), *case.all_overrides],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    lines = [line for line in outputs[0].splitlines() if line.startswith("PLANNED ")]
    if not lines:
        raise RuntimeError(f"{case.name}: {outputs[0][-2000:]}")
    return json.loads(lines[0].removeprefix("PLANNED "))
