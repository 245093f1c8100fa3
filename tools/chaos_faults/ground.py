"""The settings of all scenarios, and the run without a fault with which their runs are compared."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from chaos_faults.finding import Finding
from chaos_faults.training import (
    START_S,
    Training,
    prompts_against,
    state_at,
    steps_saved,
    training,
)
from hybridrl.tracking.jsonl import read_metrics
from hybridrl.tracking.machine_metrics import OF_THE_MACHINE
from tests.support.graph import tiny_overrides

STEP = r"^step +(\d+)/"
CLEAN_STEPS = 60
SETTINGS = [
    "train.prompts_per_step=8",
    "train.steps=1000",
    "rollout.engines=2",
    "rollout.groups_per_chunk=2",
    "learner.ranks=2",
    "learner.zero_stage=2",
    "cluster.threads_per_worker=1",
    "checkpoint.every=2",
    "checkpoint.keep=1000",
    "checkpoint.export=false",
    "cluster.max_restarts=20",
]
"""fp32, one thread per worker, and more steps than any scenario needs before it ends its run."""
LIGHT = ["rollout.engines=1", "learner.ranks=1"]
"""Fewer workers, for faults of the driver process: such a run starts in half the time."""


@dataclass(frozen=True, slots=True)
class Ground:
    """The folder in which all scenarios run, and their common settings.

    The folder and its run without a fault are kept between calls of the tool, but a call for the
    whole matrix begins with an empty folder.
    """

    folder: Path
    less: tuple[str, ...] = ()  # settings for fewer workers

    @property
    def light(self) -> "Ground":
        """A ground with one engine and one learner rank, and its own run without a fault."""
        return Ground(self.folder / "light", tuple(LIGHT))

    @property
    def overrides(self) -> list[str]:
        """The settings of a run, except for run.dir."""
        file = self.folder / "overrides.json"
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(tiny_overrides(self.folder)))
        return [*json.loads(file.read_text()), *SETTINGS, *self.less]

    def run_dir(self, name: str) -> Path:
        """A new, numbered run directory, so that runs of earlier calls are not changed."""
        number = sum(path.name.startswith(f"{name}-") for path in self.folder.glob("*"))
        run_dir = self.folder / f"{name}-{number}"
        run_dir.mkdir(parents=True)
        return run_dir

    def clean(self, steps: int = CLEAN_STEPS) -> Path:
        """The directory of the run without a fault, which is first continued to `steps` steps."""
        run_dir = self.folder / "clean"
        saved = steps_saved(run_dir)
        if not saved or saved[-1] < steps:
            with training([*self.overrides, f"train.steps={steps}"], run_dir) as run:
                assert run.ended(START_S + 4 * steps) == 0, run.tail()
        return run_dir

    def equal(self, run_dir: Path, step: int) -> bool:
        """Whether the checkpoint of a step, and the metrics up to it, equal those of the run
        without a fault bit by bit.
        """
        clean = self.clean(max(step, CLEAN_STEPS))
        return (
            state_at(clean, step) is not None
            and state_at(run_dir, step) == state_at(clean, step)
            and rows(run_dir, step) == rows(clean, step)
        )

    def judged(
        self,
        run_dir: Path,
        step: int,
        outcome: str,
        *,
        within: bool = True,
        detected_s: float | None = None,
        recovered_s: float | None = None,
        lost_steps: int | None = None,
    ) -> Finding:
        """The finding on a run that must equal the run without a fault.

        Args:
            step: the step of the checkpoint to compare.
            outcome: what was done and observed.
            within: whether all bounds on times and the like are met.
        """
        same = self.equal(run_dir, step)
        lost, twice = prompts_against(run_dir, self.clean(max(step, CLEAN_STEPS)), step)
        comparison = f"at step {step} {'bit-equal to' if same else 'DIFFERENT FROM'}"
        return Finding(
            passed=same and within and not lost and not twice,
            outcome=f"{outcome}; {comparison} the run without a fault",
            detected_s=detected_s,
            recovered_s=recovered_s,
            lost_steps=lost_steps,
            lost_uids=lost,
            duplicated_uids=twice,
        )


def rows(run_dir: Path, steps: int) -> list[dict[str, float]]:
    """The metrics of a run up to a step, without metrics that depend on times or faults."""
    varying = (*OF_THE_MACHINE, "cluster/restarts", "eval/", "transfer/")
    return [
        {key: value for key, value in row.items() if not key.startswith(varying)}
        for row in read_metrics(run_dir)
        if row["train/step"] <= steps
    ]


def last_step(run: Training) -> int:
    """The last step that a run has printed; 0: none."""
    steps = [int(match[1]) for _, text in run.lines if (match := re.search(STEP, text))]
    return steps[-1] if steps else 0


def next_save(run: Training, limit_s: float) -> int:
    """Wait until a checkpoint exists that is newer than the last printed step; returns its step."""
    step = last_step(run) // 2 * 2 + 2
    while last_step(run) <= step:  # a step is printed before its checkpoint is written
        run.until(STEP, limit_s)
    return step
