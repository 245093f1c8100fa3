"""Checkpoints: folders that appear complete or not at all, with a manifest of file digests."""

import json
import logging
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
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
from hybridrl.types import Files

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 2
CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
UNFINISHED = ".unfinished-"  # prefix of a folder that is being written or removed
REPLACED = ".replaced-"  # prefix of a checkpoint that a new one of the same step replaces
TRACKER_ID = "_id"  # suffix of the keys of state.json that hold the ids of trackers' runs
STEP_FOLDER = re.compile(r"step_(\d{6,18})", re.ASCII)
HEADROOM = 1 << 20  # bytes for state, manifest and headers
HASHING = 8  # threads; hashlib releases the interpreter lock


class Stateful(Protocol):
    """A part of the controller that a step changes; Controller.stateful lists all such parts."""

    def state_dict(self) -> Any:
        """The state, made of values that JSON can hold."""

    def load_state_dict(self, state: Any) -> None:
        """Continue from a value that state_dict returned."""


class Writer(Protocol):
    """A group of workers with state, each of which writes its own files."""

    def state_bytes(self) -> int:
        """The approximate number of bytes that begin_save will write."""

    def begin_save(self, folder: str) -> Files:
        """Begin to write the present state into `folder`. The state may change once this returns.

        Raises:
            CheckpointError: a file could not be written.
        """


class SettingsFile:
    """A Writer of config.yaml, so that a checkpoint can be used without its run directory."""

    def __init__(self, settings: RunSettings) -> None:
        self.text = config_text(settings)

    def state_bytes(self) -> int:
        return len(self.text)

    def begin_save(self, folder: str) -> Files:
        path = Path(folder) / CONFIG
        path.write_text(self.text, encoding="utf-8", errors="backslashreplace")
        saved = [seal(path)]
        return lambda: saved


def config_text(settings: RunSettings) -> str:
    """The settings as config.yaml holds them: without run.allow_changes, which is for one command.
    A later command that starts from the file would otherwise allow the same changes again.
    """
    return to_yaml(replace(settings, run=replace(settings.run, allow_changes=[])))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The state of the controller that a resumed run needs; state.json holds it."""

    step: int  # number of training steps done, each with one or several optimizer steps
    weight_version: int
    optimizer_steps: int
    # state_dict of each Stateful part, by its name: the data cursor, schedules
    parts: dict[str, Any]
    metrics: dict[str, float]  # the row of the step, in which checkpoint.best is looked up
    trackers: dict[str, str] = field(default_factory=dict)  # by tracker, as in Sinks.state_dict
    inputs: dict[str, str] = field(default_factory=dict)  # run_dir.inputs.digests


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint."""

    folder: Path
    state: RunState


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """A checkpoint whose files are being written."""

    folder: Path  # the temporary one
    final: Path
    state: RunState
    files: Sequence[Files]


