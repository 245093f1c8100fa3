"""The log of a worker's process, tested in a separate process."""

import logging
import os
import subprocess
import sys
from pathlib import Path

from hybridrl.runtime.host import Host
from hybridrl.runtime.worker_log import STACKS, opened
from hybridrl.settings.rewards import RewardConfig, RewardFunctionConfig
from hybridrl.settings.run import RunConfig, RunSettings

ROOT = Path(__file__).parent.parent.parent
KEY = "sk-7f3a9c21b8d4e6f0a1"


class Speaker:
    def say(self, text: str) -> None:
        print(text, flush=True)
        logging.getLogger("speaker").warning("%s", text)


def two_jobs(folder: str) -> None:
    """Let a worker write to its log in one job, and in a second job whose settings contain a
    key.
    """
    host = Host("tests.runtime.test_worker_log:Speaker", f"{folder}/first/worker.log", {})
    host.call("say", "one")
    judge = RewardFunctionConfig(function="f.py:f", options={"api_key": KEY})
    settings = RunSettings(
        run=RunConfig(dir=folder), reward=RewardConfig(functions={"judge": judge})
    )
    host.begin_job(settings, f"{folder}/second/worker.log")
    host.call("say", "two")
    logging.getLogger("speaker").warning("the key is %s", KEY)
    os.kill(os.getpid(), STACKS)


def test_the_log_of_a_worker_moves_with_its_jobs_and_masks_the_secrets_of_the_later_ones(
    tmp_path: Path,
):
    program = (
        "import sys; from tests.runtime.test_worker_log import two_jobs; two_jobs(sys.argv[1])"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=True,
    )
    assert (tmp_path / "first" / "worker.log").read_text() == "one\nWARNING speaker: one\n"
    second = (tmp_path / "second" / "worker.log").read_text()
    assert second.startswith("two\nWARNING speaker: two\nWARNING speaker: the key is ***\n")
    assert "Current thread" in second and "two_jobs" in second and KEY not in second


def test_a_worker_does_not_make_a_run_directory_anew_and_writes_to_its_stderr_instead(
    tmp_path: Path,
):
    descriptor = opened(str(tmp_path / "run" / "logs" / "rollout-0.log"))
    try:
        assert os.path.sameopenfile(descriptor, 2) and list(tmp_path.iterdir()) == []
    finally:
        os.close(descriptor)
