"""runs.jsonl of an experiment: lines are appended and never edited."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from hybridrl.core.errors import DataError
from reproduction.experiment import Arm, Code, Experiment, Run, Runs

FOLDER = Path(__file__).parent.parent / "experiments"


class Records:
    """The lines of one experiment."""

    def __init__(self, experiment: Experiment, folder: Path = FOLDER) -> None:
        self.experiment = experiment
        self.folder = folder / experiment.id
        self.path = self.folder / "runs.jsonl"

    def read(self) -> list[Run]:
        """All runs, oldest first.

        Raises:
            DataError: a line is damaged; names it.
        """
        return [line for line in self._lines() if isinstance(line, Run)]

    def append(self, line: Run | Code) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self.path.read_text() if self.path.exists() else ""
        torn = bool(before) and not before.endswith("\n")  # by a crash
        with self.path.open("a") as file:
            file.write("\n" * torn + json.dumps(asdict(line)) + "\n")

    def of_code(self, digests: Mapping[str, str]) -> Runs:
        """The newest line of each arm and seed that did not fail, by the settings of today and by
        the code of these digests.

        An arm of which no run is finished is absent.

        Args:
            digests: of the small run of each arm, by the arm's name; "": any code.
        """
        newest: dict[tuple[str, int], Run] = {}
        arms = {arm.name: arm for arm in self.experiment.arms}
        for run in self.read():
            arm = arms.get(run.arm)
            if arm is not None and not run.error and _is_of(run, arm, digests[arm.name]):
                newest[run.arm, run.seed] = run
        found: dict[str, Sequence[Run]] = {}
        for arm in self.experiment.arms:
            seeds = [seed for seed in self.experiment.seeds if (arm.name, seed) in newest]
            if seeds:
                found[arm.name] = [newest[arm.name, seed] for seed in seeds]
        return found

    def latest(self) -> Runs:
        """Those that count: of the code of each arm's newest line, be it a run or a Code. Runs of
        different code are not mixed.
        """
        return self.of_code(self._digests())

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

    def note_code(self, digests: Mapping[str, str]) -> None:
        """Make `latest` return the runs of this code; appends a line only if others count now."""
        if self.of_code(digests) != self.latest():
            self.append(Code(digests=digests))

    def _digests(self) -> Mapping[str, str]:
        found = {arm.name: "" for arm in self.experiment.arms}
        for line in self._lines():
            found |= line.digests if isinstance(line, Code) else {line.arm: line.digest}
        return found

    def _lines(self) -> list[Run | Code]:
        if not self.path.exists():
            return []
        lines: list[Run | Code] = []
        for number, text in enumerate(self.path.read_text().splitlines(), start=1):
            try:
                fields = json.loads(text)
                lines.append(Code(**fields) if "digests" in fields else Run(**fields))
            except (ValueError, TypeError) as error:
                raise DataError(f"{self.path}, line {number}: {error}; remove the line") from error
        return lines


def _is_of(run: Run, arm: Arm, digest: str) -> bool:
    """Whether a run has the arm's settings and the code of a digest; "": any code."""
    if digest:
        return run.key == arm.key(run.seed, digest)
    return run.settings == json.loads(json.dumps(dict(arm.settings)))
