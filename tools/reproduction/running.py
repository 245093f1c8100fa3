"""The runs of an experiment that are missing: what they will cost, and running them."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from benchmarks.machine import commit, processor

from hybridrl.core.errors import HybridRLError, PlacementError, Preempted
from reproduction.experiment import Experiment, Run, digest, hashed
from reproduction.lab import Cost, Lab
from reproduction.page import write_page
from reproduction.records import Records


class OverBudget(Exception):
    """The missing runs of an experiment would take longer than it may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallRun:
    """What the small run of an arm says about its runs."""

    digest: str
    cost: Cost | None  # None: it trained nothing


def small_runs(experiment: Experiment, lab: Lab) -> Mapping[str, SmallRun]:
    """By the names of the arms; small runs of the same settings are one."""
    found: dict[str, SmallRun] = {}
    of_arms: dict[str, SmallRun] = {}
    for arm in experiment.arms:
        same = hashed(dict(arm.small_settings))
        if same not in found:
            lab.cost = None
            numbers = arm.small_numbers(lab)
            found[same] = SmallRun(digest=digest(numbers), cost=lab.cost)
        of_arms[arm.name] = found[same]
    return of_arms


def expected_s(experiment: Experiment, name: str, small: SmallRun) -> float:
    """Of one run of the arm; 0 if it trains nothing."""
    if small.cost is None:
        return 0.0
    arm = {arm.name: arm for arm in experiment.arms}[name]
    steps = arm.settings["train.steps"]
    assert isinstance(steps, int), "an arm that trains says for how many steps"
    cost = small.cost if arm.step_s is None else replace(small.cost, step_s=arm.step_s)
    return cost.of_steps(steps)


def run_missing(
    records: Records, lab: Lab, *, retry: bool = False, over_budget: bool = False
) -> int:
    """Run what has no line yet, and write page and picture; returns how many runs failed.

    A run whose workers could not start says nothing about its arm and gets no line.

    Args:
        retry: also run again what failed.
        over_budget: run although it takes longer than the experiment's budget.

    Raises:
        OverBudget: it would.
        Preempted: a signal stopped a run, which saved its state; the next call continues it.
    """
    experiment = records.experiment
    arms = {arm.name: arm for arm in experiment.arms}
    small = small_runs(experiment, lab)
    digests = {name: of.digest for name, of in small.items()}
    missing = records.missing(digests, failed=retry)
    expected = [expected_s(experiment, name, small[name]) for name, _ in missing]
    if any(expected):
        print(
            f"{experiment.id}: {len(missing)} runs, about {sum(expected) / 60:.0f} min, of "
            f"{experiment.budget_s / 60:.0f}",
            flush=True,
        )
        if sum(expected) > experiment.budget_s and not over_budget:
            raise OverBudget(
                f"its runs would take about {sum(expected) / 60:.0f} min, its "
                f"budget is {experiment.budget_s / 60:.0f} min; cut steps or arms in its file, or "
                "give --over-budget"
            )
    records.note_code(digests)
    machine = f"{processor()}, {torch.get_num_threads()} thread"
    failures = 0
    spent: list[float] = []
    for number, (name, seed) in enumerate(missing):
        began = time.monotonic()
        numbers = {}
        error = ""
        try:
            numbers = dict(arms[name].numbers(seed, lab))
        except Preempted:
            write_page(records)
            raise
        except PlacementError as problem:
            failures += 1
            print(
                f"{experiment.id} {name}, seed {seed}: could not start, so it has no line and the "
                f"next call tries again: {problem}",
                flush=True,
            )
            continue
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
                digest=digests[name],
            )
        )
        left = sum(spent) / len(spent) * (len(missing) - number - 1)
        print(
            f"{experiment.id} {name}, seed {seed}: {error or 'done'} after {seconds:.1f} s, "
            f"about {left:.0f} s left",
            flush=True,
        )
    write_page(records)
    return failures
