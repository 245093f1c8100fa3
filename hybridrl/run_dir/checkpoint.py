"""Checkpoints: a folder that appears whole or not at all, with the sha256 of every file in its
manifest.
"""

import json
import logging
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from hybridrl.core import failpoints
from hybridrl.core.errors import CheckpointError, DamagedCheckpoint, RunDirectoryError
from hybridrl.core.files import ABSENT, entries, read_bytes, retry, sha256, sync_to_disk
from hybridrl.core.json_lines import shortened, whole_number
from hybridrl.run_dir.saved_file import seal
from hybridrl.settings.choices import BestMode
from hybridrl.settings.compose import to_yaml
from hybridrl.settings.run import CheckpointConfig, RunSettings
from hybridrl.types import SavedFile

log = logging.getLogger(__name__)
MANIFEST, STATE, FORMAT = "manifest.json", "state.json", 2
CHECKPOINTS, CONFIG = "checkpoints", "config.yaml"
UNFINISHED, REPLACED = ".unfinished-", ".replaced-"
TRACKER_ID = "_id"
STEP_FOLDER = re.compile(r"step_(\d{6,18})", re.ASCII)
HEADROOM = 1 << 20  # bytes for state, manifest and headers
HASHING = 8  # threads; hashlib lets go of the interpreter lock


class Stateful(Protocol):
    """A part of the controller that a step changes. Whatever has such state is named in
    Controller.stateful.
    """

    def state_dict(self) -> Any:
        """As JSON holds it."""

    def load_state_dict(self, state: Any) -> None: ...


class Writer(Protocol):
    """Workers with state of their own, each of which writes its files itself."""

    def state_bytes(self) -> int:
        """What save_state will write, about."""

    def save_state(self, folder: str) -> Sequence[SavedFile]:
        """Files in `folder`, on disk.

        Raises:
            CheckpointError: one could not be written.
        """


class SettingsFile:
    """A Writer of config.yaml: with it a checkpoint can be used where the rest of its run directory
    is gone.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.text = to_yaml(settings)

    def state_bytes(self) -> int:
        return len(self.text)

    def save_state(self, folder: str) -> list[SavedFile]:
        path = Path(folder) / CONFIG
        path.write_text(self.text, encoding="utf-8", errors="backslashreplace")
        return [seal(path)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Everything of the controller that a resumed run needs; the workers' files lie beside it."""

    step: int  # optimizer steps done
    weight_version: int
    optimizer_steps: int
    parts: dict[
        str, Any
    ]  # state_dict of each Stateful part by its name: the data cursor, schedules
    metrics: dict[str, float]  # the step's row, where checkpoint.best finds its metric
    trackers: dict[str, str] = field(default_factory=dict)  # ids by tracker, of Sinks.state_dict
    inputs: dict[str, str] = field(default_factory=dict)  # run_dir.inputs.digests


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    folder: Path
    state: RunState


