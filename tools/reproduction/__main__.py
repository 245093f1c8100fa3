"""tools/reproduce ID ... | all: run what is missing of these experiments and write their pages."""

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from hybridrl.core.errors import HybridRLError, Preempted
from reproduction.catalogue import EXPERIMENTS
from reproduction.experiment import Experiment, hashed
from reproduction.lab import Lab
from reproduction.page import judgement, summary, write_page
from reproduction.records import FOLDER, Records
from reproduction.running import OverBudget, run_missing


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/reproduce", description=__doc__)
    parser.add_argument("ids", nargs="*", metavar="ID", help="or all")
    parser.add_argument("--list", action="store_true", help="name the experiments and their state")
    parser.add_argument(
        "--pages", action="store_true", help="write the pages from the runs that are finished"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="one small run of each arm, without a line in runs.jsonl",
    )
    parser.add_argument(
        "--retry", action="store_true", help="also run again what failed; the old lines stay"
    )
    parser.add_argument(
        "--over-budget",
        action="store_true",
        help="run an experiment although it will take longer than its budget",
    )
    given = parser.parse_args(arguments)
    known = {experiment.id: experiment for experiment in EXPERIMENTS}
    wrong = [name for name in given.ids if name != "all" and name not in known]
    if not given.list and (wrong or not given.ids):
        named = f"{wrong[0]} is no experiment" if wrong else "no experiment is named"
        print(f"tools/reproduce: {named}; write some of {', '.join(known)}, or all")
        return 2
    try:
        return perform([e for e in EXPERIMENTS if "all" in given.ids or e.id in given.ids], given)
    except HybridRLError as problem:  # e.g. a damaged line of an experiment
        print(f"tools/reproduce: {problem}")
        return 2


def perform(chosen: Sequence[Experiment], given: argparse.Namespace) -> int:
    """Do what the options say; returns the exit code.

    Raises:
        HybridRLError: a line of runs.jsonl is damaged, or a small run of --smoke failed.
    """
    if given.list:
        for experiment in EXPERIMENTS:
            print(state(Records(experiment)))
        return 0
    torch.set_num_threads(1)  # the tables are small, and threads would mostly wait for each other
    if given.pages:
        for experiment in chosen:
            write_page(Records(experiment))
        write_summary()
        return 0
    with Lab() as lab:
        if given.smoke:
            for experiment in chosen:
                smoke(experiment, lab)
            return 0
        return run(chosen, lab, retry=given.retry, over_budget=given.over_budget)


def run(chosen: Sequence[Experiment], lab: Lab, *, retry: bool, over_budget: bool) -> int:
    """Run what is missing; an experiment that cannot be run does not keep the others from it.

    Returns:
        The exit code: 75 if a signal stopped a run, else 2 if an experiment could not be run, else
        1 if a run failed.
    """
    codes = {0}
    for experiment in chosen:
        records = Records(experiment)
        try:
            failures = run_missing(records, lab, retry=retry, over_budget=over_budget)
            codes.add(int(failures > 0))
            print(state(records), flush=True)
        except Preempted as stopped:
            print(f"tools/reproduce: {stopped}", flush=True)
            codes.add(os.EX_TEMPFAIL)
            break
        except (OverBudget, HybridRLError) as problem:
            print(f"tools/reproduce: {experiment.id} was not run: {problem}", flush=True)
            codes.add(2)
    write_summary()
    return max(codes)


def write_summary() -> None:
    (FOLDER / "README.md").write_text(summary([Records(e) for e in EXPERIMENTS]))


def state(records: Records) -> str:
    """One line about an experiment."""
    experiment = records.experiment
    runs = records.latest()
    found = judgement(experiment, runs)
    done = sum(map(len, runs.values()))
    total = len(experiment.arms) * len(experiment.seeds)
    verdict = found.verdict if found else "not finished"
    return f"{experiment.id:<4} {done:>4} of {total:<4} runs  {verdict:<13} {experiment.title}"


def smoke(experiment: Experiment, lab: Lab) -> None:
    """A small run of each arm; nothing is written."""
    done = set()
    for arm in experiment.arms:
        same = hashed(dict(arm.small_settings))
        if same in done:
            continue
        done.add(same)
        numbers = arm.small_numbers(lab)
        missing = [name for name in experiment.columns if name not in numbers]
        shown = f", without {', '.join(missing)}" if missing else ""
        print(f"{experiment.id} {arm.name}: {len(numbers)} numbers{shown}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
