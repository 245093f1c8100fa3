"""Durability: which files and folders are synced to disk, and in which order.

A test cannot cut the power, so it records the calls of os.fsync.
"""

import os
from pathlib import Path

import pytest

from hybridrl.core.files import replace_text
from hybridrl.run_dir.checkpoint import Checkpointer, RunState
from hybridrl.run_dir.directory import find_checkpoint
from hybridrl.run_dir.ledger import Ledger
from hybridrl.settings.checkpointing import CheckpointConfig
from hybridrl.settings.compose import load_config
from hybridrl.tracking.jsonl import JsonlSink
from hybridrl.types import RunInfo

STATE = RunState(step=1, weight_version=1, optimizer_steps=1, parts={}, metrics={})


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The calls of os.fsync: (name, bytes) for a file, (name, number of entries) for a folder."""
    calls: list[tuple[str, int]] = []
    sync = os.fsync

    def record(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        size = len(list(path.iterdir())) if path.is_dir() else path.stat().st_size
        calls.append((path.name, size))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return calls


def test_a_new_file_is_synced_before_it_replaces_the_old_one_and_its_folder_after(
    tmp_path: Path, synced: list
):
    (tmp_path / "a.txt").write_text("old")
    replace_text(tmp_path / "a.txt", "newer")
    assert (tmp_path / "a.txt").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert synced == [(".a.txt", 5), (tmp_path.name, 1)]


def test_settings_ledger_and_rows_are_synced_when_a_run_begins(tmp_path: Path, synced: list):
    settings = load_config(["experiment=quickstart", f"run.dir={tmp_path}"])
    assert find_checkpoint(settings, tmp_path, {}) is None
    assert synced[0] == (".config.yaml", (tmp_path / "config.yaml").stat().st_size)
    assert synced[1] == (tmp_path.name, 1)
    Ledger(tmp_path, first_step=0).close()
    assert synced[2:] == [(".ledger.jsonl", 0), (tmp_path.name, 2)]


def test_a_row_is_on_disk_before_a_checkpoint_can_follow_it(tmp_path: Path, synced: list):
    sink = JsonlSink()
    sink.start(RunInfo(run_dir=str(tmp_path), name="a", total_steps=2, first_step=0, config={}))
    assert synced == [(".metrics.jsonl", 0), (tmp_path.name, 2)], "metrics.jsonl and samples/"
    sink.log({"train/step": 1})
    assert synced[2:] == [("metrics.jsonl", len('{"train/step": 1}\n'))]
    sink.close(0)


def test_the_checkpoint_folders_name_is_on_disk_before_the_first_checkpoint_is_committed(
    tmp_path: Path, synced: list
):
    Checkpointer(tmp_path, CheckpointConfig()).save(STATE, [])
    assert synced[0] == (tmp_path.name, 1)
    assert synced[-1] == ("checkpoints", 1), "the last call makes the checkpoint's name durable"