class Checkpointer:
    """checkpoints/step_NNNNNN under the run directory; the newest `keep` stay, and the best one.

    At any moment, a kill included, there is at least one whole checkpoint once there was one.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        self.root, self.config = run_dir / CHECKPOINTS, config

    def save(self, state: RunState, writers: Sequence[Writer]) -> Path:
        """Write into a temporary folder, sync it to disk, read it back, rename it; only then drop
        what is not kept.

        Raises:
            CheckpointError: no room, a file could not be written, or the disk does not give back
                what was written. The checkpoints that are there are untouched.
        """
        final = self.root / f"step_{state.step:06d}"
        unfinished = self.aside(final)
        try:
            unfinished.mkdir(parents=True)
            sync_to_disk(self.root.parent)  # the name of the root, which the first save makes
            failpoints.hit("checkpoint.begun", step=state.step)
            self._check_room(final, writers)
            write(unfinished, state, writers)
            failpoints.hit("checkpoint.written", step=state.step)
            read_checkpoint(unfinished)
            failpoints.hit("checkpoint.verified", step=state.step)
            self._commit(unfinished, final)
        except Exception as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if isinstance(error, OSError):
                raise CheckpointError(f"{final}: not saved: {error}") from error
            raise
        if self.config.best and not math.isfinite(state.metrics.get(self.config.best, math.nan)):
            log.warning(
                "%s: its step has no finite %s, so checkpoint.best leaves it out",
                final,
                self.config.best,
            )
        try:
            self._prune(state.step)
        except (
            OSError,
            RunDirectoryError,
        ) as error:  # nothing is removed on the strength of a read that failed
            log.warning("%s: older checkpoints stay for now: %s", self.root, error)
        return final

    def aside(self, final: Path) -> Path:
        """A folder that `clean` removes, of a new name each time: a worker that was given up may
        still write into an older one.
        """
        return self.root / f"{UNFINISHED}{final.name}-{uuid.uuid4().hex[:12]}"

    def clean(self) -> None:
        """Remove or finish what a killed run left half done. Only who holds the run directory's
        lock may call it.

        Raises:
            CheckpointError: something of it cannot be removed.
        """
        for path in entries(self.root):
            replaced = path.name.removeprefix(REPLACED)
            if path.name.startswith(UNFINISHED):
                remove(path)
            elif replaced != path.name and STEP_FOLDER.fullmatch(replaced):
                final = self.root / replaced
                if os.path.lexists(final):
                    remove(path)
                else:
                    path.rename(final)

    def folders(self) -> list[Path]:
        """Committed checkpoints, oldest first.

        Raises:
            OSError: the folder of checkpoints is there and cannot be listed.
        """
        return step_folders(self.root.parent)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is what its manifest says; one that is certainly damaged is
        logged and passed over.

        Raises:
            CheckpointError: one cannot be read now, or is of another version: it may be sound, so
                no older one is used in its place. Or there are checkpoints and all are damaged:
                starting afresh would hide the loss.
            OSError: the folder of checkpoints is there and cannot be listed.
        """
        damaged = []
        for folder in reversed(self.folders()):
            try:
                return read_checkpoint(folder)
            except DamagedCheckpoint as error:
                log.error("damaged checkpoint passed over: %s", error)
                damaged.append(str(error))
        if damaged:
            raise CheckpointError(
                f"no usable checkpoint in {self.root}: {'; '.join(damaged)}; remove the folder to "
                "start afresh"
            )
        return None

    def set_aside_newer(self, step: int) -> None:
        """Rename the checkpoints after `step`, which were passed over, so that the run can save
        those steps again.

        They are never removed: what is damaged for this machine may be of use to its owner.
        """
        for folder in self.folders():
            if step_of(folder) > step:
                aside = folder.with_name(f"{folder.name}.damaged-{uuid.uuid4().hex[:6]}")
                folder.rename(aside)
                log.error("%s: damaged, kept as %s", folder, aside.name)

    def best(self, folders: Sequence[Path]) -> Path | None:
        """That with the best value of checkpoint.best, the oldest of equals; None: not asked for,
        or none has one.
        """
        sign = 1 if self.config.best_mode is BestMode.max else -1
        values = {
            folder: sign * metric_of(folder, self.config.best)
            for folder in folders
            if self.config.best
        }
        known = {folder: value for folder, value in values.items() if math.isfinite(value)}
        return max(known, key=known.__getitem__, default=None)

    def _check_room(self, final: Path, writers: Sequence[Writer]) -> None:
        needed, free = (
            sum(w.state_bytes() for w in writers) + HEADROOM,
            shutil.disk_usage(self.root).free,
        )
        if free < needed:
            raise CheckpointError(
                f"{final}: not saved: needs {needed} bytes, the disk has {free} free; free some, "
                "or lower checkpoint.keep"
            )

    def _commit(self, unfinished: Path, final: Path) -> None:
        """Two renames where the step is there already; `clean` takes the first one back if the
        second never came.
        """
        replaced = self.root / f"{REPLACED}{final.name}"
        if os.path.lexists(final):
            final.rename(replaced)
        failpoints.hit("checkpoint.replaced", step=step_of(final))
        unfinished.rename(final)
        failpoints.hit("checkpoint.renamed", step=step_of(final))
        sync_to_disk(self.root)
        with suppress(CheckpointError):  # `clean` comes again
            remove(replaced)

    def _prune(self, step: int) -> None:
        """Remove our own folders up to `step` but the newest and the best. What is newer than
        `step` stays.
        """
        done = [
            folder
            for folder in self.folders()
            if step_of(folder) <= step and read_bytes(folder / MANIFEST) is not None
        ]
        kept = {*done[-self.config.keep :], self.best(done)}
        for folder in done:
            if folder not in kept:
                doomed = folder.rename(self.aside(folder))  # half removed, it is no checkpoint
                failpoints.hit("checkpoint.pruned", step=step)
                with suppress(CheckpointError):  # `clean` comes again
                    remove(doomed)


