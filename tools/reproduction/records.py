"""runs.jsonl of an experiment: lines are appended and never edited."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from hybridrl.core.errors import DataError
from reproduction.experiment import Arm, Experiment, Run, Runs

FOLDER = Path(__file__).parent.parent / "experiments"


class Records:
    """The lines of one experiment."""

    def __init__(self, experiment: Experiment, folder: Path = FOLDER) -> None:
        self.experiment = experiment
        self.folder = folder / experiment.id
        self.path = self.folder / "runs.jsonl"

    def read(self) -> list[Run]:
        """All lines, oldest first.

        Raises:
            DataError: a line is damaged; names it.
        """
        if not self.path.exists():
            return []
        runs = []
        for number, line in enumerate(self.path.read_text().splitlines(), start=1):
            try:
                runs.append(Run(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise DataError(f"{self.path}, line {number}: {error}; remove the line") from error
        return runs

    def append(self, run: Run) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self.path.read_text() if self.path.exists() else ""
        torn = bool(before) and not before.endswith("\n")  # by a crash
        with self.path.open("a") as file:
            file.write("\n" * torn + json.dumps(asdict(run)) + "\n")

    def missing(self, digests: Mapping[str, str], *, failed: bool) -> list[tuple[str, int]]:
        """Arm and seed of each run that has no line yet. Those of an arm follow each other, so that
        they can have the same workers.

        Args:
            digests: of the small run of each arm, by the arm's name.
            failed: also those whose only lines say that they failed.
        """
        done = {run.key for run in self.read() if not (failed and run.error)}
        return [
            (arm.name, seed)
            for arm in self.experiment.arms
            for seed in self.experiment.seeds
            if arm.key(seed, digests[arm.name]) not in done
        ]

    def latest(self) -> Runs:
        """The newest line of each arm and seed that did not fail, by the settings of today and by
        the code of the arm's newest line: seeds of different code are not mixed.

        An arm of which no run is finished is absent.
        """
        newest: dict[tuple[str, int], Run] = {}
        digests: dict[str, str] = {}
        for run in self.read():
            digests[run.arm] = run.digest
            if not run.error:
                newest[run.arm, run.seed] = run
        found: dict[str, Sequence[Run]] = {}
        for arm in self.experiment.arms:
            of_arm = [
                newest[arm.name, seed]
                for seed in self.experiment.seeds
                if (arm.name, seed) in newest
                and _is_of(newest[arm.name, seed], arm, digests[arm.name])
            ]
            if of_arm:
                found[arm.name] = of_arm
        return found


def _is_of(run: Run, arm: Arm, digest: str) -> bool:
    """Whether a run has the arm's settings and the code of a digest; "": any code."""
    if digest:
        return run.key == arm.key(run.seed, digest)
    return run.settings == json.loads(json.dumps(dict(arm.settings)))
