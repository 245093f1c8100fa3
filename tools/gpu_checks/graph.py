"""Whole runs of the quickstart: on one GPU, on several, and on two nodes."""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from gpu_checks.check import Check, figure, holds, not_run, within
from gpu_checks.ground import Ground
from gpu_checks.rounding import GAP_REASON, largest, logprob_gap, of_layers

LIMIT_S = 900.0  # timeout of one run
STEPS = 5
STEPS_ON_CPU = 2
SYNC_S = 1.0
"""Bound on a weight sync of the tiny model, 3 MB. A sync takes longer if NCCL uses sockets or a
rank waits.
"""
GAPS = {
    "policy/logprob_gap": "learner against engine, sampled tokens",
    "policy/probe_gap": "learner against engine, right after each sync",
}
ON_ONE_GPU = ("cluster.colocate=true", "rollout.gpu_memory_utilization=0.3")
"""Settings with which learner, engine and teacher share one GPU."""
IN_TURNS = (
    "cluster.colocate=true",
    "cluster.take_turns=true",
    "rollout.gpu_memory_utilization=0.7",
    "checkpoint.every=2",
)
"""Settings with which learner, engine and teacher share one GPU in turns: the engine sleeps while
the learner works. A memory share of 0.7 would be refused without turns.
"""
ON_SEVERAL = (
    "rollout.weight_transfer=nccl",
    "rollout.max_logprob_gap=0.1",  # the experiment's own is for float32
    "learner.ranks=2",
    "learner.zero_stage=3",
    "model.dtype=bfloat16",
    "checkpoint.every=2",
)
"""Settings of a run on four GPUs: two learner ranks, one engine and one teacher."""
ONE_LOST = ("learner.ranks=1", "rollout.engines=2")
"""Changes of ON_SEVERAL: one rank and two engines, of which one dies in its first wave."""
DIVIDED = ("learner.ranks=1", "++teachers.main.devices=2")
"""Changes of ON_SEVERAL: one rank, and a teacher that is divided over two GPUs."""
IN_ENGINE = (
    "learner.ranks=1",
    "++teachers.main.engine={tensor_parallel_size: 2}",
    "++teachers.main.evidence=drawn",
)
"""Changes of ON_SEVERAL: one rank, and a vLLM engine over two GPUs that scores for the teacher."""
ADAPTERS = ("lora.rank=8", "lora.dropout=0.1")
TRAINS_JUDGE = (
    "algorithm=reward_model",
    "+data.options.responses=pair",
    "model.dtype=bfloat16",
    "checkpoint.export=true",
    "eval.teacher=false",
)
HAS_JUDGE = ("algorithm=rloo", "reward.gpus=1", "+reward.functions.judge.function=reward_model")
"""Changes of ON_SEVERAL: a reward model with its own GPU instead of a teacher."""
GPUS = 4
WITHOUT_EVALUATION = ("eval.every=0", "eval.teacher=false", "checkpoint.every=0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The exit status, output and metrics of a run."""

    name: str
    status: int  # the exit status of its process; -1: it was stopped after LIMIT_S
    output: str
    rows: list[dict[str, float]]  # the rows of metrics.jsonl


def object_store(ground: Ground) -> Iterator[Check]:
    """Check a run on one GPU, or on a CPU, whose weights go through Ray's object store."""
    name = "object_store"
    if ground.on_gpu:
        run = train(ground, name, STEPS, *ON_ONE_GPU, "rollout.weight_transfer=object_store")
        yield from run_checks(run, STEPS, "float32", "object_store")
    else:
        run = train(ground, name, STEPS_ON_CPU, *WITHOUT_EVALUATION)
        yield from run_checks(run, STEPS_ON_CPU, "float32", "object_store")


def ipc(ground: Ground) -> Iterator[Check]:
    """Check a run on one GPU whose weights are sent by CUDA IPC."""
    run = train(ground, "ipc", STEPS, *ON_ONE_GPU, "rollout.weight_transfer=ipc")
    yield from run_checks(run, STEPS, "float32", "ipc")


def turns(ground: Ground) -> Iterator[Check]:
    """Check the runs of object_store and ipc with an engine that sleeps while the learner works."""
    transfers = ("object_store", "ipc") if ground.on_gpu else ("object_store",)
    for transfer in transfers:
        name = f"turns-{transfer}"
        chosen = (*IN_TURNS, f"rollout.weight_transfer={transfer}")
        if ground.on_gpu:
            run = train(ground, name, STEPS, *chosen)
            yield from run_checks(run, STEPS, "float32", transfer)
            yield same_first_loss(ground, run, transfer, "float32")
        else:
            run = train(ground, name, STEPS_ON_CPU, *chosen, *WITHOUT_EVALUATION)
            yield from run_checks(run, STEPS_ON_CPU, "float32", transfer)
        rows = [row["time/turn_s"] for row in run.rows if "time/turn_s" in row]
        yield figure(f"{name}: turns", median(rows) if rows else math.nan, "s", "median of a step")


def nccl(ground: Ground) -> Iterator[Check]:
    """Check a run on several GPUs, then the same command again, which has nothing left to do."""
    run = train(ground, "nccl", STEPS, *ON_SEVERAL)
    yield from run_checks(run, STEPS, "bfloat16", "nccl")
    again = train(ground, "nccl", STEPS, *ON_SEVERAL, again=True)
    yield holds(
        "nccl: the same command continues after the last step",
        again.status == 0 and f"after step {STEPS} of {STEPS}" in again.output,
        f"it prints: {last_line(again.output)}",
    )


def lost_engine(ground: Ground) -> Iterator[Check]:
    """Check the run of nccl with two engines, of which one dies when it begins to sample. The NCCL
    group is formed again, first without this engine and then with its replacement.
    """
    name = "nccl-lost-engine"
    once = ground.root / "an_engine_was_killed"
    once.unlink(missing_ok=True)
    fault = f"rollout.generate:do=kill:once={once}"
    run = train(ground, name, STEPS, *ON_SEVERAL, *ONE_LOST, fault=fault)
    yield from run_checks(run, STEPS, "bfloat16", "nccl")
    yield holds(
        f"{name}: another engine took its place",
        "serves again" in run.output,
        "by the line that a run prints when an engine has joined",
    )


def teachers(ground: Ground) -> Iterator[Check]:
    """Check the run of nccl with a teacher over two GPUs: by FSDP2, then in a vLLM engine."""
    run = train(ground, "nccl-divided-teacher", STEPS, *ON_SEVERAL, *DIVIDED)
    yield from run_checks(run, STEPS, "bfloat16", "nccl")
    yield same_first_loss(ground, run)
    run = train(ground, "nccl-teacher-in-engine", STEPS, *ON_SEVERAL, *IN_ENGINE)
    yield from run_checks(run, STEPS, "bfloat16", "nccl")


def adapters(ground: Ground) -> Iterator[Check]:
    """Check the run of nccl with adapters that are sent merged into the weights, then alone."""
    run = train(ground, "nccl-adapters", STEPS, *ON_SEVERAL, *ADAPTERS)
    yield from run_checks(run, STEPS, "bfloat16", "nccl")
    alone = ("lora.sync=adapter", "rollout.weight_transfer=auto")
    run = train(ground, "adapters-alone", STEPS, *ON_SEVERAL, *ADAPTERS, *alone)
    yield from run_checks(run, STEPS, "bfloat16", "object_store")


def judge(ground: Ground) -> Iterator[Check]:
    """Train a reward model, then check a run that learns from it, with the model on its own GPU."""
    trained = train(ground, "reward-model", STEPS_ON_CPU, *TRAINS_JUDGE)
    yield holds(
        "reward-model: ends without an error",
        trained.status == 0,
        f"status {trained.status}, it prints: {last_line(trained.output)}",
    )
    folder = ground.root / "runs" / "reward-model" / "export" / f"step_{STEPS_ON_CPU:06d}"
    options = f"+reward.functions.judge.options={{path: {folder}, dtype: bfloat16}}"
    run = train(ground, "nccl-judge", STEPS, *ON_SEVERAL, *HAS_JUDGE, options)
    yield from run_checks(run, STEPS, "bfloat16", "nccl")
    errors = [row["reward/error_rate"] for row in run.rows if "reward/error_rate" in row]
    yield within(
        "nccl-judge: failed calls of the reward model",
        largest(errors or [math.nan]),
        high=0,
        reason="each response is scored on the GPU of the reward worker",
    )


def offload(ground: Ground) -> Iterator[Check]:
    """Check the run of nccl with a part of the learner's state in host memory."""
    for what in ("optimizer", "parameters"):
        name = f"nccl-offload-{what}"
        run = train(ground, name, STEPS, *ON_SEVERAL, f"learner.offload={what}")
        yield from run_checks(run, STEPS, "bfloat16", "nccl")
        yield same_first_loss(ground, run)


def flash_attention(ground: Ground) -> Iterator[Check]:
    """Check the run of nccl with flash-attn in learner and scorer."""
    name = "nccl-flash-attention"
    run = train(ground, name, STEPS, *ON_SEVERAL, "model.attention=flash_attention_2")
    yield from run_checks(run, STEPS, "bfloat16", "nccl")
    yield same_first_loss(ground, run)


def two_nodes(ground: Ground) -> Iterator[Check]:
    """Check the run of nccl with the workers of each group on different nodes."""
    nodes = gpus_of_nodes()
    if len(nodes) < 2 or sum(nodes) < GPUS:
        yield not_run(
            "two nodes",
            f"needs 2 nodes with {GPUS} GPUs in all; the cluster at RAY_ADDRESS has nodes with "
            f"{', '.join(map(str, nodes)) or 'no'} GPUs",
        )
        return
    assert ground.shared is not None, "steps.missing requires it"
    run = train(
        ground,
        "two-nodes",
        STEPS,
        *ON_SEVERAL,
        "cluster.spread=true",
        folder=Path(ground.shared).expanduser() / "gpu_proof",
    )
    yield from run_checks(run, STEPS, "bfloat16", "nccl")


def gpus_of_nodes() -> list[int]:
    """The number of GPUs of each node with GPUs in the Ray cluster at RAY_ADDRESS."""
    import ray

    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    counts = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    ray.shutdown()
    return [count for count in counts if count]


# -- runs ------------------------------------------------------------------------------------------


def train(
    ground: Ground,
    name: str,
    steps: int,
    *overrides: str,
    folder: Path | None = None,
    again: bool = False,
    fault: str = "",
) -> Run:
    """Run `hybridrl train experiment=quickstart` in its own process.

    Args:
        folder: the folder for its run.dir; None: the folder of the proof.
        again: continue the run of this name; False: remove a run that an earlier call left.
        fault: a failpoint in the form of hybridrl.core.failpoints.
    """
    run_dir = (folder or ground.root) / "runs" / name
    if not again:
        shutil.rmtree(run_dir, ignore_errors=True)
    arguments = [
        "experiment=quickstart",
        f"run.dir={run_dir}",
        f"cluster.device={ground.device}",
        f"train.steps={steps}",
        "tracking.wandb=disabled",
        *overrides,
    ]
    log = ground.root / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        start = file.tell()
        status = completed(["train", *arguments], file.fileno(), fault)
    output = log.read_text(errors="replace")[start:]
    return Run(name=name, status=status, output=output, rows=metrics_of(run_dir))


def completed(arguments: Sequence[str], output: int, fault: str = "") -> int:
    """Run the command `hybridrl`; returns its exit status, or -1 if it was stopped after
    LIMIT_S.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "hybridrl.cli", *arguments],
        stdout=output,
        stderr=subprocess.STDOUT,
        env=os.environ | ({"HYBRIDRL_FAILPOINTS": fault} if fault else {}),
    )
    try:
        return process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # upon which the run ends its workers
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        return -1


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    from hybridrl.tracking.jsonl import METRICS, read_metrics

    return read_metrics(run_dir) if (run_dir / METRICS).is_file() else []


# -- checks ----------------------------------------------------------------------------------------


def run_checks(run: Run, steps: int, dtype: str, transfer: str) -> Iterator[Check]:
    """The checks of every run: all steps were made, weights arrive, and no older ones are used."""
    yield holds(
        f"{run.name}: ends without an error",
        run.status == 0,
        f"status {run.status}, it prints: {last_line(run.output)}",
    )
    rows = [row for row in run.rows if "policy/logprob_gap" in row]
    yield within(
        f"{run.name}: steps", len(rows), low=steps, high=steps, reason="train.steps of the command"
    )
    if not rows:
        return
    yield holds(
        f"{run.name}: weights are sent by {transfer}",
        f"weights are sent by {transfer};" in run.output,
        "by the line that a run prints when its workers are ready",
    )
    for key, what in GAPS.items():
        yield within(
            f"{run.name}: {what}",
            largest([row.get(key, math.nan) for row in rows]),
            high=logprob_gap(dtype),
            unit="nats",
            reason=f"the largest of {steps} steps; {GAP_REASON}",
        )
    yield within(
        f"{run.name}: versions between sampling and learning",
        largest([row["policy/staleness_max"] for row in rows]),
        high=0,
        reason="schedule=sync samples with the newest weights",
    )
    sync_s = median(row["time/sync_s"] for row in rows)
    if "time/turn_s" in rows[0]:  # then time/sync_s includes the turns
        yield figure(f"{run.name}: weight sync", sync_s, "s", "median, turns included")
    else:
        yield within(
            f"{run.name}: weight sync",
            sync_s,
            high=SYNC_S,
            unit="s",
            reason="of 3 MB; NCCL over sockets, or a rank that waits, takes longer",
        )
    step_s = median(row["time/step_s"] for row in rows)
    yield figure(f"{run.name}: step", step_s, "s", "median")


def same_first_loss(
    ground: Ground, run: Run, other: str = "nccl", dtype: str = "bfloat16"
) -> Check:
    """The check that the first loss, before any update, equals that of the run `other`."""
    name = f"{run.name}: first loss, as of {other}"
    losses = [
        [row["train/loss"] for row in rows if "train/loss" in row]  # rows of evaluations have none
        for rows in (run.rows, metrics_of(ground.root / "runs" / other))
    ]
    if not all(losses):
        return not_run(name, "needs both runs")
    (found, *_), (expected, *_) = losses
    return within(
        name,
        abs(found - expected) / abs(expected),
        high=of_layers(dtype),
        unit="relative error",
        reason=f"the same weights, seeds and responses; 4 roundings to {dtype} in each sublayer",
    )


def last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "nothing"