def step_folders(run_dir: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first.

    Raises:
        OSError: the folder of checkpoints is there and cannot be listed.
    """
    found = [path for path in entries(run_dir / CHECKPOINTS) if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=step_of)


def remove(path: Path) -> None:
    """A folder with all that is in it; of a link, as to a checkpoint that its owner moved to
    another disk, the link alone.

    Raises:
        CheckpointError: it cannot be removed.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be removed: {error}; remove it by hand") from error


def write(folder: Path, state: RunState, writers: Sequence[Writer]) -> None:
    """All files of a checkpoint, and the manifest that names what their writers say they wrote, on
    disk.
    """
    files = [file for writer in writers for file in writer.save_state(str(folder))]
    failpoints.hit("checkpoint.shards", step=state.step)
    (folder / STATE).write_text(json.dumps(state_to_json(state), indent=1))
    files.append(seal(folder / STATE))
    failpoints.hit("checkpoint.state", step=state.step)
    entries = {f.name: {"sha256": f.sha256, "bytes": f.bytes} for f in files}
    (folder / MANIFEST).write_text(
        json.dumps({"format": FORMAT, "step": state.step, "files": entries}, indent=1)
    )
    sync_to_disk(folder / MANIFEST)
    sync_to_disk(folder)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Verify every file against the manifest, then read the state; nothing is loaded before.

    Raises:
        DamagedCheckpoint: a file is certainly missing or has other bytes than the manifest says.
        CheckpointError: it cannot be read now; or it is whole and not what this version of hybridrl
            writes.
    """
    try:
        manifest = read_manifest(folder)
        verify(folder, manifest["files"])
        state = read_state(folder)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder}: cannot be read now ({error.strerror}), which may pass, "
            "so no older checkpoint is used in its place and nothing was changed; give the same "
            f"command again, or move {folder.name} elsewhere to continue from an older one"
        ) from error
    named = STEP_FOLDER.fullmatch(folder.name)
    steps = {manifest["step"], state.step, *([int(named[1])] if named else [])}
    if len(steps) > 1:
        raise CheckpointError(
            f"{folder}: its name, manifest and state speak of the steps "
            f"{', '.join(map(str, sorted(steps)))}, so it was renamed or edited; give it back its "
            "name, or move it elsewhere"
        )
    return Checkpoint(folder=folder, state=state)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, in the form that `write` gives it.

    Raises:
        DamagedCheckpoint: there is none, or it has another form.
        CheckpointError: it is of another version, or names files elsewhere.
        OSError: it cannot be read.
    """
    manifest = read_json(folder / MANIFEST)
    try:
        version = whole_number(manifest["format"], "format")
        if version != FORMAT:
            raise CheckpointError(
                f"{folder}: of format {version}, this version of hybridrl reads {FORMAT}"
            )
        whole_number(manifest["step"], "step")
        for name, entry in manifest["files"].items():
            if Path(name).name != name or "\0" in name:
                raise CheckpointError(
                    f"{folder}: manifest names {name!r}, which is no plain file name"
                )
            whole_number(entry["bytes"], f"size of {name}")
            if not isinstance(entry["sha256"], str):
                raise ValueError(f"{name} has no sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = shortened(error)
        raise DamagedCheckpoint(f"{folder / MANIFEST}: unreadable manifest: {reason}") from error
    if STATE not in manifest["files"]:
        raise CheckpointError(f"{folder}: manifest without {STATE}")
    return manifest


def state_to_json(state: RunState) -> dict[str, Any]:
    """What state.json holds: the fields of the state, its finite metrics, and the id of each
    tracker's run under NAME_id.

    Example: trackers={"wandb": "x1"} becomes "wandb_id": "x1".
    """
    content = asdict(state)
    del content["trackers"]
    content["metrics"] = {
        key: float(value) for key, value in state.metrics.items() if math.isfinite(value)
    }
    return content | {f"{name}{TRACKER_ID}": run_id for name, run_id in state.trackers.items()}


def state_from_json(content: Any) -> RunState:
    """Raises: TypeError, ValueError: `content` is not what `state_to_json` makes."""
    if not isinstance(content, dict):
        raise ValueError("it is no mapping")
    ids = {key: value for key, value in content.items() if key.endswith(TRACKER_ID)}
    for key, value in ids.items():
        if not isinstance(value, str | None):
            raise ValueError(f"{key} is no text")
    return RunState(
        **{key: value for key, value in content.items() if key not in ids},
        trackers={
            key.removesuffix(TRACKER_ID): value for key, value in ids.items() if value is not None
        },
    )


def read_state(folder: Path) -> RunState:
    """Raises:
    CheckpointError: it has other fields or types than RunState.
    OSError: it cannot be read.
    """
    try:
        state = state_from_json(read_json(folder / STATE))
        for what in ("step", "weight_version", "optimizer_steps"):
            whole_number(getattr(state, what), what)
        for what in ("parts", "metrics", "inputs"):
            if not isinstance(getattr(state, what), dict):
                raise ValueError(f"{what} is no mapping")
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / STATE}: not a state of this version of hybridrl: {error}"
        ) from error
    return state


