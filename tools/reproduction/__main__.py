"""tools/reproduce ID ... | all: run what is missing of these experiments and write their pages."""

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from benchmarks.machine import commit, processor

from hybridrl.core.errors import HybridRLError
from reproduction.catalogue import EXPERIMENTS
from reproduction.experiment import Experiment, Run
from reproduction.page import draw, judgement, page, summary
from reproduction.records import FOLDER, Records


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/reproduce", description=__doc__)
    parser.add_argument("ids", nargs="*", metavar="ID", help="or all")
    parser.add_argument("--list", action="store_true", help="name the experiments and their state")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="one small run of each arm, without a line in runs.jsonl",
    )
    parser.add_argument(
        "--retry", action="store_true", help="also run again what failed; the old lines stay"
    )
    given = parser.parse_args(arguments)
    known = {experiment.id: experiment for experiment in EXPERIMENTS}
    if given.list:
        for experiment in EXPERIMENTS:
            print(state(Records(experiment)))
        return 0
    wrong = [name for name in given.ids if name != "all" and name not in known]
    if wrong or not given.ids:
        named = f"{wrong[0]} is no experiment" if wrong else "no experiment is named"
        print(f"tools/reproduce: {named}; write some of {', '.join(known)}, or all")
        return 2
    torch.set_num_threads(1)  # the tables are small, and threads would mostly wait for each other
    chosen = [e for e in EXPERIMENTS if "all" in given.ids or e.id in given.ids]
    if given.smoke:
        for experiment in chosen:
            smoke(experiment)
        return 0
    failures = sum(run_missing(Records(experiment), retry=given.retry) for experiment in chosen)
    (FOLDER / "README.md").write_text(summary([Records(e) for e in EXPERIMENTS]))
    return int(failures > 0)


def state(records: Records) -> str:
    """One line about an experiment."""
    experiment = records.experiment
    runs = records.latest()
    found = judgement(experiment, runs)
    done = sum(map(len, runs.values()))
    total = len(experiment.arms) * len(experiment.seeds)
    verdict = found.verdict if found else "not finished"
    return f"{experiment.id:<4} {done:>4} of {total:<4} runs  {verdict:<13} {experiment.title}"


def smoke(experiment: Experiment) -> None:
    """A small run of each arm; nothing is written."""
    for arm in experiment.arms:
        numbers = arm.numbers(0, smoke=True)
        missing = [name for name in experiment.columns if name not in numbers]
        shown = f", without {', '.join(missing)}" if missing else ""
        print(f"{experiment.id} {arm.name}: {len(numbers)} numbers{shown}", flush=True)


def run_missing(records: Records, *, retry: bool) -> int:
    """Run what has no line yet, and write page and picture; returns how many runs failed.

    The second run of an arm takes about as long as its first: by that the time left is estimated.
    """
    experiment = records.experiment
    arms = {arm.name: arm for arm in experiment.arms}
    digests = {name: arm.digest() for name, arm in arms.items()}
    missing = records.missing(digests, failed=retry)
    machine = f"{processor()}, {torch.get_num_threads()} thread"
    failures = 0
    spent: list[float] = []
    for number, (name, seed) in enumerate(missing):
        began = time.monotonic()
        numbers = {}
        error = ""
        try:
            numbers = dict(arms[name].numbers(seed))
        except (HybridRLError, ArithmeticError, ValueError, RuntimeError) as problem:
            error = f"{type(problem).__name__}: {problem}"
            failures += 1
        seconds = time.monotonic() - began
        spent.append(seconds)
        records.append(
            Run(
                arm=name,
                seed=seed,
                key=arms[name].key(seed, digests[name]),
                settings=arms[name].settings,
                numbers=numbers,
                error=error,
                seconds=round(seconds, 2),
                machine=machine,
                commit=commit(),
            )
        )
        left = sum(spent) / len(spent) * (len(missing) - number - 1)
        print(
            f"{experiment.id} {name}, seed {seed}: {error or 'done'} after {seconds:.1f} s, "
            f"about {left:.0f} s left",
            flush=True,
        )
    write_page(records)
    print(state(records))
    return failures


def write_page(records: Records) -> None:
    """The page, and the picture if every run is finished."""
    runs = records.latest()
    records.folder.mkdir(parents=True, exist_ok=True)
    (records.folder / "README.md").write_text(page(records))
    if judgement(records.experiment, runs):
        draw(records.experiment, runs, records.folder / "picture.png")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
