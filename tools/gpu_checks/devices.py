"""Describes this machine's GPUs and software: `python -m gpu_checks.devices` prints them as JSON.

This runs in its own process, because torch holds memory of a GPU from its first use of it.
"""

import json
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.machine import describe

QUERY = "name,driver_version,memory.total,compute_cap"
LIMIT_S = 60.0


def description() -> dict[str, Any]:
    """The description of benchmarks.machine, and each GPU as nvidia-smi and torch describe it."""
    import torch

    has_gpu = torch.cuda.is_available()
    return describe() | {
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_gpu else None,
        "gpus": [
            {
                "name": torch.cuda.get_device_name(i),
                "memory_gib": round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1),
                "capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
            }
            for i in range(torch.cuda.device_count())
        ],
        "nvidia_smi": nvidia_smi(f"--query-gpu={QUERY}", "--format=csv,noheader"),
        "topology": nvidia_smi("topo", "-m"),
    }


def nvidia_smi(*arguments: str) -> str | None:
    """The output of nvidia-smi; None: it does not exist, fails, or takes longer than LIMIT_S."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def this_machine() -> dict[str, Any]:
    """The description of this machine, made by another process.

    Raises:
        RuntimeError: torch cannot be imported, or cannot query the GPUs.
    """
    command = [sys.executable, "-m", "gpu_checks.devices"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(description()))
