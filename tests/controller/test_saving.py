"""The checkpoint that is written while the run goes on."""

import logging
from threading import Event

import pytest

from hybridrl.controller.saving import Saving
from hybridrl.core.errors import CheckpointError, WorkerDied


def test_a_step_counts_as_saved_when_its_checkpoint_is_committed_and_its_time_is_returned_once():
    saving = Saving()
    written = Event()
    saving.start(4, written.wait)
    assert saving.take() == {} and saving.saved_step == 0, "nothing waits for it"
    written.set()
    saving.settle()
    assert saving.saved_step == 4
    assert list(saving.take()) == ["time/checkpoint_s"] and saving.take() == {}


@pytest.mark.parametrize(
    "error",
    [CheckpointError("no space left"), WorkerDied("scorer-main/0", "saving", "killed", 0)],
)
def test_a_checkpoint_that_fails_is_in_the_log_and_the_next_one_can_succeed(
    error: Exception, caplog: pytest.LogCaptureFixture
):
    saving = Saving()

    def fail() -> None:
        raise error

    saving.start(4, fail)
    with caplog.at_level(logging.ERROR):
        saving.settle_logged()
    assert f"step 4 has no checkpoint, the older ones are whole: {error}" in caplog.text
    saving.start(6, lambda: None)
    saving.settle()
    assert saving.saved_step == 6


def test_an_error_of_the_program_itself_ends_the_run():
    saving = Saving()

    def fail() -> None:
        raise RuntimeError("a fault")

    saving.start(4, fail)
    with pytest.raises(RuntimeError, match="a fault"):
        saving.settle_logged()
