"""How the loop of training ends: what is saved, what the error says, and what a resume completes.

The loop, its files and its checkpoints are real; a step only counts, and the learner has no
weights.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybridrl.controller.controller import Controller, OnStep
from hybridrl.controller.preemption import Preemption
from hybridrl.controller.saving import Saving
from hybridrl.controller.step_results import Sampled, Update
from hybridrl.core.errors import (
    CheckpointError,
    FleetExhausted,
    HybridRLError,
    Preempted,
    RewardError,
    RunDirectoryError,
    RunDirectoryTaken,
    ServerError,
    WeightSyncError,
    WorkerDied,
)
from hybridrl.launch.session import missing_row, train_on
from hybridrl.run_dir.checkpoint import Checkpoint, Checkpointer, read_checkpoint
from hybridrl.run_dir.ledger import Ledger, read_ledger
from hybridrl.settings.compose import load_config
from hybridrl.tracking.jsonl import JsonlSink, read_metrics, read_token_samples
from hybridrl.tracking.sink import Sinks
from hybridrl.tracking.timing import PhaseClock
from hybridrl.types import Files, LearnerStats, RunInfo, TokenSample
from tests.support.batches import make_batch, make_rewards

TOKENS = TokenSample(
    step=1, uid="a", prompt="p", teacher="main", tokens=("x",), log_ratios=(0.5,), reward=1.0
)

STATS = LearnerStats(
    logprob_gap=None, token_kl=None, sparse_norm=0.0, metrics={}, learn_s=0.0, optimizer_steps=1
)


class Ranks:
    """A learner without weights. It raises `error`, if there is one, when a checkpoint begins."""

    device = "cpu"

    def __init__(self) -> None:
        self.error: HybridRLError | None = None

    def state_bytes(self) -> int:
        return 0

    def begin_save(self, folder: str) -> Files:
        if self.error is not None:
            raise self.error
        return lambda: []

    def load_state(self, folder: str, optimizer_steps: int) -> None: ...

    def note_failure(self, error: Exception) -> None: ...


class Loop(Controller):
    """The training loop with steps that do nothing but count.

    Args:
        before, after: called in each step before and after its update, with the number of the step.
        evaluating: called in each evaluation, with the number of steps done.
    """

    def __init__(
        self,
        run_dir: Path,
        *overrides: str,
        first: int = 0,
        before: Callable[[int], object] = id,
        after: Callable[[int], object] = id,
        evaluating: Callable[[int], object] = id,
        on_step: OnStep | None = None,
    ) -> None:
        run_dir.mkdir(exist_ok=True)
        basic = ["experiment=quickstart", f"run.dir={run_dir}", "train.steps=3", "eval.every=2"]
        self.settings = load_config([*basic, "checkpoint.every=0", *overrides])
        self.before, self.after, self.evaluating, self.on_step = before, after, evaluating, on_step
        self.learner = Ranks()
        self.workers = SimpleNamespace(
            scorers=[], residency=SimpleNamespace(takes_turns=False), lose=raised
        )
        self.pipeline = SimpleNamespace(skipped=[], settle=lambda returning: None)
        self.sinks = Sinks(required=[JsonlSink()])
        self.sinks.start(
            RunInfo(run_dir=str(run_dir), name="a", total_steps=3, first_step=first, config={})
        )
        self.checkpointer = Checkpointer(run_dir, self.settings.checkpoint)
        self.ledger = Ledger(run_dir, first)
        self.preemption = Preemption()
        self.clock = PhaseClock()
        self.saving = Saving()
        self.stateful = {}
        self.inputs = {}
        self.stopped = False
        self.steps_done = self.optimizer_steps = self.weight_version = 0

    def step(self, started: float | None = None) -> dict[str, float]:
        number = self.steps_done + 1
        self.before(number)
        batch = SimpleNamespace(mini_batches=[], part=lambda indices: [])
        stats = replace(STATS, token_samples=(replace(TOKENS, step=number),))
        self._record(
            Sampled(arrived=[], returning=[], num_sampled=0, num_waves=1),
            Update(batch=batch, plan=None, probe_gap=0.0, stats=stats),
        )
        self.after(number)
        return {"train/step": float(number), "train/loss": number / 4}

    def begin(self) -> None: ...

    def evaluate(self) -> dict[str, float]:
        self.evaluating(self.steps_done)
        return {"eval/accuracy": self.steps_done / 8}

    def saved(self) -> list[str]:
        return [folder.name for folder in self.checkpointer.folders()]


def raised(error: Exception) -> None:
    raise error


def at(number: int, act: Callable[[], object]) -> Callable[[int], None]:
    """A function that calls `act` when it gets this number."""

    def called(given: int) -> None:
        if given == number:
            act()

    return called


def failing(error: Exception) -> Callable[[], None]:
    return lambda: raised(error)


def rows_of(run_dir: Path) -> list[tuple[float, float | None]]:
    """The step and the accuracy of each row."""
    return [(row["train/step"], row.get("eval/accuracy")) for row in read_metrics(run_dir)]


def checkpoint_of(run_dir: Path, step: int) -> Checkpoint:
    return read_checkpoint(run_dir / "checkpoints" / f"step_{step:06d}")


# -- a run directory that vanishes ----------------------------------------------------------------


def test_a_run_directory_that_vanishes_during_a_step_is_not_made_anew_and_the_step_is_saved(
    tmp_path: Path,
):
    run_dir = tmp_path / "run"
    loop = Loop(run_dir, before=at(2, lambda: shutil.rmtree(run_dir)))
    with pytest.raises(RunDirectoryError, match="was removed, moved or replaced") as caught:
        loop.run()
    assert not isinstance(caught.value, RunDirectoryTaken)
    assert [path.name for path in run_dir.iterdir()] == ["checkpoints"]
    assert checkpoint_of(run_dir, 2).state.metrics == {
        "train/step": 2.0,
        "train/loss": 0.5,
        "eval/accuracy": 0.25,
    }


def test_nothing_is_written_into_another_directory_that_takes_the_place_of_the_runs_own(
    tmp_path: Path,
):
    run_dir = tmp_path / "run"

    def take() -> None:
        run_dir.rename(tmp_path / "moved")
        run_dir.mkdir()

    loop = Loop(run_dir, before=at(2, take))
    with pytest.raises(RunDirectoryTaken, match="another directory has replaced the run's own"):
        loop.run()
    assert list(run_dir.iterdir()) == []


def test_the_token_samples_of_each_step_are_in_the_run_directory(tmp_path: Path):
    Loop(tmp_path).run()
    assert [rows[0].step for rows in read_token_samples(tmp_path)] == [1, 2, 3]


# -- errors that end the run ----------------------------------------------------------------------


each_outage = pytest.mark.parametrize(
    "error", [RewardError("judge"), ServerError("url"), FleetExhausted("r")]
)


@each_outage
def test_a_run_that_gets_no_rewards_scores_or_responses_saves_the_steps_before(
    tmp_path: Path, error: HybridRLError
):
    loop = Loop(tmp_path, before=at(3, failing(error)))
    with pytest.raises(type(error), match=f"^{error}$"):
        loop.run()
    assert loop.saved() == ["step_000002"] and rows_of(tmp_path) == [(1, None), (2, 0.25)]
    assert checkpoint_of(tmp_path, 2).state.metrics["eval/accuracy"] == 0.25


@each_outage
def test_an_error_after_the_update_of_a_step_saves_nothing_since_the_step_is_not_complete(
    tmp_path: Path, error: HybridRLError
):
    loop = Loop(tmp_path, after=at(2, failing(error)))
    with pytest.raises(type(error), match=f"^{error}$"):
        loop.run()
    assert loop.saved() == [] and len(read_ledger(tmp_path)) == 2


def test_a_signal_while_a_learner_rank_dies_ends_the_run_and_its_message_names_both(
    tmp_path: Path,
):
    loop = Loop(tmp_path)

    def end() -> None:
        loop.preemption.signal_name = "SIGTERM"
        loop.learner.error = WorkerDied("learner/0", "begin_save", "its process has ended")

    loop.after = at(2, end)
    with pytest.raises(
        CheckpointError,
        match=r"^ended by SIGTERM; .*; step 2 has no checkpoint \(older ones are intact\): "
        "learner/0 failed in begin_save: its process has ended$",
    ) as caught:
        loop.run()
    assert isinstance(caught.value.__cause__, Preempted) and loop.saved() == []


def test_an_error_of_on_step_is_raised_even_if_a_learner_rank_dies_while_its_step_is_saved(
    tmp_path: Path,
):
    def stop(step: int, row: Mapping[str, float]) -> None:
        raise KeyError("mine")

    loop = Loop(tmp_path, on_step=stop)
    loop.learner.error = WorkerDied("learner/0", "begin_save", "its process has ended")
    with pytest.raises(KeyError, match="mine") as caught:
        loop.run()
    assert caught.value.__notes__ == [
        "on_step raised this after step 1 of the run",
        "the step has no checkpoint (older ones are intact): learner/0 failed in begin_save: its "
        "process has ended",
    ]


def test_messages_about_the_step_that_is_under_way_count_it_from_1(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Two steps are done, so it is step 3. All of its reward calls fail, or its sampler and learner
    differ by 9 nats, or a small KL is rounded.
    """
    loop = Loop(tmp_path, "model.dtype=bfloat16")
    loop.steps_done, loop.warned_of_rounding = 2, False
    rewards = make_rewards(make_batch([((1,), [(2,), (3,)])]), [math.nan, math.nan])
    arrived = SimpleNamespace(rewards=rewards, groups=())
    loop.learns_from_rewards = True
    loop.pipeline.take = lambda step: SimpleNamespace(drawn=[])
    loop.sampling = SimpleNamespace(
        headers=lambda drawn: [],
        arrived=lambda drawn, headers, step: [arrived],
        stale_prompts=lambda arrived, step: [],
    )
    with pytest.raises(RewardError, match=r"^step 3: 100\.0% of the reward calls failed"):
        loop._sample()
    loop._planned = lambda used: (
        SimpleNamespace(groups=[], values=[]),
        SimpleNamespace(step=loop.steps_done),
    )
    loop.probe = SimpleNamespace(check=lambda: 0.0)
    loop.learner.learn = lambda *arguments: replace(STATS, logprob_gap=9.0)
    with pytest.raises(WeightSyncError, match=r"^step 3: sampler and learner differ by 9 nats"):
        loop._learn(SimpleNamespace(arrived=[]))
    loop._warn_of_rounding(replace(STATS, token_kl=0.001))
    assert "step 3: the KL to the teacher is 0.001 nats a token" in caplog.text


