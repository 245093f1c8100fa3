"""SIGTERM: at once while a run starts up, later where nothing would be lost."""

import os
import signal
import sys
from contextlib import suppress

import pytest

from hybridrl.controller.preemption import Preemption
from hybridrl.errors import Preempted


def test_while_a_run_starts_up_it_ends_where_it_stands():
    with Preemption().listening(), pytest.raises(Preempted, match="the same command continues"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_once_it_has_started_it_ends_where_it_asks():
    with Preemption().listening() as preemption:
        preemption.started()
        preemption.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted):
            preemption.check()


def test_what_took_the_order_for_an_error_of_its_own_does_not_hide_it():
    with Preemption().listening() as preemption:
        with suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted):
            preemption.started()


@pytest.mark.parametrize(("status", "told"), [(signal.SIGTERM, Preempted), (3, SystemExit)])
def test_an_end_by_rays_handler_of_the_signal_is_an_order_like_any_other(status: int, told: type[BaseException]):
    with pytest.raises(told), Preemption().listening():
        sys.exit(status)


def test_who_took_the_signal_before_has_it_again():
    before = signal.getsignal(signal.SIGTERM)
    preemption = Preemption()
    with preemption.listening():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray does when it starts
        with preemption.listening(), pytest.raises(Preempted):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
