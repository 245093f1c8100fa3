"""A run that is stopped after any step and continued equals a run that was never stopped.

All tests use one graph, with two ranks of ZeRO 2. The run reaches a second epoch, and has a
schedule that depends on a metric.
"""

import logging
import pickle
import random
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import count
from pathlib import Path
from types import FunctionType, MethodType

import numpy as np
import pytest
import ray
from ray.util.placement_group import PlacementGroup

from hybridrl.controller.controller import Controller, OnStep
from hybridrl.controller.global_batch import trained_uids
from hybridrl.controller.pipeline import wave_seed
from hybridrl.controller.preemption import Preemption
from hybridrl.controller.sampling import Arrived
from hybridrl.core import files as durable
from hybridrl.core.errors import (
    CheckpointError,
    LedgerError,
    Preempted,
    RunDirectoryError,
    RunDirectoryTaken,
    StopTraining,
)
from hybridrl.data.mixture import prompt_cursor
from hybridrl.data.prompts import PromptSource
from hybridrl.launch.preparation import prepare_prompts
from hybridrl.rollout.header import chunk_header
from hybridrl.rollout.sampler import sample_seed
from hybridrl.run_dir.checkpoint import Checkpointer, read_checkpoint, step_folders
from hybridrl.run_dir.directory import find_checkpoint, run_directory
from hybridrl.run_dir.ledger import (
    Ledger,
    check_cursor,
    check_ledger,
    drawn_uids,
    read_ledger,
)
from hybridrl.runtime.cluster import Cluster
from hybridrl.runtime.workers import Workers, place_workers, start_workers
from hybridrl.settings.choices import WeightTransfer
from hybridrl.settings.run import RunSettings
from hybridrl.tracking.machine_metrics import OF_THE_MACHINE
from hybridrl.tracking.sink import Sinks
from hybridrl.types import Prompt, RunInfo, Sample
from tests.support.batches import make_batch, make_rewards
from tests.support.failing_disk import no_more_files
from tests.support.graph import tiny_settings

STEPS = 3


@dataclass
class Recorder:
    """A sink that records the rows it receives, and the controller's state at each of them."""

    controller: Controller | None = None
    rows: list[dict[str, float]] = field(default_factory=list)
    samples_seen: list[Sequence[Sample]] = field(default_factory=list)
    rollouts_seen: list[Sequence[Sample]] = field(default_factory=list)
    held: list[dict[str, object]] = field(default_factory=list)
    then: Callable[[], None] = lambda: None

    def start(self, info: RunInfo) -> None: ...

    def log(self, metrics: Mapping[str, float]) -> None:
        self.rows.append(
            {key: value for key, value in metrics.items() if not key.startswith(OF_THE_MACHINE)}
        )
        self.held.append(contents(self.controller))
        self.then()

    def samples(self, rows: Sequence[Sample]) -> None:
        self.samples_seen.append(rows)

    def rollouts(self, rows: Sequence[Sample]) -> None:
        self.rollouts_seen.append(rows)

    def close(self, exit_code: int) -> None: ...


STATELESS = (
    ray.ObjectRef,
    ray.actor.ActorHandle,
    PlacementGroup,
    ThreadPoolExecutor,
    FunctionType,
    MethodType,
    Path,  # the run directory
    count,  # numbers the files of a trace
    Recorder,
)
"""Types whose objects contain nothing that a checkpoint would have to store."""


def contents(value: object, path: str = "", within: tuple[int, ...] = ()) -> dict[str, object]:
    """Every plain value that is reachable from one of the package's objects, by its path."""
    if isinstance(value, str | int | float | bytes | None):
        return {path: value}
    if isinstance(value, np.ndarray | np.random.Generator | random.Random):
        return {path: pickle.dumps(value)}
    values: dict[str, object] = {}
    if id(value) not in within:
        for where, item in parts_of(value):
            values |= contents(item, f"{path}{where}", (*within, id(value)))
    return values


