"""tools/gpu_proof [STEP ...] [OPTIONS]: what a first run on GPUs has to show.

Every check has a verdict: pass, fail, or not run, with the reason. All of them are written to
proof.json and PROOF.md in the folder; the steps of an earlier call on the same machine stay there.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_checks.check import Check, Verdict, not_run
from gpu_checks.devices import this_machine
from gpu_checks.ground import Ground
from gpu_checks.page import PAGE, expected, shown, write_page
from gpu_checks.part_process import run_part
from gpu_checks.proof import FILE, PartResult, Proof, StepResult, earlier_steps, store
from gpu_checks.steps import STEPS, Part, Step, devices, missing

FOLDER = "runs/gpu_proof"
NO_GPU = (
    "tools/gpu_proof: torch finds no GPU on this machine; with --device cpu the steps 1 to 3 run "
    "in a reduced form, which proves nothing about GPUs"
)


def main(arguments: Sequence[str]) -> int:
    options = parsed(arguments)
    machine = this_machine()
    if options.device == "cuda" and not machine["gpus"]:
        print(NO_GPU, file=sys.stderr)
        return 2
    folder = options.out.expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    ground = Ground(
        device=options.device,
        folder=str(folder),
        model=options.model,
        teacher=options.teacher,
        shared=options.shared,
    )
    stored = tuple(earlier_steps(folder, ground.device, machine))
    proof = Proof(device=ground.device, machine=machine, steps=stored)
    for step in STEPS:
        if step.number in (options.steps or [step.number]):
            proof = proof.with_step(run_step(step, ground, machine))
            store(proof, folder)
            write_page(proof, folder)
    print(f"\n{folder / PAGE}\n{folder / FILE}")
    return int(proof.failed)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/gpu_proof",
        description=__doc__,
        epilog="\n".join(listed_steps()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("steps", nargs="*", type=int, metavar="STEP", help="all by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--model", help="a student for the comparison of its memory with the plan (step 2)"
    )
    parser.add_argument("--teacher", help="its teacher; by default the student before training")
    parser.add_argument("--shared", help="a folder that all nodes see (step 5)")
    parser.add_argument("--out", type=Path, default=Path(FOLDER), help=f"by default {FOLDER}")
    options = parser.parse_args(arguments)
    numbers = [step.number for step in STEPS]
    if unknown := set(options.steps) - set(numbers):
        parser.error(f"STEP {min(unknown)}: must be from {numbers[0]} to {numbers[-1]}")
    return options


def listed_steps() -> Iterator[str]:
    """Yield the lines of the help text that list each step and what all of its parts need."""
    yield "steps:"
    for step in STEPS:
        yield f"  {step.number}  {step.title}"
        first, *others = (part.packages for part in step.parts)
        packages = [name for name in first if all(name in of_part for of_part in others)]
        largest = max(step.parts, key=lambda part: (part.nodes, part.gpus))
        yield f"     needs {devices(largest)}, {', '.join(packages)}"


def run_step(step: Step, ground: Ground, machine: dict[str, Any]) -> StepResult:
    print(f"\n{step.number}. {step.title}", flush=True)
    parts = tuple(run(part, ground, machine) for part in step.parts)
    made = datetime.now(UTC).isoformat(timespec="seconds")
    return StepResult(number=step.number, title=step.title, made=made, parts=parts)


def run(part: Part, ground: Ground, machine: dict[str, Any]) -> PartResult:
    """Run one part, and print each of its checks as soon as it is made."""
    started = time.monotonic()
    checks = []
    for check in checks_of(part, ground, machine):
        print(line(check), flush=True)
        checks.append(check)
    return PartResult(
        name=part.name,
        title=part.title,
        seconds=time.monotonic() - started,
        checks=tuple(checks),
    )


def checks_of(part: Part, ground: Ground, machine: dict[str, Any]) -> Iterator[Check]:
    absent = missing(part, ground, gpus=len(machine["gpus"]))
    if absent is not None:
        yield not_run(part.title, absent)
        return
    yield from run_part(part, ground)


def line(check: Check) -> str:
    """The line that the console prints for a check.

    Example: "pass     gradients, hidden states, bfloat16: 0.0025, at most 0.0078".
    """
    verdict = "FAIL" if check.verdict is Verdict.failed else str(check.verdict)
    clauses = [clause for clause in (shown(check.value, check.unit), expected(check)) if clause]
    if check.verdict in (Verdict.failed, Verdict.not_run):
        clauses.append(check.reason)
    return f"{verdict:8s} {check.name}: {', '.join(clauses)}".rstrip(": ")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
