"""Checkpoints appear as a whole or not at all."""

import errno
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from hybridrl.core import files as durable
from hybridrl.core.errors import CheckpointError, DamagedCheckpoint
from hybridrl.core.files import sha256
from hybridrl.run_dir.checkpoint import (
    Checkpointer,
    RunState,
    read_checkpoint,
    remove,
    state_from_json,
    state_to_json,
)
from hybridrl.run_dir.saved_file import seal
from hybridrl.settings.checkpointing import CheckpointConfig
from hybridrl.settings.choices import BestMode
from hybridrl.types import Files, SavedFile
from hybridrl.weights.fragments import MASTER, Fragment, FragmentReader, write_fragments
from tests.support.failing_disk import no_more_files

STATE = RunState(
    step=10,
    weight_version=10,
    optimizer_steps=9,
    parts={"prompts": {"epoch": 1, "at": 7}, "schedules": {"reward": 1.5}},
    metrics={"eval/accuracy": 0.5},
)
SECONDS = 60


class Weights:
    """A writer of a checkpoint's part that consists of one small file."""

    def __init__(self, before: Callable[[Path], None] = lambda path: None, size: int = 22) -> None:
        self.before = before
        self.size = size

    def state_bytes(self) -> int:
        return self.size

    def begin_save(self, folder: str) -> Files:
        return partial(self.write, Path(folder) / "learner.safetensors")

    def write(self, path: Path) -> list[SavedFile]:
        self.before(path)
        path.write_bytes(b"weights of the learner")
        return [seal(path)]


def save_steps(run_dir: Path, *steps: int, keep: int = 5) -> Checkpointer:
    checkpointer = Checkpointer(run_dir, CheckpointConfig(keep=keep))
    for step in steps:
        checkpointer.save(replace(STATE, step=step), [Weights()])
    return checkpointer


def names(checkpointer: Checkpointer) -> list[str]:
    return [folder.name for folder in checkpointer.folders()]


def test_what_was_saved_is_read_back(tmp_path: Path):
    folder = Checkpointer(tmp_path, CheckpointConfig()).save(STATE, [Weights()])
    assert folder == tmp_path / "checkpoints" / "step_000010"
    assert sorted(p.name for p in folder.iterdir()) == [
        "learner.safetensors",
        "manifest.json",
        "state.json",
    ]
    checkpoint = read_checkpoint(folder)
    assert checkpoint.state == STATE and checkpoint.folder == folder


def test_without_checkpoints_there_is_no_newest(tmp_path: Path):
    assert Checkpointer(tmp_path, CheckpointConfig()).newest() is None


def test_only_the_newest_stay(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 1, 2, 3, 4, keep=2)
    assert names(checkpointer) == ["step_000003", "step_000004"]
    assert checkpointer.newest().state.step == 4


def test_age_is_the_number_and_not_the_spelling(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 999_999, 1_000_000, 1_000_001, keep=2)
    assert names(checkpointer) == ["step_1000000", "step_1000001"]


def test_the_same_step_again_replaces_the_old_one(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 3)
    checkpointer.save(replace(STATE, step=3, weight_version=77), [Weights()])
    assert (
        names(checkpointer) == ["step_000003"] and checkpointer.newest().state.weight_version == 77
    )


def test_a_checkpoint_that_cannot_be_put_in_place_leaves_the_older_one_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpointer = save_steps(tmp_path, 3)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name.startswith(".unfinished-"):
            raise OSError(errno.EDQUOT, "no more names", str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises((OSError, CheckpointError), match="no more names"):
        checkpointer.save(replace(STATE, step=3, weight_version=77), [Weights()])
    assert names(checkpointer) == ["step_000003"]
    assert checkpointer.newest().state.weight_version == STATE.weight_version


def test_a_save_that_was_cut_off_leaves_the_older_checkpoint_alone(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 3, keep=1)

    def cut_off(path: Path) -> None:
        path.with_name("half.safetensors").write_bytes(b"hal")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpointer.save(replace(STATE, step=4), [Weights(cut_off)])
    assert len(list(checkpointer.root.glob(".unfinished-step_000004-*/half.safetensors"))) == 1
    assert names(checkpointer) == ["step_000003"] and checkpointer.newest().state.step == 3

    checkpointer.clean()
    checkpointer.save(replace(STATE, step=4), [Weights()])
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
def test_a_damaged_file_is_named_and_the_one_before_is_used_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage, name: str
):
    checkpointer = save_steps(tmp_path, 1, 2)
    path = checkpointer.root / "step_000002" / name
    damage(path)
    with pytest.raises(
        CheckpointError, match=f"step_000002/{name}: missing or not what the manifest says"
    ):
        read_checkpoint(path.parent)
    with caplog.at_level(logging.ERROR):
        assert checkpointer.newest().state.step == 1
    assert str(path) in caplog.text


