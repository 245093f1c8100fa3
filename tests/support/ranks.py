"""Starts the ranks of learner_job.py, each in a process of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

from hybridrl.core.free_port import free_port

ROOT = Path(__file__).parents[2]
JOB = ROOT / "tests" / "support" / "learner_job.py"
DEADLINE_S = 240  # of one process group; it takes about 20 s


def run_ranks(folder: Path, world: int, cases: str) -> None:
    """Start every rank and wait for all; when one fails, the others are killed."""
    port = free_port()
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        # ninja, for DeepSpeed's one compiled op
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
    }
    logs = [(folder / f"{cases}-{rank}.log").open("w+") for rank in range(world)]
    ranks = [
        subprocess.Popen(
            [sys.executable, JOB, str(rank), str(world), str(port), folder, cases],
            env=env,
            stdout=log,
            stderr=log,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        end = time.monotonic() + DEADLINE_S
        while (
            any(r.poll() is None for r in ranks)
            and not any(r.poll() for r in ranks)
            and time.monotonic() < end
        ):
            time.sleep(0.1)
    finally:
        for r in ranks:
            r.kill()
            r.wait()
    outputs = []
    for number, (rank, log) in enumerate(zip(ranks, logs, strict=True)):
        log.seek(0)
        outputs.append(f"rank {number} ended with {rank.returncode}: {log.read()[-3000:]}")
        log.close()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)
