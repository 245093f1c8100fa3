"""Checkpoints that appear whole or not at all."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from hybridrl.controller.checkpoint import Checkpointer, RunState, read_checkpoint
from hybridrl.errors import CheckpointError

STATE = RunState(step=10, weight_version=10, optimizer_steps=9, prompts={"epoch": 1, "at": 7}, schedules={"reward": 1.5}, wandb_id=None)


def write_learner(folder: str) -> None:
    (Path(folder) / "learner.safetensors").write_bytes(b"weights of the learner")


def save_steps(run_dir: Path, *steps: int, keep: int = 5) -> Checkpointer:
    checkpointer = Checkpointer(run_dir, keep)
    for step in steps:
        checkpointer.save(replace(STATE, step=step), write_learner)
    return checkpointer


def names(checkpointer: Checkpointer) -> list[str]:
    return [folder.name for folder in checkpointer.folders()]


def test_what_was_saved_is_read_back(tmp_path: Path):
    folder = Checkpointer(tmp_path, keep=2).save(STATE, write_learner)
    assert folder == tmp_path / "checkpoints" / "step_000010"
    assert sorted(p.name for p in folder.iterdir()) == ["learner.safetensors", "manifest.json", "state.json"]
    checkpoint = read_checkpoint(folder)
    assert checkpoint.state == STATE and checkpoint.folder == folder


def test_without_checkpoints_there_is_no_newest(tmp_path: Path):
    assert Checkpointer(tmp_path, keep=2).newest() is None


def test_only_the_newest_stay(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 1, 2, 3, 4, keep=2)
    assert names(checkpointer) == ["step_000003", "step_000004"]
    assert checkpointer.newest().state.step == 4


def test_age_is_the_number_and_not_the_spelling(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 999_999, 1_000_000, 1_000_001, keep=2)
    assert names(checkpointer) == ["step_1000000", "step_1000001"]


def test_the_same_step_again_replaces_the_old_one(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 3)
    checkpointer.save(replace(STATE, step=3, weight_version=77), write_learner)
    assert names(checkpointer) == ["step_000003"] and checkpointer.newest().state.weight_version == 77


def test_a_save_that_was_cut_off_leaves_the_older_checkpoint_alone(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 3, keep=1)

    def cut_off(folder: str) -> None:
        (Path(folder) / "half.safetensors").write_bytes(b"hal")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpointer.save(replace(STATE, step=4), cut_off)
    assert (checkpointer.root / ".unfinished-step_000004" / "half.safetensors").is_file()
    assert names(checkpointer) == ["step_000003"] and checkpointer.newest().state.step == 3

    checkpointer.save(replace(STATE, step=4), write_learner)
    assert [p.name for p in checkpointer.root.iterdir()] == ["step_000004"]
    assert not (checkpointer.root / "step_000004" / "half.safetensors").exists()


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["learner.safetensors", "state.json"])
def test_a_damaged_file_is_named_and_the_one_before_is_used_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage, name: str):
    checkpointer = save_steps(tmp_path, 1, 2)
    path = checkpointer.root / "step_000002" / name
    damage(path)
    with pytest.raises(CheckpointError, match=f"step_000002/{name}: missing or not what the manifest says"):
        read_checkpoint(path.parent)
    with caplog.at_level(logging.ERROR):
        assert checkpointer.newest().state.step == 1
    assert str(path) in caplog.text


@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda p: p.write_text("[]"), lambda p: p.write_text('{"files": []}')])
def test_a_manifest_that_cannot_be_read_names_its_folder(tmp_path: Path, damage):
    checkpointer = save_steps(tmp_path, 1, 2)
    damage(checkpointer.root / "step_000002" / "manifest.json")
    with pytest.raises(CheckpointError, match="step_000002"):
        read_checkpoint(checkpointer.root / "step_000002")
    assert checkpointer.newest().state.step == 1


def test_when_all_are_damaged_the_run_does_not_start_afresh(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 1, 2)
    for folder in checkpointer.folders():
        (folder / "learner.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)no usable checkpoint.*step_000002.*step_000001.*remove the folder"):
        checkpointer.newest()


def edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "sub/x", "..", "."])
def test_a_manifest_may_name_only_files_of_its_folder(tmp_path: Path, name: str):
    folder = save_steps(tmp_path, 1).folders()[0]
    (folder.parent / "x").write_bytes(b"")
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: {"sha256": "0", "bytes": 0}}))
    with pytest.raises(CheckpointError, match="no plain file name" if name != ".." else r"step_000001/\.\.: missing"):
        read_checkpoint(folder)


def test_a_manifest_must_cover_the_state(tmp_path: Path):
    folder = save_steps(tmp_path, 1).folders()[0]
    edit_manifest(folder, lambda manifest: manifest["files"].pop("state.json"))
    with pytest.raises(CheckpointError, match=r"manifest without state\.json"):
        read_checkpoint(folder)


def test_other_things_in_the_folder_are_no_checkpoints(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 1)
    for name in ("step_000009.bak", "step_12", "notes"):
        (checkpointer.root / name).mkdir()
    assert names(checkpointer) == ["step_000001"]