@pytest.mark.parametrize(
    "damage",
    [truncate, Path.unlink, lambda p: p.write_text("[]"), lambda p: p.write_text('{"files": []}')],
)
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
    with pytest.raises(
        CheckpointError,
        match=r"(?s)no usable checkpoint.*step_000002.*step_000001.*remove the folder",
    ):
        checkpointer.newest()


def edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "sub/x", "..", "."])
def test_a_manifest_may_name_only_files_of_its_folder(tmp_path: Path, name: str):
    folder = save_steps(tmp_path, 1).folders()[0]
    (folder.parent / "x").write_bytes(b"")
    edit_manifest(
        folder, lambda manifest: manifest["files"].update({name: {"sha256": "0", "bytes": 0}})
    )
    with pytest.raises(
        CheckpointError,
        match="not a plain file name" if name != ".." else r"step_000001/\.\.: missing",
    ):
        read_checkpoint(folder)


def test_a_link_in_the_place_of_a_file_is_refused_though_it_leads_to_the_same_bytes(tmp_path: Path):
    folder = save_steps(tmp_path, 1).folders()[0]
    elsewhere = (folder / "learner.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "learner.safetensors").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=r"learner\.safetensors: is a link"):
        read_checkpoint(folder)


@pytest.mark.parametrize("where", ["", "parts"])
def test_a_target_in_the_state_of_a_checkpoint_is_never_called(tmp_path: Path, where: str):
    """A `_target_` is an ordinary value in the parts, and an unknown field in the state itself."""
    folder = save_steps(tmp_path, 1).folders()[0]
    call = {"_target_": "pathlib.Path.touch", "_args_": [str(tmp_path / "hit")]}
    state = json.loads((folder / "state.json").read_text())
    (state[where] if where else state).update(call)
    (folder / "state.json").write_text(json.dumps(state))
    entry = {
        "sha256": sha256(folder / "state.json"),
        "bytes": (folder / "state.json").stat().st_size,
    }
    edit_manifest(folder, lambda manifest: manifest["files"].update({"state.json": entry}))
    if where:
        assert read_checkpoint(folder).state.parts["_target_"] == "pathlib.Path.touch"
    else:
        with pytest.raises(CheckpointError, match="unexpected keyword argument '_target_'"):
            read_checkpoint(folder)
    assert not (tmp_path / "hit").exists()


def test_a_manifest_must_cover_the_state(tmp_path: Path):
    folder = save_steps(tmp_path, 1).folders()[0]
    edit_manifest(folder, lambda manifest: manifest["files"].pop("state.json"))
    with pytest.raises(CheckpointError, match=r"its manifest does not list state\.json"):
        read_checkpoint(folder)


def test_other_things_in_the_folder_are_no_checkpoints(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 1)
    for name in ("step_000009.bak", "step_12", "notes"):
        (checkpointer.root / name).mkdir()
    assert names(checkpointer) == ["step_000001"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda manifest: manifest.update(step="../../x"), "unreadable manifest"),
        (lambda manifest: manifest.update(step=-1), "unreadable manifest"),
        (lambda manifest: manifest.update(step=10**9), r"the step \(1, 1000000000\)"),
        (lambda manifest: manifest.update(step=True), "unreadable manifest"),
        (lambda manifest: manifest.update(format="2"), "unreadable manifest"),
        (lambda manifest: manifest.update(files=[["state.json"]]), "unreadable manifest"),
        (lambda manifest: manifest["files"]["state.json"].update(bytes="9"), "unreadable manifest"),
        (lambda manifest: manifest["files"]["state.json"].pop("sha256"), "unreadable manifest"),
    ],
)
def test_a_manifest_of_another_form_is_refused_in_one_sentence(tmp_path: Path, damage, says: str):
    folder = save_steps(tmp_path, 1).folders()[0]
    edit_manifest(folder, damage)
    with pytest.raises(CheckpointError, match=rf"step_000001.*{says}") as caught:
        read_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"step": "1"},
        {"step": 1.5},
        {"parts": []},
        {"metrics": 3},
        {"inputs": None},
        {"wandb_id": 7},
    ],
)
def test_a_state_of_other_types_is_refused_in_one_sentence(tmp_path: Path, change: dict):
    folder = save_steps(tmp_path, 1).folders()[0]
    state = json.loads((folder / "state.json").read_text()) | change
    (folder / "state.json").write_text(json.dumps(state))
    saved = seal(folder / "state.json")
    entry = {"sha256": saved.sha256, "bytes": saved.bytes}
    edit_manifest(folder, lambda manifest: manifest["files"].update({"state.json": entry}))
    with pytest.raises(CheckpointError, match=r"state\.json: not a state of this version"):
        read_checkpoint(folder)


