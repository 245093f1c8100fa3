"""If Ray itself is killed, a run closes its sinks and ends with an error of one sentence."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hybridrl.core.errors import (
    ClusterLost,
    FleetExhausted,
    HybridRLError,
    Preempted,
    WorkerDied,
    WorkerError,
)
from hybridrl.launch.notices import how_to_continue, naming_what_is_saved
from hybridrl.launch.session import same_fault
from hybridrl.run_dir.checkpoint import Checkpointer
from hybridrl.runtime.head_node import Head
from hybridrl.runtime.ray_connection import sighup_blocked
from hybridrl.settings.choices import Resume
from tests.support.graph import tiny_settings

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def listener() -> socket.socket:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def address_of(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def test_a_head_that_stays_silent_is_lost(listener: socket.socket):
    head = Head(check_s=0.0, silence_s=0.0)
    address = address_of(listener)
    head.check(address)
    head.check(address)
    assert not head.is_silent
    listener.close()
    head.check(address)
    assert head.is_silent, "one failed connection may be a passing fault"
    with pytest.raises(ClusterLost, match=rf"^Ray's head at {address} has not answered for 0 s, "):
        head.check(address)


def test_a_head_that_answers_again_in_time_is_not_lost(listener: socket.socket):
    head = Head(check_s=0.0, silence_s=1000.0)
    address = address_of(listener)
    head.check(address)
    listener.close()
    for _ in range(3):
        head.check(address)
    assert head.is_silent
    with socket.create_server(("127.0.0.1", int(address.partition(":")[2]))):
        head.check(address)
    assert not head.is_silent


def test_the_silence_of_a_head_does_not_count_against_the_next_one():
    head = Head(check_s=0.0, silence_s=0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        old = address_of(server)
    head.check(old)
    head.check(old)
    assert head.is_silent
    with socket.create_server(("127.0.0.1", 0)) as server:
        head.check(address_of(server))
        assert not head.is_silent


@pytest.mark.parametrize(
    ("resume", "resume_from", "newest", "sentence"),
    [
        (Resume.auto, None, "step_000020", "the same command goes on from step_000020"),
        (Resume.auto, None, None, "the same command starts afresh: nothing is saved yet"),
        (
            Resume.auto,
            "old/step_000005",
            None,
            "the same command starts from old/step_000005 again",
        ),
        (
            Resume.never,
            None,
            "step_000020",
            "the same command with run.resume=auto goes on from step_000020",
        ),
        (
            Resume.never,
            None,
            None,
            "the same command with run.resume=auto starts afresh, as nothing is saved",
        ),
    ],
)
def test_the_last_sentence_says_what_the_same_command_would_do(
    tmp_path: Path, resume: Resume, resume_from: str | None, newest: str | None, sentence: str
):
    overrides = [f"run.resume={resume}"]
    if resume_from:
        overrides.append(f"run.resume_from={resume_from}")
    assert how_to_continue(tiny_settings(tmp_path, *overrides), newest) == sentence


@pytest.mark.parametrize("error", [FleetExhausted("x"), ClusterLost("x")])
def test_every_end_for_lost_processes_says_how_to_continue_and_keeps_its_type(
    tmp_path: Path, error: HybridRLError
):
    settings = tiny_settings(tmp_path)
    with (
        pytest.raises(type(error), match=r"^x; the same command starts afresh"),
        naming_what_is_saved(settings, tmp_path),
    ):
        raise error
    (Checkpointer(tmp_path, settings.checkpoint).root / "step_000007").mkdir(parents=True)
    with (
        pytest.raises(type(error), match=r"^x; the same command goes on from step_000007$"),
        naming_what_is_saved(settings, tmp_path),
    ):
        raise error


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ((WorkerError("learner/0", "update", "ValueError: x"), 7), None, True),
        ((WorkerError("learner/0", "update", "ValueError: x"), None), None, True),
        (
            (WorkerError("learner/0", "update", "out of memory"), 7),
            (WorkerError("learner/0", "update", "out of memory"), 19),
            False,
        ),
        ((WorkerDied("learner/0", "update", "killed"), 7), None, False),
    ],
)
def test_a_fault_is_the_same_only_where_no_step_was_made_between(first, second, same):
    assert same_fault(*first, *(second or first)) is same


def test_an_interrupted_run_that_must_not_resume_names_the_setting_with_which_it_continues(
    tmp_path: Path,
):
    interrupted = Preempted("ended by SIGTERM; run the same command again to continue")
    with (
        pytest.raises(Preempted, match=r"to continue, but with run\.resume=auto$"),
        naming_what_is_saved(tiny_settings(tmp_path, "run.resume=never"), tmp_path),
    ):
        raise interrupted


def test_processes_that_ray_starts_do_not_get_the_signal_of_a_closed_terminal():
    program = "import signal; print(signal.SIGHUP in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with sighup_blocked():
        child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert child.stdout == "True\n"
    assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


SCRIPT = """\
import os, signal, subprocess, sys
from contextlib import ExitStack
from hybridrl.runtime.calls import gather
from hybridrl.runtime.cluster import Cluster, Team
from hybridrl.runtime.actor_group import ActorGroup
from hybridrl.runtime.head_node import HEAD
from hybridrl.tracking.sink import Sinks
from hybridrl.cli import exit_status
from tests.support.graph import tiny_settings
from pathlib import Path

