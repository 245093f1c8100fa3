"""The Slurm recipe on this machine: srun and scontrol are stand-ins, the Ray nodes are real."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from random import SystemRandom
from tempfile import mkdtemp

import pytest

from hybridrl.core.free_port import free_port

ROOT = Path(__file__).parent.parent.parent
# Stands for srun: runs its command on this machine, with less memory and on free ports.
SRUN = """#!/usr/bin/env bash
echo "$*" >>"$TRIAL/steps"
while [[ "$1" == --* ]]; do shift; done
case "$1" in
  *head.sh) exec "$@" --num-cpus 1 --object-store-memory 100000000 --include-dashboard false ;;
  *) exec "$@" --num-cpus 1 --object-store-memory 100000000 ;;
esac
"""
# Stands for srun: the head keeps running, and workers do not start.
SRUN_OF_HEAD = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
case "$1" in
  *head.sh) exec sleep 300 ;;
esac
"""
# Prints more names of nodes than a pipe holds, so it fails if a reader stops after the first line.
SCONTROL = """#!/usr/bin/env bash
echo 127.0.0.1
printf 'other-node-%d\\n' {1..20000}
"""
# Stands for hybridrl: prints the resources that Ray offers to a run, and the run's arguments.
HYBRIDRL = f"""#!{sys.executable}
import json, os, sys
import ray
ray.init(log_to_driver=False)
print(json.dumps([len(ray.nodes()), ray.cluster_resources().get("GPU"), sys.argv[1:]]))
"""


@pytest.fixture
def job(tmp_path):
    """The environment of a Slurm job of two nodes; ends the job's processes afterwards."""
    programs = {"srun": SRUN, "scontrol": SCONTROL, "hybridrl": HYBRIDRL}
    folder = tmp_path / "env" / "bin"
    folder.mkdir(parents=True)
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    (folder / "activate").write_text(f'PATH="{folder}:{Path(sys.executable).parent}:$PATH"\n')
    sessions = mkdtemp(prefix="ray-")  # short: the path of a Unix socket holds 107 bytes
    (tmp_path / "home").mkdir()
    port = free_port(SystemRandom().sample(range(20_000, 30_000), 100))
    yield os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "HYBRIDRL_VENV": str(tmp_path / "env"),
        "TRIAL": str(tmp_path),
        "RAY_TMPDIR": sessions,
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(port),  # its last four digits determine the head's port
        "SLURM_JOB_NODELIST": "two-nodes",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "3",
    }
    subprocess.run(["pkill", "-9", "-f", sessions], check=False)
    shutil.rmtree(sessions, ignore_errors=True)


def run(job: dict[str, str]) -> tuple[int, str, str]:
    """Run the job; returns its exit status, output and errors.

    Output and errors go to files, because the Ray processes keep them open until Slurm ends them.
    Here a signal to the job's process group ends them.
    """
    output = Path(job["TRIAL"], "output")
    errors = Path(job["TRIAL"], "errors")
    with output.open("w") as out, errors.open("w") as err:
        command = ["bash", ROOT / "cluster/slurm.sbatch", "train.steps=3"]
        batch = subprocess.Popen(command, env=job, stdout=out, stderr=err, start_new_session=True)
        try:
            status = batch.wait(timeout=200)
        finally:
            with suppress(ProcessLookupError):  # raised if all its processes have ended already
                os.killpg(batch.pid, signal.SIGTERM)
    return status, output.read_text(), errors.read_text()


@pytest.mark.graph
def test_a_slurm_job_starts_the_run_when_all_its_nodes_are_in_the_cluster(job, tmp_path):
    status, output, errors = run(job)
    assert status == 0, output + errors
    # The Ray processes write to the same file.
    [line] = [line for line in output.splitlines() if line.startswith("[2, ")]
    _, gpus, arguments = json.loads(line)
    assert gpus == 6.0
    run_dir = f"{ROOT}/runs/slurm-{job['SLURM_JOB_ID']}"
    assert arguments == ["train", f"run.dir={run_dir}", "train.steps=3"]
    head, worker = (tmp_path / "steps").read_text().splitlines()
    assert "--nodelist=127.0.0.1 cluster/head.sh" in head
    assert "--nodes=1 --ntasks=1 --exclude=127.0.0.1 cluster/worker.sh 127.0.0.1:" in worker
    assert (tmp_path / "home/.ray/auth_token").stat().st_mode & 0o077 == 0


def test_a_slurm_job_whose_workers_do_not_start_ends_with_a_message(job):
    """The stand-ins for ray and python report that there is a head, but not all nodes have
    joined.
    """
    programs = {
        "srun": SRUN_OF_HEAD,
        "ray": "#!/usr/bin/env bash\nexit 0\n",
        "python": "#!/usr/bin/env bash\nexit 1\n",
    }
    for name, text in programs.items():
        path = Path(job["HYBRIDRL_VENV"], "bin", name)
        path.write_text(text)
        path.chmod(stat.S_IRWXU)
    status, _, errors = run(job)
    assert status == 1
    head = f"127.0.0.1:{job['SLURM_JOB_ID']}"
    assert f"not all of 2 nodes have joined the Ray head at {head} after" in errors