def test_the_id_of_a_tracker_is_held_under_the_key_that_earlier_versions_wrote():
    earlier = {
        "step": 3,
        "weight_version": 3,
        "optimizer_steps": 3,
        "parts": {"pipeline": {}, "schedules": {}},
        "metrics": {"train/step": 3.0},
        "wandb_id": "x1",
        "inputs": {"prompts": "ab"},
    }
    state = state_from_json(earlier)
    assert state.trackers == {"wandb": "x1"} and state_to_json(state) == earlier
    assert state_from_json(earlier | {"wandb_id": None}).trackers == {}


def test_a_checkpoint_under_another_step_s_name_is_refused_and_not_passed_over(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 1, 2)
    (checkpointer.root / "step_000002").rename(checkpointer.root / "step_000009")
    with pytest.raises(
        CheckpointError,
        match=r"step_000009: its name, manifest and state do not agree on the step \(2, 9\)",
    ):
        checkpointer.newest()


def test_files_that_the_manifest_does_not_name_are_not_loaded(tmp_path: Path):
    folder = save_steps(tmp_path, 1).folders()[0]
    (folder / "notes.txt").write_text("read nowhere")
    assert read_checkpoint(folder).state.step == 1
    (folder / "learner-rank00001-of-00002.safetensors").write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=r"00001-of-00002\.safetensors: the manifest does not list it"
    ):
        read_checkpoint(folder)


def test_another_format_is_told_and_not_guessed_at(tmp_path: Path):
    folder = save_steps(tmp_path, 1).folders()[0]
    edit_manifest(folder, lambda manifest: manifest.update(format=1))
    with pytest.raises(CheckpointError, match="has format 1, but this version of hybridrl reads 2"):
        read_checkpoint(folder)


# -- a read that fails -----------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpointer = save_steps(tmp_path, 80, 100)
    monkeypatch.setattr(durable, "RETRY_AFTER_S", (0.0, 0.0))
    with no_more_files(), pytest.raises(OSError, match="Too many open files"):
        checkpointer.newest()
    with no_more_files(), pytest.raises(CheckpointError, match="cannot be read now") as caught:
        read_checkpoint(checkpointer.root / "step_000100")
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert checkpointer.newest().state.step == 100


def test_an_error_that_passes_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpointer = save_steps(tmp_path, 80, 100)
    with no_more_files() as end:
        monkeypatch.setattr(durable.time, "sleep", lambda seconds: end())
        assert checkpointer.newest().state.step == 100


def test_what_was_passed_over_is_kept_under_another_name_while_its_step_is_saved_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    checkpointer = save_steps(tmp_path, 80, 100, keep=1 + 1)
    flip_a_byte(checkpointer.root / "step_000100" / "learner.safetensors")
    damaged = (checkpointer.root / "step_000100" / "learner.safetensors").read_bytes()
    checkpointer.set_aside_newer(checkpointer.newest().state.step)
    checkpointer.save(replace(STATE, step=100), [Weights()])
    checkpointer.save(replace(STATE, step=120), [Weights()])
    checkpointer.clean()
    assert names(checkpointer) == ["step_000100", "step_000120"]
    (aside,) = checkpointer.root.glob("step_000100.damaged-*")
    assert (aside / "learner.safetensors").read_bytes() == damaged and aside.name in caplog.text


