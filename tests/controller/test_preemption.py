"""SIGTERM, SIGHUP and Ctrl-C end a run: at once during its start, else when nothing is lost."""

import os
import signal
import sys
from contextlib import suppress

import pytest

from hybridrl.controller.preemption import Preemption
from hybridrl.core.errors import Preempted

BOTH = pytest.mark.parametrize(
    ("number", "name"),
    [
        (signal.SIGTERM, "SIGTERM"),
        (signal.SIGINT, "Ctrl-C"),
        (signal.SIGHUP, "SIGHUP, the terminal was closed"),
    ],
)


@BOTH
def test_a_signal_ends_a_run_at_once_while_it_starts_up(number: int, name: str):
    with (
        pytest.raises(Preempted, match=f"^ended by {name}; run the same command again to"),
        Preemption().listening(),
    ):
        with suppress(Exception):  # Ray's calls turn exceptions of handlers into a SystemError
            os.kill(os.getpid(), number)
        pytest.fail("the start went on")


@BOTH
def test_a_signal_ends_a_run_that_has_started_at_its_next_check(number: int, name: str):
    with Preemption().listening() as preemption:
        preemption.started()
        preemption.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Preempted, match=f"^ended by {name}; "):
            preemption.check()


@BOTH
def test_ctrl_c_after_another_signal_ends_a_run_at_once(
    capfd: pytest.CaptureFixture, number: int, name: str
):
    with Preemption().listening() as preemption:
        preemption.started()
        os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert ("press Ctrl-C again to" in capfd.readouterr().err) == (number == signal.SIGINT)


def test_a_signal_whose_exception_a_library_swallows_still_ends_the_run():
    with Preemption().listening() as preemption:
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted):
            preemption.started()


@pytest.mark.parametrize(("status", "error"), [(signal.SIGTERM, Preempted), (3, SystemExit)])
def test_an_exit_by_rays_own_handler_of_sigterm_counts_as_the_signal_and_another_exit_does_not(
    status: int, error: type[BaseException]
):
    with pytest.raises(error), Preemption().listening():
        sys.exit(status)


def test_the_earlier_handlers_of_the_signals_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    preemption = Preemption()
    with preemption.listening():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray does when it starts
        with pytest.raises(Preempted), preemption.listening():
            os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_run_under_nohup_does_not_end_with_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption().listening() as preemption:
            preemption.started()
            os.kill(os.getpid(), signal.SIGHUP)
            preemption.check()
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