class Checkpointer:
    """Saves and finds the folders checkpoints/step_NNNNNN of a run directory.

    The newest checkpoint.keep of them and the best one are retained. After the first save there is
    a complete checkpoint at any time, even if the process is killed.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        self.root = run_dir / CHECKPOINTS
        self.config = config

    def save(self, state: RunState, writers: Sequence[Writer]) -> Path:
        """Write a checkpoint, and wait until it is committed; raises as `begin` and `finish`."""
        return self.finish(self.begin(state, writers))

    def begin(self, state: RunState, writers: Sequence[Writer]) -> Unfinished:
        """Begin a checkpoint of the present state in a temporary folder. The run may go on once
        this returns.

        Raises:
            CheckpointError: there is no room, or a file could not be written. Existing checkpoints
                are unchanged.
        """
        final = self.root / f"step_{state.step:06d}"
        folder = self.temporary(final)
        with removed_on_error(folder, final):
            folder.mkdir(parents=True)
            sync_to_disk(self.root.parent)  # the first save creates the root
            failpoints.hit("checkpoint.begun", step=state.step)
            self._check_room(final, writers)
            files = [writer.begin_save(str(folder)) for writer in writers]
        return Unfinished(folder=folder, final=final, state=state, files=files)

    def finish(self, unfinished: Unfinished) -> Path:
        """Wait for the files of a checkpoint, sync it, verify it, and rename its folder. Only then
        are older checkpoints removed. It may be called in another thread than `begin`.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: a file could not be written, or differs from what was written when it
                is read back. Existing checkpoints are unchanged.
        """
        state = unfinished.state
        final = unfinished.final
        with removed_on_error(unfinished.folder, final):
            write(unfinished)
            failpoints.hit("checkpoint.written", step=state.step)
            read_checkpoint(unfinished.folder)
            failpoints.hit("checkpoint.verified", step=state.step)
            self._commit(unfinished.folder, final)
        if self.config.best and not math.isfinite(state.metrics.get(self.config.best, math.nan)):
            log.warning(
                "%s: its step has no finite %s, so checkpoint.best ignores it",
                final,
                self.config.best,
            )
        try:
            self._prune(state.step)
        except (OSError, RunDirectoryError) as error:  # if in doubt, nothing is removed
            log.warning("%s: older checkpoints stay for now: %s", self.root, error)
        return final

    def temporary(self, final: Path) -> Path:
        """The path for a new temporary folder, which `clean` would remove.

        Each call returns a new name, since an abandoned worker may still write to an old folder.
        """
        return self.root / f"{UNFINISHED}{final.name}-{uuid.uuid4().hex[:12]}"

    def clean(self) -> None:
        """Remove the temporary folders of a killed run, and undo a half-finished replacement.

        The caller must hold the lock of the run directory.

        Raises:
            CheckpointError: a folder cannot be removed.
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
            OSError: the folder of checkpoints exists and cannot be listed.
        """
        return step_folders(self.root.parent)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that agrees with its manifest; None: there are no checkpoints.

        Checkpoints that are certainly damaged are logged and skipped.

        Raises:
            CheckpointError: a checkpoint cannot be read at the moment, or is of another version. It
                may be undamaged, so no older one is used instead. Or all checkpoints are damaged:
                starting from step 0 would hide the loss.
            OSError: the folder of checkpoints exists and cannot be listed.
        """
        damaged = []
        for folder in reversed(self.folders()):
            try:
                return read_checkpoint(folder)
            except DamagedCheckpoint as error:
                log.error("damaged checkpoint skipped: %s", error)
                damaged.append(str(error))
        if damaged:
            raise CheckpointError(
                f"no usable checkpoint in {self.root}: {'; '.join(damaged)}; remove the folder to "
                "start afresh"
            )
        return None

    def set_aside_newer(self, step: int) -> None:
        """Rename the checkpoints after `step`, which are damaged, so that these steps can be saved
        again.

        They are not removed, since their owner may still be able to use them.
        """
        for folder in self.folders():
            if step_of(folder) > step:
                renamed = folder.with_name(f"{folder.name}.damaged-{uuid.uuid4().hex[:6]}")
                folder.rename(renamed)
                log.error("%s: damaged, renamed to %s", folder, renamed.name)

    def best(self, folders: Sequence[Path]) -> Path | None:
        """The folder with the best value of the metric checkpoint.best, the first one if several
        are equal; None: checkpoint.best is not set, or no folder has a finite value of it.
        """
        if not self.config.best:
            return None
        sign = 1 if self.config.best_mode is BestMode.max else -1
        values = {folder: sign * metric_of(folder, self.config.best) for folder in folders}
        finite = {folder: value for folder, value in values.items() if math.isfinite(value)}
        return max(finite, key=finite.__getitem__, default=None)

    def _check_room(self, final: Path, writers: Sequence[Writer]) -> None:
        needed = sum(w.state_bytes() for w in writers) + HEADROOM
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise CheckpointError(
                f"{final}: not saved: needs {needed} bytes, the disk has {free} free; free disk "
                f"space, e.g. by removing older folders in {self.root}"
            )

    def _commit(self, unfinished: Path, final: Path) -> None:
        """Rename the temporary folder to its final name, and remove an older checkpoint of that
        name.

        If the process is killed between the two renames, `clean` restores the older one.
        """
        replaced = self.root / f"{REPLACED}{final.name}"
        if os.path.lexists(final):
            final.rename(replaced)
        failpoints.hit("checkpoint.replaced", step=step_of(final))
        try:
            unfinished.rename(final)
        except OSError:
            if os.path.lexists(replaced):
                replaced.rename(final)
            raise
        failpoints.hit("checkpoint.renamed", step=step_of(final))
        sync_to_disk(self.root)
        with suppress(CheckpointError):  # the next `clean` tries it again
            remove(replaced)

    def _prune(self, step: int) -> None:
        """Remove the run's checkpoints up to `step`, except the newest ones and the best one."""
        candidates = [
            folder
            for folder in self.folders()
            if step_of(folder) <= step and read_bytes(folder / MANIFEST) is not None
        ]
        retained = {*candidates[-self.config.keep :], self.best(candidates)}
        for folder in candidates:
            if folder not in retained:
                renamed = folder.rename(self.temporary(folder))  # since a removal is not atomic
                failpoints.hit("checkpoint.pruned", step=step)
                with suppress(CheckpointError):  # the next `clean` tries it again
                    remove(renamed)


