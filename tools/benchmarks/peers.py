"""Compares a whole step on the CPU with TRL 1.16's DistillationTrainer and GRPOTrainer.

All use the same models, prompts, forced lengths, learning rate and threads, and process the batch
in one pass; other settings are the defaults of each. Each row is a process, and the rows take
turns: ours (one step with both signals), ours-distillation, ours-reward, TRL's two trainers,
bare-loop (Hugging Face generation and our loss in plain torch) and floor (lower bounds on the parts
of a step). TRL needs its own interpreter: python -m venv trl && trl/bin/pip install trl==1.16.0,
then --trl-python trl/bin/python.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from benchmarks import watched
from benchmarks.peer_inputs import PAIRS, Pair, endless, without_end, write_problems

HERE = Path(__file__).parent
PROMPTS = 8
SAMPLES = 4
LENGTH = 64
PHASES = ("rollout", "score", "reward", "learn", "sync")
OURS = {"ours": "hybrid", "ours-distillation": "opd_full", "ours-reward": "dr_grpo"}
TRL = {"trl-distillation": "distillation", "trl-grpo": "grpo"}
BARE = "bare-loop"
FLOOR = "floor"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trl-python", help="an interpreter with trl 1.16; without it TRL's rows are left out"
    )
    parser.add_argument("--models", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("bfloat16", "float32"),
        default=[],
        help="dtypes of the models besides that of each pair, in turn; each side is then also "
        "compared in the dtype in which it is fastest",
    )
    parser.add_argument("--rows", nargs="+", choices=(*OURS, *TRL, BARE, FLOOR), help="only these")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each row, in turn")
    parser.add_argument(
        "--steps", type=int, default=3, help="counted steps of each process, after --warm-up"
    )
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--under", default="", help='a command in front of each process, e.g. "taskset -c 0,1"'
    )


def run(options: argparse.Namespace) -> dict:
    rows = options.rows or [FLOOR, *(TRL if options.trl_python else ()), BARE, *OURS]
    results = {}
    for name in options.models:
        with tempfile.TemporaryDirectory(prefix="peers-") as folder:
            benches = benches_of(name, Path(folder), options)
            runs: dict[str, dict[str, list[dict]]] = {
                label: {row: [] for row in rows} for label in benches
            }
            for _ in range(options.rounds):
                for label, bench in benches.items():
                    for row in rows:
                        runs[label][row].append(bench.measure(row))
                        print(f"{label:16s} {row:24s} {describe(runs[label][row][-1])}", flush=True)
            for label in benches:
                measured = summary(runs[label], options.warm_up)
                results[label] = {"runs": runs[label], "summary": measured}
                report(label, measured)
            report_best(name, {label: results[label]["summary"] for label in benches})
    shape = {"prompts": PROMPTS, "samples": SAMPLES, "forced_tokens": LENGTH}
    return {
        "shape": shape
        | {key: getattr(options, key) for key in ("rounds", "steps", "warm_up", "threads")},
        "models": results,
    }


def benches_of(name: str, folder: Path, options: argparse.Namespace) -> dict[str, "Bench"]:
    """A bench for the pair of models in its own dtype, named after the pair, and one for each other
    dtype of --dtypes.
    """
    pair = PAIRS[name]
    pairs = {name: pair} | {
        f"{name} {dtype}": replace(pair, dtype=dtype)
        for dtype in options.dtypes
        if dtype != pair.dtype
    }
    return {label: Bench(folder / p.dtype, p, options) for label, p in pairs.items()}


class Bench:
    """Runs each row with one pair of models, in a folder."""

    def __init__(self, folder: Path, pair: Pair, options: argparse.Namespace) -> None:
        folder.mkdir()
        self.folder = folder
        self.pair = pair
        self.options = options
        self.student = endless(pair.student, folder / "student")
        self.teacher = endless(pair.teacher, folder / "teacher")
        self.own_student = without_end(self.student)
        self.own_teacher = without_end(self.teacher)
        self.problems = write_problems(folder, pair.instruction, PROMPTS)
        self.reward = f"{HERE / 'digit_reward.py'}:digit_share"
        self.steps = options.warm_up + options.steps
        self.order = folder / "order.json"
        self.order.write_text(json.dumps(self._order()))
        count = str(options.threads)
        self.env = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}

    def _order(self) -> dict:
        return {
            "work": str(self.folder / "trl"),
            "student": str(self.student),
            "teacher": str(self.teacher),
            "dtype": self.pair.dtype,
            "problems": str(self.problems),
            "reward": self.reward,
            "prompts": PROMPTS,
            "samples": SAMPLES,
            "max_new_tokens": LENGTH,
            "steps": self.steps,
            "lr": self.pair.lr,
            "betas": [0.9, 0.95],
            "threads": self.options.threads,
            "save": None,
        }

    def measure(self, row: str) -> dict:
        """Run the process of a row; returns its seconds per step, and its memory and CPU time."""
        if row in OURS:
            return self._ours(OURS[row])
        if row in TRL:
            return self._script(
                [self.options.trl_python, HERE / "trl_peer.py", TRL[row], self.order],
                {"PYTHONPATH": ""},
            )
        return self._script(
            [
                sys.executable,
                HERE / ("floor_peer.py" if row == FLOOR else "bare_peer.py"),
                self.order,
            ],
            {},
        )

    def _script(self, command: list, env: dict[str, str]) -> dict:
        seen = watched.run(
            [str(part) for part in command], under=self.options.under, env=self.env | env
        )
        return seen.printed() | process(seen)

    def _ours(self, algorithm: str) -> dict:
        run_dir = Path(tempfile.mkdtemp(prefix=f"{algorithm}-", dir=self.folder)) / "run"
        command = [
            sys.executable,
            "-m",
            "hybridrl.cli",
            "train",
            *self._settings(run_dir, algorithm),
        ]
        rows = run_dir / "metrics.jsonl"  # the first row belongs to no step

        def done():
            return len(rows.read_text().splitlines()) - 1 if rows.is_file() else -1

        seen = watched.run(
            command, under=self.options.under, env=self.env | {"RAY_ADDRESS": ""}, progress=done
        )
        lines = [json.loads(line) for line in rows.read_text().splitlines()]
        steps = [line for line in lines if line["train/step"] > 0]
        assert all(line["rollout/length_mean"] == LENGTH for line in steps), (
            "every response runs to the limit"
        )
        phases = {
            f"{phase}_s": [line[f"time/{phase}_s"] for line in steps] for phase in ("step", *PHASES)
        }
        phases["cpu_s"] = cpu_per_step(seen.cpu_at, self.steps)
        return (
            phases
            | {"logprob_gap": [line.get("policy/logprob_gap") for line in steps]}
            | process(seen)
        )

    def _settings(self, run_dir: Path, algorithm: str) -> list[str]:
        dtype = self.pair.dtype
        return [
            f"run.dir={run_dir}",
            f"algorithm={algorithm}",
            f"model.path={self.own_student}",
            f"model.dtype={dtype}",
            f"+teachers.main.path={self.own_teacher}",
            f"+teachers.main.dtype={dtype}",
            "data.task=records",
            f"data.path={self.problems}",
            f"data.heldout_path={self.problems}",
            "data.num_heldout=8",
            f"+reward.functions.digits.function={self.reward}",
            f"rollout.max_new_tokens={LENGTH}",
            "rollout.max_model_len=96",
            f"rollout.groups_per_chunk={PROMPTS}",
            f"train.steps={self.steps}",
            f"train.prompts_per_step={PROMPTS}",
            f"train.samples_per_prompt={SAMPLES}",
            f"train.lr={self.pair.lr}",
            "eval.every=0",
            "eval.teacher=false",
            "checkpoint.every=0",
            "checkpoint.export=false",
            "tracking.wandb=disabled",
            "cluster.device=cpu",
            f"cluster.threads_per_worker={self.options.threads}",
        ]


def process(seen: watched.Watched) -> dict:
    keep = ("peak_bytes", "others_cores", "wall_s")
    return {key: getattr(seen, key) for key in keep} | {
        "load": os.getloadavg()[0],
        "process_cpu_s": seen.cpu_s,
    }


def cpu_per_step(cpu_at: dict[int, float], steps: int) -> list[float]:
    """The CPU seconds of each step, with an error of up to half a second on each core.

    A step in which no measurement was taken gets an equal share of the time up to the next one.

    Args:
        cpu_at: CPU seconds of the process when a number of steps was first seen to be done.
    """
    results: list[float] = []
    for before, after in pairwise(step for step in sorted(cpu_at) if 0 <= step <= steps):
        results += [(cpu_at[after] - cpu_at[before]) / (after - before)] * (after - before)
    return results


def describe(results: dict) -> str:
    seconds = results.get("step_s") or results["engine_s"]
    memory = f"{results['peak_bytes'] / 2**30:.1f} GiB"
    memory += f", {results['others_cores']:.2f} cores busy elsewhere"
    return " ".join(f"{s:.2f}" for s in seconds) + f" s; {memory}"


def summary(runs: dict[str, list[dict]], warm_up: int) -> dict[str, dict]:
    """For each row: medians over the counted steps of all processes, rates, and the largest
    memory.
    """
    results: dict[str, dict] = {}
    for row, processes in runs.items():
        keys = [
            key
            for key in processes[0]
            if key.endswith("_s") and isinstance(processes[0][key], list)
        ]
        values = {
            key: statistics.median([s for p in processes for s in p[key][warm_up:]]) for key in keys
        }
        if row == FLOOR:
            values |= {
                key: statistics.median([p[key] for p in processes])
                for key, v in processes[0].items()
                if isinstance(v, int | float)
            }
        else:
            values |= {"tokens_per_s": PROMPTS * SAMPLES * LENGTH / values["step_s"]}
            if values.get("rollout_s"):
                values |= {"generated_per_s": PROMPTS * SAMPLES * LENGTH / values["rollout_s"]}
        results[row] = values | {"peak_bytes": max(p["peak_bytes"] for p in processes)}
    if BARE in results and (ours := next((row for row in OURS if row in results), None)):
        results["ours-hf-generation"] = with_hf_generation(results[ours], results[BARE])
    return results


def with_hf_generation(ours: dict, bare: dict) -> dict:
    """Our step if it used generate(): the times of engine and weight sync are replaced by that of
    the bare loop's generation. This is computed, not run.
    """
    step_s = ours["step_s"] - ours["rollout_s"] - ours["sync_s"] + bare["rollout_s"]
    other_phases = {key: ours[key] for key in ("score_s", "reward_s", "learn_s")}
    tokens = PROMPTS * SAMPLES * LENGTH
    return {
        "step_s": step_s,
        "rollout_s": bare["rollout_s"],
        **other_phases,
        "tokens_per_s": tokens / step_s,
        "computed": True,
    }


def report(name: str, results: dict[str, dict]) -> None:
    print(f"\n{name}, {PROMPTS} x {SAMPLES} responses of {LENGTH} tokens; medians")
    for row, values in results.items():
        if row != FLOOR:
            phases = "  ".join(
                f"{phase} {values[f'{phase}_s']:.2f}" for phase in PHASES if f"{phase}_s" in values
            )
            memory = (
                f"{values['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in values else "computed"
            )
            cpu = values.get("cpu_s", float("nan"))
            rate = values["tokens_per_s"]
            print(
                f"  {row:24s} {values['step_s']:8.2f} s a step  {cpu:7.2f} CPU s  {rate:6.0f} "
                f"tokens/s  {memory:9s} {phases}"
            )
    ours = results["ours"]["step_s"] if "ours" in results else None
    if ours and all(row in results for row in TRL):
        distillation = results["trl-distillation"]["step_s"]
        both = sum(results[row]["step_s"] for row in TRL)
        print(f"  TRL distillation / ours (both signals): {distillation / ours:.2f} (target 2)")
        print(f"  TRL distillation + GRPO / ours (both signals): {both / ours:.2f} (target 3)")
        cpu = {row: results[row]["cpu_s"] for row in ("ours", *TRL)}
        print(
            f"  the same by CPU seconds: {cpu['trl-distillation'] / cpu['ours']:.2f}, "
            f"{sum(cpu[row] for row in TRL) / cpu['ours']:.2f}"
        )
    if FLOOR in results and ours:
        report_floor(results[FLOOR], ours)
    print(flush=True)


def report_best(name: str, summaries: dict[str, dict[str, dict]]) -> None:
    """Compare our step in its fastest dtype with each of TRL's trainers in its fastest dtype."""
    if len(summaries) < 2 or not all({"ours", *TRL} <= rows.keys() for rows in summaries.values()):
        return
    best = {
        row: min((rows[row]["step_s"], label) for label, rows in summaries.items())
        for row in ("ours", *TRL)
    }
    ours, label = best["ours"]
    distillation = best["trl-distillation"][0]
    both = sum(best[row][0] for row in TRL)
    print(f"{name}, each in its fastest dtype (ours: {label})")
    print(f"  TRL distillation / ours (both signals): {distillation / ours:.2f}")
    print(f"  TRL distillation + GRPO / ours (both signals): {both / ours:.2f}")
    if all(FLOOR in rows for rows in summaries.values()):
        floor = min(floor_s(rows[FLOOR]) for rows in summaries.values())
        print(f"  ours / floor of the faster dtype: {ours / floor:.2f}")
    print(flush=True)