def test_a_checkpoint_of_another_version_is_not_passed_over(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 80, 100)
    edit_manifest(checkpointer.root / "step_000100", lambda manifest: manifest.update(format=3))
    with pytest.raises(CheckpointError, match="has format 3, but this version of hybridrl reads 2"):
        checkpointer.newest()


def test_no_checkpoint_is_removed_while_the_best_one_cannot_be_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """state.json of the best step is a link, so its metric is unknown, and all checkpoints are
    kept.
    """
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=1, best="eval/accuracy"))
    for step, accuracy in ((1, 0.9), (2, 0.1)):
        checkpointer.save(replace(STATE, step=step, metrics={"eval/accuracy": accuracy}), [])
    state = checkpointer.root / "step_000001" / "state.json"
    state.symlink_to(state.rename(tmp_path / "elsewhere.json"))
    checkpointer.save(replace(STATE, step=3, metrics={"eval/accuracy": 0.2}), [])
    assert names(checkpointer) == ["step_000001", "step_000002", "step_000003"]
    assert "older checkpoints stay for now" in caplog.text


# -- a save that fails -----------------------------------------------------------------------------


def test_a_disk_without_room_is_told_with_path_and_bytes_before_anything_is_written(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 1, keep=1)
    with pytest.raises(
        CheckpointError,
        match=rf"step_000002: not saved: needs {10**18 + (1 << 20)} bytes, the disk has \d+ free",
    ):
        checkpointer.save(
            replace(STATE, step=2), [Weights(lambda path: pytest.fail("written"), size=10**18)]
        )
    assert [p.name for p in checkpointer.root.iterdir()] == [
        "step_000001"
    ] and checkpointer.newest().state.step == 1


def full(path: Path) -> None:
    raise OSError(28, "No space left on device", str(path))


def misreport(path: Path) -> None:
    raise CheckpointError(f"{path}: 22 bytes could not be written")


@pytest.mark.parametrize(
    ("failure", "says"),
    [(full, "step_000002: not saved: .*No space left"), (misreport, "22 bytes could not")],
)
def test_a_save_that_fails_leaves_the_older_one_and_nothing_of_its_own(
    tmp_path: Path, failure, says: str
):
    checkpointer = save_steps(tmp_path, 1, keep=1)
    with pytest.raises(CheckpointError, match=says):
        checkpointer.save(replace(STATE, step=2), [Weights(failure)])
    assert [p.name for p in checkpointer.root.iterdir()] == [
        "step_000001"
    ] and checkpointer.newest().state.step == 1
    checkpointer.save(replace(STATE, step=3), [Weights()])
    assert names(checkpointer) == ["step_000003"]


class Forgetful(Weights):
    """A writer whose report does not match its file, as with a broken disk or an unshared
    folder.
    """

    def write(self, path: Path) -> list[SavedFile]:
        (saved,) = super().write(path)
        flip_a_byte(path)
        return [saved]


def test_what_the_disk_does_not_give_back_is_never_committed(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 1, keep=1)
    with pytest.raises(
        CheckpointError, match=r"learner\.safetensors: missing or not what the manifest says"
    ):
        checkpointer.save(replace(STATE, step=2), [Forgetful()])
    assert [p.name for p in checkpointer.root.iterdir()] == ["step_000001"]


def test_a_save_that_is_killed_at_any_of_its_file_operations_leaves_a_whole_checkpoint(
    tmp_path: Path,
):
    """checkpoint_job.py kills a forked save at each file operation, and checks the remaining
    files.
    """
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, root / "tests" / "support" / "checkpoint_job.py", tmp_path],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    killed = json.loads(done.stdout)
    assert len(killed["new"]) > 20 and set(killed["new"]) == {1, 2}, (
        "before the rename the old one, after it the new one"
    )
    assert len(killed["again"]) > 20 and set(killed["again"]) == {2}, (
        "the step was there already, and is whole throughout"
    )


