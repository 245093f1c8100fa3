"""Starts learner_job.py and sharded_teacher_job.py, programs of this folder that fork ranks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEADLINE_S = 480  # of all groups of ranks; each takes about 15 s


def run_ranks(job: str, *arguments: str) -> None:
    """Run tests/support/JOB, whose ranks are processes, and wait for it."""
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "support" / job, *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its ranks too
            process.wait()
    assert process.returncode == 0, output[-9000:]