def step_folders(run_dir: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first.

    Raises:
        OSError: the folder of checkpoints exists and cannot be listed.
    """
    folders = [path for path in entries(run_dir / CHECKPOINTS) if STEP_FOLDER.fullmatch(path.name)]
    return sorted(folders, key=step_of)


def remove(path: Path) -> None:
    """Remove a folder with its content, or a file. If it is a link, only the link is removed: it
    may lead to a checkpoint that its owner moved to another disk.

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


@contextmanager
def removed_on_error(folder: Path, final: Path) -> Iterator[None]:
    """Remove the temporary folder of a checkpoint if the `with` block raises an exception.

    Raises:
        CheckpointError: the block raised an OSError; the message names the folder `final`.
    """
    try:
        yield
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{final}: not saved: {error}") from error
        raise


def write(unfinished: Unfinished) -> None:
    """Wait for the writers' files, then write the controller's state, and a manifest with the
    digests that the writers reported. All files are synced to disk.
    """
    folder = unfinished.folder
    state = unfinished.state
    files = [file for wait in unfinished.files for file in wait()]
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
    """Verify every file against the manifest, and only then read the state.

    Raises:
        DamagedCheckpoint: a file is certainly missing, or its bytes differ from the manifest.
        CheckpointError: the checkpoint cannot be read at the moment, or does not have the form that
            this version of hybridrl writes.
    """
    try:
        manifest = read_manifest(folder)
        verify(folder, manifest["files"])
        state = read_state(folder)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder}: cannot be read now ({error.strerror}), which may pass, "
            "so no older checkpoint is used instead and nothing was changed; run the same command "
            f"again, or move {folder.name} elsewhere to continue from an older one"
        ) from error
    named = STEP_FOLDER.fullmatch(folder.name)
    steps = {manifest["step"], state.step, *([int(named[1])] if named else [])}
    if len(steps) > 1:
        raise CheckpointError(
            f"{folder}: its name, manifest and state do not agree on the step "
            f"({', '.join(map(str, sorted(steps)))}), so it was renamed or edited; restore its "
            "name, or move it elsewhere"
        )
    return Checkpoint(folder=folder, state=state)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint and check its form.

    Raises:
        DamagedCheckpoint: it is missing, or does not have the form that `write` gives it.
        CheckpointError: it is of another version, or names files outside of the folder.
        OSError: it cannot be read.
    """
    manifest = read_json(folder / MANIFEST)
    try:
        version = whole_number(manifest["format"], "format")
        if version != FORMAT:
            raise CheckpointError(
                f"{folder}: has format {version}, but this version of hybridrl reads {FORMAT}"
            )
        whole_number(manifest["step"], "step")
        for name, entry in manifest["files"].items():
            if Path(name).name != name or "\0" in name:
                raise CheckpointError(
                    f"{folder}: its manifest names {name!r}, which is not a plain file name"
                )
            whole_number(entry["bytes"], f"size of {name}")
            if not isinstance(entry["sha256"], str):
                raise ValueError(f"{name} has no sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = shortened(error)
        raise DamagedCheckpoint(f"{folder / MANIFEST}: unreadable manifest: {reason}") from error
    if STATE not in manifest["files"]:
        raise CheckpointError(f"{folder}: its manifest does not list {STATE}")
    return manifest


def state_to_json(state: RunState) -> dict[str, Any]:
    """The content of state.json: all fields, with the id of each tracker's run under NAME_id.

    Metrics that are not finite are omitted.

    Example: trackers={"wandb": "x1"} becomes "wandb_id": "x1".
    """
    content = asdict(state)
    del content["trackers"]
    content["metrics"] = {
        key: float(value) for key, value in state.metrics.items() if math.isfinite(value)
    }
    return content | {f"{name}{TRACKER_ID}": run_id for name, run_id in state.trackers.items()}


def state_from_json(content: Any) -> RunState:
    """Make the state from the content of state.json.

    Raises:
        TypeError, ValueError: the content does not have the form that `state_to_json` returns.
    """
    if not isinstance(content, dict):
        raise ValueError("it is not a mapping")
    ids = {key: value for key, value in content.items() if key.endswith(TRACKER_ID)}
    for key, value in ids.items():
        if not isinstance(value, str | None):
            raise ValueError(f"{key} is not text")
    return RunState(
        **{key: value for key, value in content.items() if key not in ids},
        trackers={
            key.removesuffix(TRACKER_ID): value for key, value in ids.items() if value is not None
        },
    )


def read_state(folder: Path) -> RunState:
    """The controller's state in a checkpoint.

    Raises:
        DamagedCheckpoint: state.json is missing or is not JSON.
        CheckpointError: its fields or their types are not those of RunState.
        OSError: it cannot be read.
    """
    try:
        state = state_from_json(read_json(folder / STATE))
        for what in ("step", "weight_version", "optimizer_steps"):
            whole_number(getattr(state, what), what)
        for what in ("parts", "metrics", "inputs"):
            if not isinstance(getattr(state, what), dict):
                raise ValueError(f"{what} is not a mapping")
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / STATE}: not a state of this version of hybridrl: {error}"
        ) from error
    return state


def read_json(path: Path) -> Any:
    """The content of a JSON file of a checkpoint.

    Raises:
        DamagedCheckpoint: the file is missing, or is not JSON.
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
    """Compare the files of a checkpoint with their entries in the manifest.

    Raises:
        DamagedCheckpoint: a file is certainly missing, or has other bytes.
        CheckpointError: a file is a link, or the folder has a .safetensors file without an entry.
        OSError: a file cannot be read.
    """
    different = "missing or not what the manifest says"
    for name, entry in files.items():
        path = folder / name
        try:
            status = retry(partial(os.stat, path, follow_symlinks=False))
        except ABSENT as error:
            raise DamagedCheckpoint(f"{path}: {different}") from error
        if stat.S_ISLNK(status.st_mode):
            raise CheckpointError(
                f"{path}: is a link, which could point anywhere; replace it with the file"
            )
        if not stat.S_ISREG(status.st_mode) or status.st_size != entry["bytes"]:
            raise DamagedCheckpoint(f"{path}: {different}")
    weights = [path for path in entries(folder) if path.suffix == ".safetensors"]
    if unknown := [path for path in weights if path.name not in files]:
        raise CheckpointError(f"{unknown[0]}: the manifest does not list it")
    with ThreadPoolExecutor(HASHING) as pool:
        digests = pool.map(lambda name: sha256(folder / name), files)
        for (name, entry), digest in zip(files.items(), digests, strict=True):
            if digest != entry["sha256"]:
                raise DamagedCheckpoint(f"{folder / name}: {different}")


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def metric_of(folder: Path, name: str) -> float:
    """A metric of the checkpoint's step; NaN: it was not measured, or the state is damaged.

    Raises:
        OSError: the state cannot be read at the moment.
    """
    try:
        return float(json.loads(read_bytes(folder / STATE) or b"")["metrics"][name])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return math.nan