FLOOR_PARTS = (
    "engine_s",
    "teacher_products_s",
    "student_products_s",
    "head_products_s",
    "weights_copy_s",
)


def floor_s(floor: dict) -> float:
    """The summed seconds of all parts of the floor."""
    return sum(floor[key] for key in FLOOR_PARTS)


def report_floor(floor: dict, ours: float) -> None:
    parts = {key: floor[key] for key in FLOOR_PARTS}
    total = floor_s(floor)
    print(
        "  floor: "
        + "  ".join(
            f"{key.removesuffix('_s').replace('_', ' ')} {s:.2f}" for key, s in parts.items()
        )
    )
    print(
        f"  floor in all {total:.2f} s = {total / ours:.0%} of our step; products at "
        f"{floor['body_gflops']:.0f} GFLOP/s (body) and {floor['head_gflops']:.0f} (head)"
    )


def draw(results: dict, picture: Path) -> None:
    """Draw the stacked phases of each row, in one panel per model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(results["models"]), figsize=(7 * len(results["models"]), 4), squeeze=False
    )
    for panel, (name, model) in zip(panels[0], results["models"].items(), strict=True):
        rows = {row: values for row, values in model["summary"].items() if row != FLOOR}
        left = dict.fromkeys(rows, 0.0)
        for phase in (*PHASES, "rest"):
            width = [
                values.get(f"{phase}_s", 0.0) if phase != "rest" else values["step_s"] - left[row]
                for row, values in rows.items()
            ]
            panel.barh(list(rows), width, left=list(left.values()), label=phase)
            left = {row: left[row] + w for row, w in zip(rows, width, strict=True)}
        panel.set(title=f"{name}: seconds a step", xlabel="s")
        panel.invert_yaxis()
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