# -- the row of a step whose evaluation or row failed ---------------------------------------------


def resumed(run_dir: Path, step: int) -> None:
    """Continue the run from its checkpoint of this step to the end."""
    checkpoint = checkpoint_of(run_dir, step)
    loop = Loop(run_dir, first=step)
    train_on(loop, checkpoint, {}, missing_row(run_dir, checkpoint))


@pytest.mark.parametrize("step", [2, 3])
def test_a_step_whose_evaluation_failed_is_saved_and_a_resume_evaluates_it_and_logs_its_row(
    tmp_path: Path, step: int
):
    """Step 3 is the last one, so the resumed run has no other step to take."""
    loop = Loop(tmp_path, evaluating=at(step, failing(ServerError("url"))))
    with pytest.raises(ServerError, match=r"^url$"):
        loop.run()
    assert loop.saved() == [f"step_{step:06d}"]
    assert [number for number, _ in rows_of(tmp_path)] == list(range(1, step))
    resumed(tmp_path, step)
    assert rows_of(tmp_path) == [(1, None), (2, 0.25), (3, 0.375)]
    assert [row["train/loss"] for row in read_metrics(tmp_path)] == [0.25, 0.5, 0.75]


def test_a_row_that_could_not_be_logged_is_logged_from_the_checkpoint_by_a_resume(tmp_path: Path):
    metrics = tmp_path / "metrics.jsonl"

    def replace_file() -> None:
        content = metrics.read_bytes()
        metrics.rename(tmp_path / "other.jsonl")
        metrics.write_bytes(content)
        (tmp_path / "other.jsonl").write_text("")

    loop = Loop(tmp_path, after=at(2, replace_file))
    with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl: was removed, moved or replaced"):
        loop.run()
    assert rows_of(tmp_path) == [(1, None)] and loop.saved() == ["step_000002"]
    resumed(tmp_path, 2)
    assert rows_of(tmp_path) == [(1, None), (2, 0.25), (3, 0.375)]


def test_no_row_is_missing_where_it_is_logged_or_the_checkpoint_has_none(tmp_path: Path):
    Loop(tmp_path).run()
    checkpoint = checkpoint_of(tmp_path, 3)
    assert missing_row(tmp_path, checkpoint) is None and missing_row(tmp_path, None) is None
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"train/step": 2}) + "\n")
    assert missing_row(tmp_path, checkpoint) == checkpoint.state.metrics
    without = replace(checkpoint, state=replace(checkpoint.state, metrics={}))
    assert missing_row(tmp_path, without) is None
