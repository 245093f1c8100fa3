"""SIGTERM and Ctrl-C: at once while a run starts up, later where nothing would be lost."""

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
def test_while_a_run_starts_up_it_ends_where_it_stands(number: int, name: str):
    with (
        pytest.raises(Preempted, match=f"^ended by {name}; the same command continues$"),
        Preemption().listening(),
    ):
        with suppress(Exception):  # Ray's calls make a SystemError of one
            os.kill(os.getpid(), number)
        pytest.fail("the start went on")


@BOTH
def test_once_it_has_started_it_ends_where_it_asks(number: int, name: str):
    with Preemption().listening() as preemption:
        preemption.started()
        preemption.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Preempted, match=f"^ended by {name}; "):
            preemption.check()


@BOTH
def test_ctrl_c_ends_a_run_at_once_that_was_told_to_end_before(
    capfd: pytest.CaptureFixture, number: int, name: str
):
    with Preemption().listening() as preemption:
        preemption.started()
        os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert ("once more ends it at once" in capfd.readouterr().err) == (number == signal.SIGINT)


def test_what_took_the_order_for_an_error_of_its_own_does_not_hide_it():
    with Preemption().listening() as preemption:
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted):
            preemption.started()


@pytest.mark.parametrize(("status", "told"), [(signal.SIGTERM, Preempted), (3, SystemExit)])
def test_an_end_by_rays_handler_of_the_signal_is_an_order_like_any_other(
    status: int, told: type[BaseException]
):
    with pytest.raises(told), Preemption().listening():
        sys.exit(status)


def test_who_took_the_signal_before_has_it_again():
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