def test_what_a_killed_run_left_is_removed_or_put_back_at_the_start(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 1, 2)
    shutil.copytree(
        checkpointer.root / "step_000001", checkpointer.root / ".unfinished-step_000003"
    )
    (checkpointer.root / "step_000002").rename(checkpointer.root / ".replaced-step_000002")
    shutil.copytree(checkpointer.root / "step_000001", checkpointer.root / ".replaced-step_000001")
    checkpointer.clean()
    assert sorted(p.name for p in checkpointer.root.iterdir()) == ["step_000001", "step_000002"]


def test_of_a_checkpoint_that_its_owner_moved_and_linked_only_the_link_is_dropped(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 1, 2)
    elsewhere = tmp_path / "elsewhere"
    root = checkpointer.root
    checkpointer.config.keep = 1
    (root / "step_000001").rename(elsewhere)
    for name in ("step_000001", "step_000003", ".unfinished-step_000009", ".replaced-step_000004"):
        (root / name).symlink_to(elsewhere)
    checkpointer.save(replace(STATE, step=3), [Weights()])
    assert names(checkpointer) == ["step_000003"] and not (root / "step_000003").is_symlink(), (
        "saved in the place of the link"
    )
    checkpointer.save(replace(STATE, step=4), [Weights()])
    checkpointer.clean()
    assert [p.name for p in root.iterdir()] == ["step_000004"]
    assert read_checkpoint(elsewhere).state.step == 1, "what was moved is its owner's"


def test_what_cannot_be_removed_is_told_by_its_name(tmp_path: Path):
    with pytest.raises(
        CheckpointError, match=r"/gone: cannot be removed: .*No such file.*; remove it by hand"
    ):
        remove(tmp_path / "gone")


def test_a_writer_that_was_given_up_cannot_reach_what_the_next_attempt_writes(tmp_path: Path):
    folders = []

    def given_up(path: Path) -> None:
        folders.append(path.parent)
        raise CheckpointError("lost")

    checkpointer = save_steps(tmp_path, 1)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="lost"):
            checkpointer.save(replace(STATE, step=2), [Weights(given_up)])
    assert folders[0] != folders[1]
    folders[1].mkdir()
    checkpointer.clean()
    assert [p.name for p in checkpointer.root.iterdir()] == ["step_000001"]


# -- what stays ------------------------------------------------------------------------------------


def retained_of(run_dir: Path, values: dict[int, float | None], **config) -> list[int]:
    checkpointer = Checkpointer(run_dir, CheckpointConfig(keep=1, **config))
    for step, value in values.items():
        metrics = {} if value is None else {"eval/accuracy": value}
        checkpointer.save(replace(STATE, step=step, metrics=metrics), [Weights()])
    return [int(name.removeprefix("step_")) for name in names(checkpointer)]


@pytest.mark.parametrize(
    ("values", "config", "retained"),
    [
        ({1: 0.2, 2: 0.9, 3: 0.4, 4: 0.5}, {"best": "eval/accuracy"}, [2, 4]),
        (
            {1: 0.2, 2: 0.9, 3: 0.4, 4: 0.5},
            {"best": "eval/accuracy", "best_mode": BestMode.min},
            [1, 4],
        ),
        ({1: 0.2, 2: 0.9, 3: 0.4, 4: 0.95}, {"best": "eval/accuracy"}, [4]),
        ({1: 0.9, 2: 0.9, 3: 0.9}, {"best": "eval/accuracy"}, [1, 3]),
        ({1: None, 2: 0.1, 3: None, 4: float("nan")}, {"best": "eval/accuracy"}, [2, 4]),
        ({1: 0.2, 2: 0.9, 3: 0.4}, {"best": "eval/nothing"}, [3]),
        ({1: 0.2, 2: 0.9, 3: 0.4}, {}, [3]),
    ],
)
def test_the_best_one_stays_beside_the_newest(tmp_path: Path, values, config, retained):
    assert retained_of(tmp_path, values, **config) == retained


def test_a_step_without_the_metric_that_chooses_the_best_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    retained_of(tmp_path, {1: 0.5, 2: None}, best="eval/accuracy")
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / 'checkpoints' / 'step_000002'}: its step has no finite eval/accuracy, so "
        "checkpoint.best ignores it"
    ]


