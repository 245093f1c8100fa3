"""The contents of a run in Weights & Biases, read from the file that wandb writes offline."""

import json
import math
import subprocess
from pathlib import Path

import pytest

from hybridrl.core.git_commit import git_commit
from hybridrl.settings.run import TrackingConfig
from hybridrl.tracking.wandb_internals import quiet_settings
from hybridrl.tracking.wandb_sink import WandbSink
from hybridrl.types import FinishReason, RunInfo, Sample
from tests.support.wandb_file import config, records, tables, wait_for

SETTINGS = {"model": {"path": "builtin:student"}, "train": {"lr": 0.001}, "run": {"seed": 3}}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


def started(run_dir: Path, tracking: TrackingConfig) -> WandbSink:
    sink = WandbSink(tracking)
    sink.start(
        RunInfo(run_dir=str(run_dir), name="a", total_steps=4, first_step=0, config=SETTINGS)
    )
    return sink


def name_of(run_dir: Path) -> str:
    [begun] = [record.run for record in records(run_dir) if record.HasField("run")]
    return begun.display_name


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with one commit of one file, as the working directory of the test."""
    folder = tmp_path / "mine"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "train.py").write_text("1")
    git(folder, "add", "train.py")
    git(folder, "commit", "--quiet", "--message", "first")
    monkeypatch.chdir(folder)
    return folder


def test_the_commit_is_that_of_the_working_directory_and_says_where_files_differ_from_it(
    repository: Path,
) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    git(repository, "tag", "a-tag")
    (repository / "untracked").write_text("2")
    assert git_commit() == commit
    (repository / "train.py").write_text("2")
    assert git_commit() == f"{commit}-dirty"


def test_outside_of_a_repository_without_a_commit_and_without_git_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert git_commit() is None
    git(tmp_path, "init", "--quiet")
    assert git_commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None


def test_a_run_has_a_name_by_its_settings_and_in_its_config_the_commit(
    repository: Path, tmp_path: Path
) -> None:
    started(tmp_path, TrackingConfig()).close(0)
    assert name_of(tmp_path) == "a student lr=0.001 seed=3"
    found = config(tmp_path)
    assert found["git_commit"] == git(repository, "rev-parse", "HEAD")
    assert {key: found[key] for key in SETTINGS} == SETTINGS


def test_a_name_in_the_settings_is_the_run_s(tmp_path: Path) -> None:
    started(tmp_path, TrackingConfig(name="mine")).close(0)
    assert name_of(tmp_path) == "mine"


def test_the_machine_is_watched_where_the_settings_say_so_and_not_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB__STATS_SAMPLING_INTERVAL", "0.1")  # by default 15 s
    sink = started(tmp_path, TrackingConfig(system_metrics=True))
    # Log rows until it is written: wandb writes full blocks of 32 KiB, or everything after 15 s.
    row = {"train/step": 1.0, **{f"metric/{i}": 0.0 for i in range(1000)}}
    wait_for(tmp_path, "stats", meanwhile=lambda: sink.log(row))
    sink.close(0)
    recorded = records(tmp_path)
    assert "memory_percent" in {item.key for r in recorded for item in r.stats.item}
    assert not any(r.HasField("environment") for r in recorded)
    assert list(tmp_path.rglob("wandb-metadata.json")) == []


def test_the_machine_is_not_watched_by_default(tmp_path: Path) -> None:
    started(tmp_path, TrackingConfig()).close(0)
    settings = quiet_settings(init_s=30, finish_s=2)
    assert settings.x_disable_stats and settings.x_disable_machine_info
    assert not any(r.HasField("stats") for r in records(tmp_path))


def rollout(response: str, reward: float, **parts: float) -> Sample:
    return Sample(
        step=10,
        uid="train-0@0",
        prompt="1 2=3:",
        response=response,
        reward=reward,
        finish_reason=FinishReason.stop,
        question="1 2=3",
        answer="1+2",
        parts=parts,
    )


def test_rollouts_are_a_table_with_the_reference_answer_and_the_value_of_each_reward(
    tmp_path: Path,
) -> None:
    sink = started(tmp_path, TrackingConfig())
    sink.rollouts(
        [
            rollout("1+2", 1.5, countdown=1.0, brief=0.5),
            rollout("3", 0.25, countdown=math.nan, brief=0.25),
        ]
    )
    sink.rollouts([])
    sink.close(0)
    [table] = tables(tmp_path, "train/rollouts")
    names = ["prompt", "response", "answer", "reward", "reward/countdown", "reward/brief"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [rows[0][name] for name in names] == ["1 2=3:", "1+2", "1+2", 1.5, 1.0, 0.5]
    assert math.isnan(rows[1]["reward/countdown"])
    logged = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in r.history.item}
        for r in records(tmp_path)
        if r.HasField("history")
    ]
    assert [row["train/step"] for row in logged if "train/rollouts" in row] == [10]
