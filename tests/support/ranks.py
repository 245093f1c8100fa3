"""Starts learner_job.py and sharded_teacher_job.py, the programs of this folder that fork ranks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEADLINE_S = 480  # timeout of a whole job; each group of ranks takes about 15 s


def run_ranks(job: str, *arguments: str) -> None:
    """Run the program tests/support/JOB, which forks ranks, and wait for it.

    Raises:
        AssertionError: it failed; the message has the end of its output.
        subprocess.TimeoutExpired: it did not end within DEADLINE_S; it is killed.
    """
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
