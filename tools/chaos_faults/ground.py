"""The settings of every scenario, and the run without a fault that all are compared with."""

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
"""fp32, one thread a worker; enough steps for any scenario, which ends its run itself."""
LIGHT = ["rollout.engines=1", "learner.ranks=1"]
"""Where the run itself is what the fault happens to; it starts in half the time."""


@dataclass(frozen=True, slots=True)
class Ground:
    """A folder that scenarios share from one call of the tool to the next; a run of the whole
    matrix begins with a new one.
    """

    folder: Path
    less: tuple[str, ...] = ()

    @property
    def light(self) -> "Ground":
        """With one worker of each kind, and a run without a fault of its own."""
        return Ground(self.folder / "light", tuple(LIGHT))

    @property
    def overrides(self) -> list[str]:
        kept = self.folder / "overrides.json"
        if not kept.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(tiny_overrides(self.folder)))
        return [*json.loads(kept.read_text()), *SETTINGS, *self.less]

    def run_dir(self, name: str) -> Path:
        """A new one; what an earlier call left under that name stays beside it."""
        number = sum(path.name.startswith(f"{name}-") for path in self.folder.glob("*"))
        found = self.folder / f"{name}-{number}"
        found.mkdir(parents=True)
        return found

    def clean(self, steps: int = CLEAN_STEPS) -> Path:
        """The run without a fault, prolonged if it has fewer steps."""
        run_dir = self.folder / "clean"
        saved = steps_saved(run_dir)
        if not saved or saved[-1] < steps:
            with training([*self.overrides, f"train.steps={steps}"], run_dir) as run:
                assert run.ended(START_S + 4 * steps) == 0, run.tail()
        return run_dir

    def equal(self, run_dir: Path, step: int) -> bool:
        """Whether a checkpoint is that of the run without a fault, bit by bit, and its rows too."""
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
        said: str,
        *,
        within: bool = True,
        **times: float | int | None,
    ) -> Finding:
        """A finding on a run that must be what it would have been."""
        same = self.equal(run_dir, step)
        lost, twice = prompts_against(run_dir, self.clean(max(step, CLEAN_STEPS)), step)
        told = (
            f"{said}; at step {step} {'bit-equal to' if same else 'DIFFERENT FROM'} the run "
            "without a fault"
        )
        return Finding(
            passed=same and within and not lost and not twice,
            said=told,
            lost_uids=lost,
            duplicated_uids=twice,
            **times,
        )


def rows(run_dir: Path, steps: int) -> list[dict[str, float]]:
    """Its metrics without what a clock or a count of losses measured."""
    timed = ("time/", "perf/", "cluster/restarts", "eval/", "transfer/")
    found = [row for row in read_metrics(run_dir) if row["train/step"] <= steps]
    return [
        {key: value for key, value in row.items() if not key.startswith(timed)} for row in found
    ]


def last_step(run: Training) -> int:
    """That it told of; 0: none."""
    told = [int(match[1]) for _, text in run.lines if (match := re.search(STEP, text))]
    return told[-1] if told else 0


def next_save(run: Training, limit_s: float) -> int:
    """Wait until a checkpoint was written that is newer than the last step told of; its step."""
    wanted = last_step(run) // 2 * 2 + 2
    while last_step(run) <= wanted:  # a step is told of before its checkpoint is written
        run.until(STEP, limit_s)
    return wanted
