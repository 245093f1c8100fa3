"""Some faults in tiny runs of the command, as a user starts it; `tools/chaos` causes all faults."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hybridrl.core.failpoints import VARIABLE
from hybridrl.run_dir.checkpoint import read_checkpoint
from hybridrl.run_dir.ledger import read_ledger
from hybridrl.tracking.jsonl import read_metrics
from hybridrl.tracking.machine_metrics import OF_THE_MACHINE
from tests.support.graph import tiny_overrides

pytestmark = pytest.mark.graph

BIN = Path(sys.executable).parent
STEPS = 6


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    sizes = [
        f"train.steps={STEPS}",
        "checkpoint.every=2",
        "checkpoint.export=false",
        "cluster.threads_per_worker=1",
    ]
    return [*tiny_overrides(tmp_path_factory.mktemp("chaos")), *sizes]


@contextmanager
def training(overrides: list[str], run_dir: Path, points: str = "") -> Iterator[subprocess.Popen]:
    """Run `hybridrl train` with failpoints; it is killed if it still runs at the end of the
    block.
    """
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", VARIABLE: points}
    command = [sys.executable, "-m", "hybridrl.cli", "train", *overrides, f"run.dir={run_dir}"]
    with subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def outcome(run_dir: Path) -> dict[str, object]:
    """The results that must be equal in equal runs: learner state, ledger, metrics without
    times.
    """
    folder = run_dir / "checkpoints" / f"step_{STEPS:06d}"
    state = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    varying = (*OF_THE_MACHINE, "cluster/restarts")
    rows = [
        {key: value for key, value in row.items() if not key.startswith(varying)}
        for row in read_metrics(run_dir)
    ]
    return {
        "state": state,
        "parts": read_checkpoint(folder).state.parts,
        "ledger": read_ledger(run_dir),
        "rows": rows,
    }


@pytest.fixture(scope="module")
def undisturbed(
    overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    """The outcome of the run without a fault."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    with training(overrides, run_dir) as process:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
    return outcome(run_dir)


def test_a_run_that_loses_its_learner_and_is_stopped_equals_a_run_without_a_fault(
    overrides, undisturbed, tmp_path
):
    """The learner dies in the fourth step, and the run goes back to its checkpoint of step 2. After
    SIGTERM in the third step the run saves that step and exits with status 75, and the same command
    then continues it.
    """
    once = tmp_path / "fired"
    with training(
        overrides, tmp_path / "run", f"learner.update:step=3:do=kill:once={once}"
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if once.exists() and line.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
                break
        output = "".join(lines) + process.stdout.read()
        assert process.wait(60) == 75, output[-3000:]
    assert (
        "learner/0 failed in learn" in output
        and "going back to the last checkpoint" in output
        and "continues after step 2 of 6" in output
    )
    assert "ended by SIGTERM; run the same command again to continue" in output
    last = max(row["step"] for row in read_ledger(tmp_path / "run"))
    assert (
        3 <= last < STEPS
        and read_checkpoint(tmp_path / "run" / "checkpoints" / f"step_{last:06d}").state.step
        == last
    )
    with training(overrides, tmp_path / "run") as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and f"continues after step {last} of {STEPS}" in output, output[
        -3000:
    ]
    assert outcome(tmp_path / "run") == undisturbed
