"""The data of each built-in tracker, read by its own library: one row per step, also after a
resume.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybridrl.core.errors import ConfigError
from hybridrl.settings.run import SinkConfig, TrackingConfig
from hybridrl.tracking.mlflow_sink import MlflowSink, leaves
from hybridrl.tracking.sink import Sink
from hybridrl.tracking.tensorboard_sink import TensorBoardSink
from hybridrl.tracking.trackio_sink import TrackioSink
from hybridrl.tracking.user_sinks import build_sinks, check_sinks
from hybridrl.types import FinishReason, RunInfo, Sample


def info(run_dir: Path, first_step: int = 0) -> RunInfo:
    return RunInfo(
        run_dir=str(run_dir),
        name="demo",
        total_steps=3,
        first_step=first_step,
        config={"train": {"lr": 0.5}},
    )


def run_and_resume(make: Any, run_dir: Path) -> None:
    """Log three steps of which the third is lost, then continue after the second one with a new
    sink. The reward of step n is n / 4, except that it is 1 in the repeated step 3.
    """
    first: Sink = make()
    first.start(info(run_dir))
    for step in (1, 2, 3):
        first.log({"train/step": step, "reward/mean": step / 4})
    state = first.state_dict() if hasattr(first, "state_dict") else None
    first.close(1)
    second: Sink = make()
    if hasattr(second, "load_state_dict"):
        second.load_state_dict(state)
    second.start(info(run_dir, first_step=2))
    second.log({"train/step": 3, "reward/mean": 1.0})
    second.samples([row(3)])
    second.close(0)


def row(step: int) -> Sample:
    return Sample(
        step=step,
        uid="p7",
        prompt="3 7 9=24:",
        response="3*7",
        reward=0.0,
        finish_reason=FinishReason.stop,
    )


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_and_resume(TensorBoardSink, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rewards = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert rewards == [(1, 0.25), (2, 0.5), (3, 1.0)]
    [text] = events.Tensors("samples/p7/text_summary")
    assert text.step == 3 and b"3*7" in text.tensor_proto.string_val[0]


@pytest.fixture
def trackio_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for trackio, which reads the setting of its folder only when it is imported."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path / "trackio"
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        del sys.modules[name]


def test_trackio_continues_the_run_of_the_checkpoint_and_stays_on_this_machine(
    tmp_path: Path, trackio_folder: Path
) -> None:
    run_and_resume(TrackioSink, tmp_path)
    from trackio.sqlite_storage import SQLiteStorage

    [name] = SQLiteStorage.get_runs("hybridrl")
    assert name.startswith("demo-") and trackio_folder.is_dir()
    rows = [r for r in SQLiteStorage.get_logs("hybridrl", name) if "reward/mean" in r]
    # Rows that were logged after the checkpoint stay, and are logged again.
    assert [(r["step"], r["reward/mean"]) for r in rows] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
        (3, 1.0),
    ]


def test_mlflow_continues_the_run_of_the_checkpoint_in_a_file_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_and_resume(MlflowSink, tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("hybridrl")
    [run] = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert [(m.step, m.value) for m in history] == [(1, 0.25), (2, 0.5), (3, 0.75), (3, 1.0)]
    assert run.data.params == {"train.lr": "0.5"} and run.info.status == "FINISHED"


def test_settings_are_listed_by_their_dotted_names() -> None:
    assert leaves({"a": {"b": 1, "c": {}}, "d": [2]}, "") == [("a.b", 1), ("a.c", {}), ("d", [2])]


def tracking(sink: str, **options: Any) -> TrackingConfig:
    return TrackingConfig(sinks={"mine": SinkConfig(sink=sink, options=options)})


def test_a_tracker_is_named_by_one_word_and_built_from_its_options() -> None:
    [(name, sink)] = build_sinks(tracking("tensorboard", folder="events")).items()
    assert name == "tracking.sinks.mine" and isinstance(sink, TensorBoardSink)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (tracking("tensorbord"), "sink=tensorbord: must be one of .*; did you mean tensorboard?"),
        (tracking("mlflow", uri="x"), "options.uri: mlflow takes no such argument; remove it"),
        (tracking("csv"), "must be one of tensorboard, trackio, mlflow, ray; or write path/to"),
    ],
)
def test_a_tracker_that_cannot_be_built_is_refused(config: TrackingConfig, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_sinks(config)


@pytest.mark.parametrize(
    ("sink", "package"),
    [("trackio", "trackio"), ("mlflow", "mlflow"), ("mlflow", "sqlalchemy"), ("mlflow", "alembic")],
)
def test_a_tracker_without_its_packages_is_refused_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch, sink: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(
        ConfigError, match=rf"needs the package {package}, .*pip install 'hybridrl\[{sink}\]'"
    ):
        check_sinks(replace(tracking(sink)))