def test_a_damaged_newer_one_never_pushes_out_a_whole_one(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 2, 4, keep=2)
    flip_a_byte(checkpointer.root / "step_000004" / "learner.safetensors")
    assert checkpointer.newest().state.step == 2
    Checkpointer(tmp_path, CheckpointConfig(keep=1, best="eval/accuracy")).save(
        replace(STATE, step=3, metrics={}), [Weights()]
    )
    assert names(checkpointer) == ["step_000002", "step_000003", "step_000004"], "nothing newer"
    assert checkpointer.newest().state.step == 3


def test_only_folders_with_a_manifest_of_ours_are_ever_removed(tmp_path: Path):
    checkpointer = save_steps(tmp_path, 1, keep=1)
    (checkpointer.root / "step_000000").mkdir()
    (checkpointer.root / "step_000000" / "thesis.txt").write_text("the only copy")
    checkpointer.save(replace(STATE, step=2), [Weights()])
    assert names(checkpointer) == ["step_000000", "step_000002"]


# -- the learner's pieces --------------------------------------------------------------------------


def pieces(
    folder: Path, *ranks: list[tuple[int, list[float]]], shape: tuple[int, ...] = (2, 3)
) -> FragmentReader:
    """Write a file for each rank with (offset, values) fragments of one parameter; the moments are
    10 and 100 times the values.
    """
    for rank, held in enumerate(ranks):
        parts = [(offset, torch.tensor(values)) for offset, values in held]
        fragments = [
            Fragment(
                name="w",
                shape=shape,
                offset=o,
                tensors={MASTER: v, "exp_avg": 10 * v, "exp_avg_sq": 100 * v},
            )
            for o, v in parts
        ]
        write_fragments(folder, rank, len(ranks), fragments)
    return FragmentReader(folder)


def test_a_slice_is_read_from_the_files_that_hold_it(tmp_path: Path):
    reader = pieces(tmp_path, [(0, [0.0, 1.0, 2.0, 3.0])], [(4, [4.0, 5.0])])
    assert reader.read(MASTER, "w", 3, 2).tolist() == [3, 4]
    assert reader.read("exp_avg", "w", 0, 2).tolist() == [0, 10]
    assert reader.whole("exp_avg_sq", "w").tolist() == [[0, 100, 200], [300, 400, 500]]


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        (
            [[(0, [0.0, 1.0])], [(3, [3.0, 4.0, 5.0])]],
            "pieces of w do not cover its 6 elements exactly once",
        ),
        ([[(0, [0.0, 1.0, 2.0, 3.0])], [(3, [3.0, 4.0, 5.0])]], "exactly once"),
        ([[(0, [0.0, 1.0, 2.0, 3.0, 4.0])], []], "exactly once"),
    ],
)
def test_pieces_that_leave_a_gap_or_overlap_are_refused(tmp_path: Path, ranks, says: str):
    with pytest.raises(CheckpointError, match=says):
        pieces(tmp_path, *ranks)


def test_a_rank_whose_file_is_missing_is_missed(tmp_path: Path):
    pieces(tmp_path, [(0, [0.0, 1.0, 2.0, 3.0])], [(4, [4.0, 5.0])])
    (tmp_path / "learner-rank00000-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="exactly one of each rank"):
        FragmentReader(tmp_path)


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize(
    "dump", [lambda bomb, path: path.write_bytes(pickle.dumps(bomb)), torch.save]
)
def test_a_pickle_in_place_of_a_shard_is_refused_and_never_run(tmp_path: Path, dump):
    canary = tmp_path / "canary"
    folder = save_steps(tmp_path, 1).folders()[0]
    shard = folder / "learner-rank00000-of-00001.safetensors"
    dump(Bomb(canary), shard)
    entry = {shard.name: {"sha256": sha256(shard), "bytes": shard.stat().st_size}}
    edit_manifest(
        folder, lambda manifest: manifest["files"].update(entry)
    )  # as an attacker would who can also write the manifest
    assert read_checkpoint(folder).state.step == 1
    with pytest.raises(
        CheckpointError, match=r"rank00000-of-00001\.safetensors: cannot be read as safetensors"
    ):
        FragmentReader(folder)
    assert not canary.exists()
