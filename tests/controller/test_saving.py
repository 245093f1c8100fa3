"""A checkpoint that is written in the background while the run continues."""

import logging
from dataclasses import fields
from threading import Event
from types import SimpleNamespace

import pytest

from hybridrl.controller.controller import Controller
from hybridrl.controller.saving import Saving
from hybridrl.core.errors import CheckpointError, WorkerDied
from hybridrl.runtime.calls import Pending
from hybridrl.runtime.learner_group import LearnerGroup
from hybridrl.settings.run import DeadlineConfig


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
    assert f"step 4 has no checkpoint (older ones are intact): {error}" in caplog.text
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


class Learner:
    """A stand-in for the learner's group that never finishes the files of a checkpoint."""

    given_up: str | None = None
    give_up = LearnerGroup.give_up
    _check_wanted = LearnerGroup._check_wanted
    settings = SimpleNamespace(deadlines=DeadlineConfig(save_s=5.0))

    def __init__(self) -> None:
        self.asked = Event()
        self.group = self

    def submit_all(self, method: str, *, deadline_s: float) -> list[Pending]:
        self.deadline_s = deadline_s
        self.asked.set()
        return []


@pytest.mark.parametrize(("learn_s", "save_s", "longest"), [(10.0, 7.0, 10.0), (5.0, 7.0, 7.0)])
def test_a_silent_rank_is_waited_for_as_long_as_the_longest_deadline_says(
    monkeypatch: pytest.MonkeyPatch, learn_s: float, save_s: float, longest: float
):
    """The other deadlines are 1 s. The start of a run prints the longest one."""
    others = {f.name: 1.0 for f in fields(DeadlineConfig)}
    deadlines = DeadlineConfig(**others | {"learn_s": learn_s, "save_s": save_s})
    monkeypatch.setattr("hybridrl.runtime.learner_group.gather", lambda calls, watch: ["file"])
    learner = Learner()
    learner.settings = SimpleNamespace(deadlines=deadlines)
    assert LearnerGroup._saved_files(learner) == ["file"]
    assert learner.deadline_s == longest == deadlines.longest_silence_s


def test_a_run_that_is_ended_at_once_does_not_wait_for_the_thread_of_its_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
):
    """Python would otherwise wait for all threads when it exits."""
    monkeypatch.setattr("hybridrl.runtime.learner_group.gather", lambda calls, watch: [None])
    learner = Learner()
    saving = Saving()
    saving.start(4, lambda: LearnerGroup._saved_files(learner))

    def second_signal() -> None:
        assert learner.asked.wait(timeout=5.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Controller.run(SimpleNamespace(_train=second_signal, learner=learner, saving=saving))
    with pytest.raises(CheckpointError, match="the run was ended at once"):
        saving.settle()