def parts_of(value: object) -> list[tuple[str, object]]:
    """The values in a container or in an object of the package, except for Ray handles, files and
    recorders.
    """
    if isinstance(value, Mapping):
        return [(f"[{key}]", item) for key, item in value.items()]
    if isinstance(value, list | tuple | deque):
        return [(f"[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return [("", repr(sorted(value, key=repr)))]
    if isinstance(value, STATELESS):
        return []
    assert type(value).__module__.startswith("hybridrl."), f"{type(value)}: compare its content"
    names = [f.name for f in fields(value)] if is_dataclass(value) else vars(value)
    return [(f".{name}", getattr(value, name)) for name in names]


@dataclass
class Graph:
    settings: RunSettings
    workers: Workers
    prompts: list[Prompt]
    heldout: list[Prompt]
    weights: Mapping[str, float] = field(default_factory=dict)  # weights of the data sources

    def controller(
        self, run_dir: Path, steps_done: int = 0, settings: RunSettings | None = None
    ) -> tuple[Controller, Recorder]:
        run_dir.mkdir(exist_ok=True)
        recorder = Recorder()
        made = Controller(
            settings or self.settings,
            workers=self.workers,
            backend=WeightTransfer.object_store,
            prompts=prompt_cursor(self.prompts, self.settings.run.seed, self.weights),
            heldout=self.heldout,
            inputs={},
            sinks=Sinks(required=[recorder]),
            checkpointer=Checkpointer(run_dir, self.settings.checkpoint),
            ledger=Ledger(run_dir, steps_done),
            preemption=Preemption(),
        )
        recorder.controller = made
        return made, recorder


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    folder = tmp_path_factory.mktemp("resume")
    settings = tiny_settings(
        folder,
        f"train.steps={STEPS}",
        "train.prompts_per_step=8",
        "train.updates_per_batch=2",
        "train.epochs_per_batch=2",
        "algorithm.ratio.kind=clip",
        "algorithm.ratio.low=0.2",
        "algorithm.ratio.high=0.2",
        "data.num_train=20",
        "eval.every=2",
        "eval.samples=2",
        "tracking.rollouts_every=2",
        "tracking.rollouts=5",
        "checkpoint.every=1",
        f"checkpoint.keep={STEPS}",
        "learner.ranks=2",
        "learner.zero_stage=2",
        "cluster.threads_per_worker=1",
        "algorithm.imitation_weight={kind: feedback, value: 1, metric: kl/token, target: 0.1}",
    )
    with Cluster(settings) as cluster:
        slots = place_workers(settings, cluster)
        log_dir = str(folder / "logs")
        workers = start_workers(settings, cluster, slots, log_dir)
        yield Graph(settings, workers, *prepare_prompts(settings))


@dataclass
class Whole:
    run_dir: Path
    recorder: Recorder
    fresh: dict[str, object]  # the contents of the controller before its first step

    def folder(self, step: int) -> Path:
        return self.run_dir / "checkpoints" / f"step_{step:06d}"


@pytest.fixture(scope="module")
def whole(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    run_dir = tmp_path_factory.mktemp("whole")
    controller, recorder = graph.controller(run_dir)
    controller.publish_weights()
    fresh = contents(controller)
    controller.run()
    return Whole(run_dir, recorder, fresh)


def continued(graph: Graph, whole: Whole, step: int, run_dir: Path) -> tuple[Controller, Recorder]:
    """Make another controller for the same workers and resume the run with it."""
    controller, recorder = graph.controller(run_dir, step)
    controller.load_state(read_checkpoint(whole.folder(step)).state, str(whole.folder(step)))
    controller.publish_weights()
    return controller, recorder


@pytest.mark.graph
@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_run_continued_after_any_step_is_bit_for_bit_the_one_that_went_on(
    graph: Graph, whole: Whole, step: int, tmp_path: Path
):
    controller, recorder = continued(graph, whole, step, tmp_path)
    controller.run()
    assert [row["train/step"] for row in recorder.rows] == list(range(step + 1, STEPS + 1))
    assert recorder.rows == whole.recorder.rows[step:]
    assert recorder.samples_seen == whole.recorder.samples_seen[-len(recorder.samples_seen) :]
    assert recorder.rollouts_seen == whole.recorder.rollouts_seen[step // 2 :]
    assert read_ledger(tmp_path) == read_ledger(whole.run_dir)[step:]
    for done in range(step + 1, STEPS + 1):
        ours = tmp_path / "checkpoints" / f"step_{done:06d}"
        theirs = whole.folder(done)
        names = sorted(path.name for path in theirs.glob("*.safetensors"))
        assert len(names) == 2 and all(
            (ours / name).read_bytes() == (theirs / name).read_bytes() for name in names
        )
        assert read_checkpoint(ours).state.parts == read_checkpoint(theirs).state.parts


@pytest.mark.graph
def test_each_second_step_shows_rollouts_with_their_question_and_the_value_of_each_reward(
    graph: Graph, whole: Whole
):
    assert [len(rows) for rows in whole.recorder.rollouts_seen] == [5], "of step 2 of 3"
    [rows] = whole.recorder.rollouts_seen
    assert {row.step for row in rows} == {2}
    assert len({row.uid for row in rows[:4]}) == 1 and rows[4].uid != rows[0].uid, "4 siblings"
    questions = {prompt.uid.split("@")[0]: prompt.question for prompt in graph.prompts}
    assert [row.question for row in rows] == [questions[row.uid.split("@")[0]] for row in rows]
    assert all(row.parts == {"countdown": row.reward} and row.response for row in rows)


@pytest.mark.graph
def test_a_run_on_two_sources_is_continued_bit_for_bit(graph: Graph, tmp_path: Path):
    """A step has 6 prompts of a and 2 of b. In step 3 source a, which has 14 prompts, begins a new
    epoch.
    """
    names = ["a"] * 14 + ["b"] * 6
    prompts = [
        replace(prompt, uid=f"{name}/{prompt.uid}")
        for name, prompt in zip(names, graph.prompts, strict=True)
    ]
    mixed = replace(graph, prompts=prompts, weights={"a": 0.75, "b": 0.25})
    whole_dir, part_dir = tmp_path / "whole", tmp_path / "part"
    controller, recorder = mixed.controller(whole_dir)
    controller.publish_weights()
    controller.run()
    assert [row["data/a/share"] for row in recorder.rows] == [0.75] * STEPS
    assert recorder.rows[-1]["data/a/epochs"] == 18 / 14
    assert recorder.rows[-1]["data/b/epochs"] == 1.0
    folder = whole_dir / "checkpoints" / "step_000001"
    resumed, ours = mixed.controller(part_dir, 1)
    resumed.load_state(read_checkpoint(folder).state, str(folder))
    resumed.publish_weights()
    resumed.run()
    assert ours.rows == recorder.rows[1:]
    assert read_ledger(part_dir) == read_ledger(whole_dir)[1:]
    last = [path / "checkpoints" / f"step_{STEPS:06d}" for path in (whole_dir, part_dir)]
    states = [read_checkpoint(path).state.parts for path in last]
    assert states[0] == states[1]
    weights = [sorted(path.glob("*.safetensors")) for path in last]
    assert [p.read_bytes() for p in weights[0]] == [p.read_bytes() for p in weights[1]]
    cursor = states[0]["pipeline"]["prompts"]
    check_ledger(whole_dir, STEPS, drawn_uids(prompts, graph.settings.run.seed, cursor))


NO_STATE = (".clock.", ".load.under_way", ".pings[", ".saving.", ".unmeasured[")
"""Parts of attribute paths that a checkpoint need not store: seconds that the next row reports,
calls in flight, of which a resumed run has none, the state of files on disk, which the save after
the row changes, and metrics that this process has not seen yet.
"""


@pytest.mark.graph
@pytest.mark.parametrize("step", range(1, STEPS))
def test_whatever_a_step_changes_in_the_controller_comes_back_with_the_checkpoint(
    graph: Graph, whole: Whole, step: int, tmp_path: Path
):
    """All attributes are compared, so one that a step changes but no state_dict stores is reported
    by its name.
    """
    before = whole.fresh
    after = whole.recorder.held[step - 1]
    moved = {
        path
        for path in before | after
        if before.get(path) != after.get(path) and not any(name in path for name in NO_STATE)
    }
    assert {
        ".steps_done",
        ".weight_version",
        ".optimizer_steps",
        ".pipeline.prompts.position",
        ".coefficients.schedules[imitation].held",
    } <= moved
    controller, _ = continued(graph, whole, step, tmp_path)
    loaded = contents(controller)
    assert sorted(path for path in moved if loaded.get(path) != after.get(path)) == []


@pytest.mark.graph
def test_while_sampling_runs_ahead_a_stopped_run_still_trains_each_prompt_once(
    graph: Graph, whole: Whole, tmp_path: Path
):
    """The run is stopped after step 2 with the prompts of step 3 in flight, which are drawn
    again.
    """
    settings = replace(
        graph.settings, pipeline=replace(graph.settings.pipeline, ahead=1, max_staleness=1)
    )
    shutil.copy(whole.run_dir / "ledger.jsonl", tmp_path)
    for folder, last in ((whole.folder(1), 2), (tmp_path / "checkpoints" / "step_000002", 3)):
        controller, _ = graph.controller(tmp_path, last - 1, settings)
        controller.load_state(read_checkpoint(folder).state, str(folder))
        controller.publish_weights()
        controller.save(controller.step(), last=True)
        cursor = controller.pipeline.state_dict()["prompts"]
        assert len(cursor["owed"]) == (8 if last == 2 else 0)
        check_ledger(tmp_path, last, drawn_uids(graph.prompts, settings.run.seed, cursor))


@pytest.mark.graph
def test_a_checkpoint_that_fails_is_told_and_the_run_goes_on_but_not_past_its_end(
    graph: Graph, whole: Whole, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    controller, recorder = continued(graph, whole, 1, tmp_path)
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(CheckpointError, match="step_000003: not saved"),
    ):
        controller.run()
    assert (
        "step 2 has no checkpoint (older ones are intact): " in caplog.text
        and len(recorder.rows) == 2
    )


@pytest.mark.graph
def test_told_to_end_while_checkpoints_fail_it_ends_and_says_that_the_step_was_not_saved(
    graph: Graph, whole: Whole, tmp_path: Path
):
    controller, recorder = continued(graph, whole, 1, tmp_path)
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    recorder.then = lambda: setattr(controller.preemption, "signal_name", "SIGTERM")
    says = r"^ended by SIGTERM; .*; step 2 has no checkpoint \(older ones are intact\): .*not saved"
    with pytest.raises(CheckpointError, match=says) as raised:
        controller.run()
    assert len(recorder.rows) == 1 and isinstance(raised.value.__cause__, Preempted)


@pytest.mark.graph
def test_a_run_whose_directory_is_removed_saves_what_it_learned_ends_and_can_be_continued(
    graph: Graph, whole: Whole, tmp_path: Path
):
    """Step 2 would not be saved regularly, and the directory is empty when its row is written."""
    run_dir = tmp_path / "run"
    seldom = replace(graph.settings, checkpoint=replace(graph.settings.checkpoint, every=0))
    controller, recorder = graph.controller(run_dir, 1, seldom)
    folder = whole.folder(1)
    controller.load_state(read_checkpoint(folder).state, str(folder))
    controller.publish_weights()
    recorder.then = lambda: shutil.rmtree(run_dir)
    with pytest.raises(RunDirectoryError, match=r"ledger\.jsonl: was removed, moved or replaced"):
        controller.run()
    settings = replace(seldom, run=replace(seldom.run, dir=str(run_dir)))
    with run_directory(settings):
        assert find_checkpoint(settings, run_dir, {}).state.step == 2


def calling(
    graph: Graph, whole: Whole, run_dir: Path, on_step: OnStep
) -> tuple[Controller, Recorder]:
    """A run after step 1 of 3 that saves only its last step, and calls `on_step`."""
    seldom = replace(graph.settings, checkpoint=replace(graph.settings.checkpoint, every=0))
    controller, recorder = graph.controller(run_dir, 1, seldom)
    controller.load_state(read_checkpoint(whole.folder(1)).state, str(whole.folder(1)))
    controller.publish_weights()
    controller.on_step = on_step
    return controller, recorder


@pytest.mark.graph
def test_what_on_step_raises_ends_the_run_at_a_checkpoint_and_arrives_with_its_own_traceback(
    graph: Graph, whole: Whole, tmp_path: Path
):
    def divide_by_zero(step: int, metrics: Mapping[str, float]) -> float:
        return step / 0

    controller, recorder = calling(graph, whole, tmp_path, divide_by_zero)
    with pytest.raises(ZeroDivisionError) as raised:
        controller.run()
    assert raised.traceback[-1].name == "divide_by_zero"
    assert raised.value.__notes__ == [
        "on_step raised this after step 2 of the run",
        "the step is saved, and the same call continues after it",
    ]
    assert [row["train/step"] for row in recorder.rows] == [2]
    assert [folder.name for folder in step_folders(tmp_path)] == ["step_000002"]


@pytest.mark.graph
def test_a_step_that_cannot_be_saved_after_an_error_of_on_step_is_not_called_saved(
    graph: Graph, whole: Whole, tmp_path: Path
):
    def fill_the_disk(step: int, metrics: Mapping[str, float]) -> None:
        (tmp_path / "checkpoints").write_text("a file where the folder should be")
        raise KeyError("of the caller")

    controller, _ = calling(graph, whole, tmp_path, fill_the_disk)
    with pytest.raises(KeyError) as raised:
        controller.run()
    whose, what = raised.value.__notes__
    assert whose == "on_step raised this after step 2 of the run"
    assert what.startswith("the step has no checkpoint (older ones are intact): ")


@pytest.mark.graph
def test_stop_training_ends_the_run_after_a_checkpoint_from_which_the_rest_is_the_same(
    graph: Graph, whole: Whole, tmp_path: Path
):
    calls: list[tuple[int, float]] = []

    def stop(step: int, metrics: Mapping[str, float]) -> None:
        calls.append((step, metrics["train/step"]))
        raise StopTraining

    controller, recorder = calling(graph, whole, tmp_path, stop)
    controller.run()
    assert (controller.stopped, controller.steps_done, calls) == (True, 2, [(2, 2.0)])
    controller, later = graph.controller(tmp_path, 2)
    folder = tmp_path / "checkpoints" / "step_000002"
    controller.load_state(read_checkpoint(folder).state, str(folder))
    controller.publish_weights()
    controller.on_step = stop
    controller.run()
    assert recorder.rows + later.rows == whole.recorder.rows[1:]
    assert (controller.stopped, calls) == (False, [(2, 2.0), (3, 3.0)]), "it has all steps"


@pytest.mark.graph
def test_a_run_whose_directory_another_one_has_now_saves_nothing_there(
    graph: Graph, whole: Whole, tmp_path: Path
):
    run_dir = tmp_path / "run"
    controller, recorder = continued(graph, whole, 1, run_dir)

    def take() -> None:
        run_dir.rename(tmp_path / "moved")
        run_dir.mkdir()

    recorder.then = take
    with pytest.raises(
        RunDirectoryTaken, match="run: another directory has replaced the run's own"
    ):
        controller.run()
    assert list(run_dir.iterdir()) == []


@pytest.mark.graph
@pytest.mark.parametrize(
    "parts",
    [
        {"pipeline": [], "schedules": {}},
        {"pipeline": {"prompts": {"epoch": "x", "position": 1, "owed": []}}, "schedules": {}},
        {"pipeline": {"prompts": {"epoch": 0, "position": 1, "owed": [3]}}, "schedules": {}},
        {"pipeline": {"prompts": {}, "wave_bytes": 0}, "schedules": {}},
    ],
)
def test_a_state_of_another_form_is_refused(graph: Graph, whole: Whole, tmp_path: Path, parts):
    controller, _ = graph.controller(tmp_path)
    checkpoint = read_checkpoint(whole.folder(1))
    with pytest.raises(CheckpointError, match="its state of pipeline does not have the form"):
        controller.load_state(replace(checkpoint.state, parts=parts), str(checkpoint.folder))


@pytest.mark.graph
def test_a_checkpoint_without_the_state_of_a_part_is_refused(
    graph: Graph, whole: Whole, tmp_path: Path
):
    controller, _ = graph.controller(tmp_path)
    checkpoint = read_checkpoint(whole.folder(1))
    state = replace(checkpoint.state, parts={"pipeline": checkpoint.state.parts["pipeline"]})
    with pytest.raises(
        CheckpointError, match="has no state of schedules, so another version of hybridrl wrote it"
    ):
        controller.load_state(state, str(checkpoint.folder))


@pytest.mark.graph
def test_every_prompt_up_to_the_cursor_is_in_the_ledger_once(graph: Graph, whole: Whole):
    cursor = read_checkpoint(whole.folder(STEPS)).state.parts["pipeline"]["prompts"]
    assert (cursor["epoch"], cursor["position"]) == (1, 4), "24 prompts of 20 were drawn"
    drawn = drawn_uids(graph.prompts, graph.settings.run.seed, cursor)
    check_ledger(whole.run_dir, STEPS, drawn)
    with pytest.raises(LedgerError, match="never used: "):
        check_ledger(whole.run_dir, STEPS, [*drawn, "another@0"])


def test_a_samples_seed_depends_on_run_seed_step_prompt_and_index_alone():
    def seeds() -> list[int]:
        waves = [
            wave_seed(run, kind, step)
            for run in (0, 1)
            for kind in ("train", "eval")
            for step in (0, 1)
        ]
        return [
            sample_seed(wave, uid, index)
            for wave in waves
            for uid in ("a@0", "a@1")
            for index in (0, 1)
        ]

    assert (
        seeds() == seeds()
        and len(set(seeds())) == 32
        and all(0 <= seed < 2**63 for seed in seeds())
    )


def test_a_group_that_is_not_used_or_whose_reward_failed_is_passed_over_and_not_trained():
    batch = make_batch([((1,), [(2,), (3,)])] * 3)  # p0, p1, p2 with two responses each
    rewards = make_rewards(batch, [0.0] * 6, [True, True, True, False, True, True])
    chunk = Arrived(drawn=None, header=chunk_header(batch, 0.0), rewards=rewards, groups=(0, 1))
    assert trained_uids([chunk], [chunk], []) == (["p0"], ["p1", "p2"])
    assert trained_uids([chunk], [], []) == ([], ["p0", "p1", "p2"])
    cancelled = [Prompt(uid="p2", input_ids=(1,), text="", columns={})]
    assert trained_uids([chunk], [chunk], cancelled) == (["p0"], ["p1"]), "p2 comes again"


# -- the ledger alone ------------------------------------------------------------------------------


def ledger(run_dir: Path, *steps: tuple[int, list[str], list[str]], first_step: int = 0) -> Path:
    book = Ledger(run_dir, first_step)
    for step, trained, passed_over in steps:
        book.record(step, trained, passed_over)
    book.close()
    return run_dir


def test_a_ledger_in_order_is_accepted(tmp_path: Path):
    ledger(tmp_path, (1, ["a@0", "b@0"], []), (2, ["c@0"], ["a@1"]))
    check_ledger(tmp_path, 2, ["a@0", "b@0", "c@0", "a@1"])
    assert [line["step"] for line in read_ledger(tmp_path)] == [1, 2]
    with pytest.raises(LedgerError, match="never used: b@1"):
        check_ledger(tmp_path, 2, ["a@0", "b@0", "c@0", "a@1", "b@1"])


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([(1, ["a@0", "b@0"], []), (2, ["c@0", "b@0"], [])], r"used twice: b@0"),
        ([(1, ["a@0", "b@0"], []), (2, ["c@0"], ["a@0"])], r"used twice: a@0"),
        ([(1, ["a@0"], []), (2, ["c@0"], [])], r"never used: b@0"),
        ([(1, ["a@0", "b@0"], []), (2, ["c@0", "d@0"], [])], r"not drawn: d@0"),
        ([(1, ["a@0", "b@0", "c@0"], [])], r"steps: not each of 1 \.\.\. 2 once"),
        ([(1, ["a@0", "b@0"], []), (1, ["c@0"], [])], r"steps: not each of 1 \.\.\. 2 once"),
    ],
)
def test_a_prompt_twice_or_left_out_is_found(tmp_path: Path, lines, says: str):
    ledger(tmp_path, *lines)
    with pytest.raises(LedgerError, match=says):
        check_ledger(tmp_path, 2, ["a@0", "b@0", "c@0"])


def test_a_resumed_run_takes_the_steps_after_its_checkpoint_again(tmp_path: Path):
    ledger(tmp_path, (1, ["a@0"], []), (2, ["b@0"], []), (3, ["c@0"], []))
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"step": 4, "trai')  # a kill while writing
    ledger(tmp_path, (2, ["b@0"], []), first_step=1)
    check_ledger(tmp_path, 2, ["a@0", "b@0"])
    ledger(tmp_path)
    assert read_ledger(tmp_path) == []


def test_a_damaged_ledger_names_the_line(tmp_path: Path):
    (tmp_path / "ledger.jsonl").write_text(
        '{"step": 1}\n{"step": 2, "trained": [], "passed_over": []}\n'
    )
    with pytest.raises(LedgerError, match=r"ledger\.jsonl, line 1: not a line of a ledger"):
        Ledger(tmp_path, 2)


@pytest.mark.parametrize("damage", ["no json", '{"step": 3}', "[]", '{"step": "x"}', "{" * 2000])
def test_damage_after_the_checkpoints_step_is_cut_and_before_it_ends_the_resume(
    tmp_path: Path, damage: str
):
    ledger(tmp_path, (1, ["a@0"], []), (2, ["b@0"], []), (3, ["c@0"], []))
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()

    def resumed(*texts: str, step: int) -> list[int]:
        (tmp_path / "ledger.jsonl").write_text("".join(f"{text}\n" for text in texts))
        Ledger(tmp_path, step).close()
        return [line["step"] for line in read_ledger(tmp_path)]

    assert resumed(lines[0], lines[1], damage, step=2) == [1, 2]
    assert resumed(lines[0], lines[1], damage, lines[2], step=2) == [1, 2]
    assert resumed(lines[0], damage, step=0) == []
    with pytest.raises(LedgerError, match=r"ledger\.jsonl, line 2: "):
        resumed(lines[0], damage, lines[1], step=2)
    with pytest.raises(LedgerError, match=r"ledger\.jsonl, line 2: "):
        resumed(lines[0], damage, step=2)  # it may have been the line of step 2


def test_a_ledger_that_cannot_be_read_now_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ledger(tmp_path, (1, ["a@0"], []))
    before = (tmp_path / "ledger.jsonl").read_bytes()
    monkeypatch.setattr(durable, "RETRY_AFTER_S", ())
    with no_more_files(), pytest.raises(OSError, match="Too many open files"):
        Ledger(tmp_path, 1)
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_a_cursor_far_beyond_the_ledger_is_not_counted_out(tmp_path: Path):
    ledger(tmp_path, (1, ["a@0"], []))
    prompts = [Prompt(uid="a", input_ids=(1,), text="a", columns={})]
    check_cursor(tmp_path, prompts, {"epoch": 9, "position": 0, "owed": []})
    with pytest.raises(LedgerError, match=r"records 1 prompts, but .* is at 1000000000000"):
        check_cursor(tmp_path, prompts, {"epoch": 10**12, "position": 0, "owed": []})


def test_the_drawn_prompts_are_those_before_the_cursor():
    prompts = [Prompt(uid=name, input_ids=(1,), text=name, columns={}) for name in "abc"]
    source = PromptSource(prompts, seed=5)
    uids = [p.uid for p in source.next_batch(5)]
    assert drawn_uids(prompts, 5, source.state_dict()) == uids and len(set(uids)) == 5
    source.put_back([replace(prompts[0], uid=uids[1])])
    assert drawn_uids(prompts, 5, source.state_dict()) == [uids[0], *uids[2:]], "one comes again"