folder, victim = Path(sys.argv[1]), sys.argv[2]
HEAD.silence_s = 2.0
signal.signal(signal.SIGHUP, lambda *_: None)  # a run saves and ends, which is tested elsewhere
settings = tiny_settings(folder)


class Closing:
    def start(self, info): ...
    def close(self, exit_code):
        print("closed with", exit_code, flush=True)


def job() -> int:
    with ExitStack() as stack:
        sinks = Sinks(required=[], optional={"closing": Closing()})
        stack.push(lambda kind, *_: sinks.close(0 if kind is None else 1))
        cluster = stack.enter_context(Cluster(settings))
        slots = cluster.place([Team(name="w", size=1, gpus=0, heavy=False)])["w"]
        group = ActorGroup("w", "tests.support.failing_worker:Patient", slots, [{}],
                           log_dir=str(folder / "logs"), concurrent=True)
        gather(group.submit_all("ping", deadline_s=60))
        waiting = group.submit(0, "wait", deadline_s=300)
        os.killpg(0, signal.SIGHUP)  # as a shell does to its jobs when its terminal is closed
        gather(group.submit_all("ping", deadline_s=60))
        words = ["ps", "-o", "pid=,comm=,stat=", "--ppid", str(os.getpid())]
        children = subprocess.run(words, capture_output=True, text=True).stdout
        lines = [line.split() for line in children.splitlines()]
        assert not any(words[-1].startswith("Z") for words in lines), lines
        (pid,) = [int(words[0]) for words in lines if words[1] == victim]
        os.kill(pid, signal.SIGKILL)
        gather([waiting])
    return 0


sys.exit(exit_status(job))
"""


@pytest.mark.graph
@pytest.mark.parametrize(
    ("victim", "sentence"),
    [
        ("gcs_server", "Ray's head at "),
        ("raylet", "Ray's process on this machine, the raylet, is gone"),
    ],
)
def test_a_run_whose_ray_is_killed_closes_its_sinks_and_ends_with_one_sentence(
    tmp_path: Path, victim: str, sentence: str
):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), victim],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        start_new_session=True,
    )
    sentences = [line for line in done.stderr.splitlines() if line.startswith("hybridrl: ")]
    assert done.returncode == 1, done.stderr[-3000:]
    assert done.stdout.splitlines().count("closed with 1") == 1
    assert len(sentences) == 1 and sentences[0].startswith(f"hybridrl: {sentence}")
