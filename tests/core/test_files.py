"""What is on disk when we say so: a loss of power cannot be had in a test, so what is synced, and
when, is written down.
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
    """(name, bytes) of each file that is synced, and (name, number of entries) of each folder, from
    then on.
    """
    found, sync = [], os.fsync

    def record(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        found.append(
            (path.name, len(list(path.iterdir())) if path.is_dir() else path.stat().st_size)
        )
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return found


def test_a_replaced_file_is_synced_before_it_takes_the_place_and_its_folder_after(
    tmp_path: Path, synced: list
):
    (tmp_path / "a.txt").write_text("old")
    replace_text(tmp_path / "a.txt", "newer")
    assert (tmp_path / "a.txt").read_text() == "newer" and [p.name for p in tmp_path.iterdir()] == [
        "a.txt"
    ]
    assert synced == [(".a.txt", 5), (tmp_path.name, 1)]


def test_settings_ledger_and_rows_are_synced_when_a_run_begins(tmp_path: Path, synced: list):
    settings = load_config(["experiment=quickstart", f"run.dir={tmp_path}"])
    assert find_checkpoint(settings, tmp_path, {}) is None
    assert synced[0] == (".config.yaml", (tmp_path / "config.yaml").stat().st_size) and synced[
        1
    ] == (tmp_path.name, 1)
    Ledger(tmp_path, first_step=0).close()
    assert synced[2:] == [(".ledger.jsonl", 0), (tmp_path.name, 2)]


def test_a_row_is_on_disk_before_a_checkpoint_can_follow_it(tmp_path: Path, synced: list):
    sink = JsonlSink()
    sink.start(RunInfo(run_dir=str(tmp_path), name="a", total_steps=2, first_step=0, config={}))
    assert synced == [(".metrics.jsonl", 0), (tmp_path.name, 2)], "metrics.jsonl and samples/"
    sink.log({"train/step": 1})
    assert synced[2:] == [("metrics.jsonl", len('{"train/step": 1}\n'))]
    sink.close(0)


def test_the_folder_of_checkpoints_has_its_name_on_disk_before_the_first_is_committed(
    tmp_path: Path, synced: list
):
    Checkpointer(tmp_path, CheckpointConfig()).save(STATE, [])
    assert synced[0] == (tmp_path.name, 1) and synced[-1] == ("checkpoints", 1), (
        "after both the checkpoint has its name"
    )