def read_json(path: Path) -> Any:
    """What a file of a checkpoint holds.

    Raises:
        DamagedCheckpoint: there is no such file, or it is not JSON.
        CheckpointError: it is a link or a special file.
        OSError: it cannot be read.
    """
    try:
        content = read_bytes(path)
        if content is None:
            raise DamagedCheckpoint(f"{path}: missing")
        return json.loads(content)
    except RunDirectoryError as error:
        raise CheckpointError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: unreadable: {error}") from error


def verify(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises:
    DamagedCheckpoint: a file of `files`, of a manifest, is certainly missing or has other bytes.
    CheckpointError: a file is a link or a special file, or the folder holds weights that `files`
    does not name. OSError: a file cannot be read.
    """
    different = "missing or not what the manifest says"
    for name, entry in files.items():
        path = folder / name
        try:
            found = retry(partial(os.stat, path, follow_symlinks=False))
        except ABSENT as error:
            raise DamagedCheckpoint(f"{path}: {different}") from error
        if stat.S_ISLNK(found.st_mode):
            raise CheckpointError(
                f"{path}: a link, which could point anywhere; put the file in its place"
            )
        if not stat.S_ISREG(found.st_mode) or found.st_size != entry["bytes"]:
            raise DamagedCheckpoint(f"{path}: {different}")
    weights = [path for path in entries(folder) if path.suffix == ".safetensors"]
    if unknown := [path for path in weights if path.name not in files]:
        raise CheckpointError(f"{unknown[0]}: the manifest does not name it")
    with ThreadPoolExecutor(HASHING) as pool:
        digests = pool.map(lambda name: sha256(folder / name), files)
        for (name, entry), digest in zip(files.items(), digests, strict=True):
            if digest != entry["sha256"]:
                raise DamagedCheckpoint(f"{folder / name}: {different}")


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def metric_of(folder: Path, name: str) -> float:
    """A metric of the checkpoint's step; NaN: it was not measured there, or the state is damaged.

    Raises:
        OSError: the state cannot be read now.
    """
    try:
        return float(json.loads(read_bytes(folder / STATE) or b"")["metrics"][name])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return math.nan
