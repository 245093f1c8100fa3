"""Runs through the whole graph, for experiments, on workers that stay between them."""

import contextlib
import io
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import commit

import hybridrl
from hybridrl.tracking.jsonl import read_metrics
from reproduction.experiment import Setting, hashed

RUNS = Path(__file__).parent.parent.parent / "runs" / "reproduce"

COMMON: Mapping[str, Setting] = {
    "experiment": "quickstart",
    "train.products": "model",  # a verdict must not depend on the processor
    "cluster.threads_per_worker": 1,
    "train.prompts_per_step": 32,
    "rollout.groups_per_chunk": 32,
    "eval.teacher": False,
    "eval.every": 0,
    "checkpoint.every": 0,
    "diagnostics.token_samples": 0,
    "tracking.wandb": "disabled",
}
"""What all trained runs have in common, unless their settings say otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a run took, in seconds; the evaluations between its steps are in the first."""

    around_s: float
    step_s: float

    def of_steps(self, steps: int) -> float:
        return self.around_s + steps * self.step_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A finished run; its files exist as long as the block of Lab.run."""

    rows: Sequence[Mapping[str, float]]  # of metrics.jsonl
    model: Path  # a Hugging Face folder
    seconds: float

    def values(self, metric: str) -> Sequence[float]:
        """Of the rows that have the metric, in the order of the steps."""
        return [row[metric] for row in self.rows if metric in row]

    @property
    def accuracies(self) -> Mapping[str, float]:
        """accuracy_N, greedy, after N steps, by the run's own evaluations."""
        return {
            f"accuracy_{row['train/step']:.0f}": row["eval/accuracy"]
            for row in self.rows
            if "eval/accuracy" in row
        }

    @property
    def tokens(self) -> float:
        """Response tokens that were trained on."""
        return sum(self.values("train/tokens"))

    @property
    def cost(self) -> Cost:
        """Of a run that was not continued."""
        steps = self.values("time/step_s")
        usual = statistics.median(steps)
        return Cost(around_s=max(0.0, self.seconds - usual * len(steps)), step_s=usual)


class Lab:
    """Trains. Use as a context manager, which ends the workers.

    A run that was interrupted is continued by the next call with the same settings, seed and
    commit.
    """

    def __init__(self, folder: Path = RUNS, *, problems: int = 512) -> None:
        self.folder = folder
        self.problems = problems
        """held-out ones, with which a trained model is examined"""
        self.cost: Cost | None = None
        """of the newest run; None: there was none"""
        self._workers = contextlib.ExitStack()
        self._warm: hybridrl.WarmWorkers | None = None

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.close()

    @contextlib.contextmanager
    def run(self, settings: Mapping[str, Setting], seed: int) -> Iterator[Trained]:
        """Train by these settings, and delete the files of the run at the end of the block.

        Args:
            settings: of hybridrl, by their names, on top of COMMON.
            seed: run.seed.

        Raises:
            HybridRLError: the run failed or was interrupted. What an interrupted run has saved is
                kept.
        """
        given = {**COMMON, **settings}
        code = commit()
        run_dir = self.folder / f"{code}-{hashed({**given, 'run.seed': seed})}"
        if code.endswith("+"):  # a run of other changes is not continued
            shutil.rmtree(run_dir, ignore_errors=True)
        if self._warm is None:
            self._warm = self._workers.enter_context(hybridrl.WarmWorkers())
        began = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):  # logs/console.log has it too
            result = hybridrl.train(overrides(settings, seed, run_dir), warm=self._warm)
        assert result.export is not None, "checkpoint.export is on"
        seconds = time.monotonic() - began
        trained = Trained(rows=read_metrics(run_dir), model=result.export, seconds=seconds)
        self.cost = trained.cost
        yield trained
        shutil.rmtree(run_dir)


def overrides(settings: Mapping[str, Setting], seed: int, run_dir: Path) -> list[str]:
    """KEY=VALUE of each of COMMON and `settings`, as hybridrl.train takes them."""
    given = {**COMMON, **settings, "run.seed": seed, "run.dir": str(run_dir)}
    return [f"{name}={_text(value)}" for name, value in given.items()]


def _text(value: Setting) -> str:
    """As Hydra reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    return f"[{','.join(map(str, value))}]"
