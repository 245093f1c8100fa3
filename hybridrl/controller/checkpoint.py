"""Checkpoints: a folder that appears whole or not at all, with the sha256 of every file in its manifest."""

import json
import logging
import math
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hybridrl import failpoints
from hybridrl.choices import BestMode
from hybridrl.config import CheckpointConfig
from hybridrl.durable import seal, sha256, sync_to_disk
from hybridrl.errors import CheckpointError
from hybridrl.types import SavedFile

log = logging.getLogger(__name__)
MANIFEST, STATE, FORMAT = "manifest.json", "state.json", 2
UNFINISHED, REPLACED = ".unfinished-", ".replaced-"
HEADROOM = 1 << 20  # bytes for state, manifest and headers
HASHING = 8  # threads; hashlib lets go of the interpreter lock


class Stateful(Protocol):
    """A part of the controller that a step changes. Whatever has such state is named in Controller.stateful."""

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
    wandb_id: str | None
    inputs: dict[str, str] = field(default_factory=dict)  # controller.inputs.digests


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    folder: Path
    state: RunState


class Checkpointer:
    """checkpoints/step_NNNNNN under the run directory; the newest `keep` stay, and the best one.

    At any moment, a kill included, there is at least one whole checkpoint once there was one.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        self.root, self.config = run_dir / "checkpoints", config

    def save(self, state: RunState, writers: Sequence[Writer]) -> Path:
        """Write into a temporary folder, sync it to disk, read it back, rename it; only then drop what is not kept.

        Raises:
            CheckpointError: no room, a file could not be written, or the disk does not give back what was written.
                The checkpoints that are there are untouched.
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
        self._prune(state.step)
        return final

    def aside(self, final: Path) -> Path:
        """A folder that `clean` removes, of a new name each time: a worker that was given up may still write into an older one."""
        return self.root / f"{UNFINISHED}{final.name}-{uuid.uuid4().hex[:12]}"

    def clean(self) -> None:
        """Remove or finish what a killed run left half done. Only who holds the run directory's lock may call it.

        Raises:
            CheckpointError: something of it cannot be removed.
        """
        for left in self.root.glob(f"{UNFINISHED}*"):
            remove(left)
        for left in self.root.glob(f"{REPLACED}*"):
            final = self.root / left.name.removeprefix(REPLACED)
            if final.exists():
                remove(left)
            else:
                left.rename(final)

    def folders(self) -> list[Path]:
        """Committed checkpoints, oldest first."""
        found = [p for p in self.root.glob("step_*") if re.fullmatch(r"step_\d{6,}", p.name)]
        return sorted(found, key=step_of)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is what its manifest says; a damaged one is named aloud and passed over.

        Raises:
            CheckpointError: there are checkpoints and all are damaged: starting afresh would hide the loss.
        """
        damaged = []
        for folder in reversed(self.folders()):
            try:
                return read_checkpoint(folder)
            except CheckpointError as error:
                log.error("damaged checkpoint passed over: %s", error)
                damaged.append(str(error))
        if damaged:
            raise CheckpointError(
                f"no usable checkpoint in {self.root}: {'; '.join(damaged)}; remove the folder to start afresh"
            )
        return None

    def best(self, folders: Sequence[Path]) -> Path | None:
        """That with the best value of checkpoint.best, the oldest of equals; None: not asked for, or none has one."""
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
                f"{final}: not saved: needs {needed} bytes, the disk has {free} free; free some, or lower checkpoint.keep"
            )

    def _commit(self, unfinished: Path, final: Path) -> None:
        """Two renames where the step is there already; `clean` takes the first one back if the second never came."""
        replaced = self.root / f"{REPLACED}{final.name}"
        if final.exists():
            final.rename(replaced)
        failpoints.hit("checkpoint.replaced", step=step_of(final))
        unfinished.rename(final)
        failpoints.hit("checkpoint.renamed", step=step_of(final))
        sync_to_disk(self.root)
        with suppress(CheckpointError):  # `clean` comes again
            remove(replaced)

    def _prune(self, step: int) -> None:
        """Drop our own folders but the newest up to `step` and the best. Newer than `step` are those that were damaged when
        the run continued from an older one."""
        ours = [folder for folder in self.folders() if (folder / MANIFEST).is_file()]
        done = [folder for folder in ours if step_of(folder) <= step]
        kept = {*done[-self.config.keep :], self.best(done)}
        for folder in ours:
            if folder not in kept:
                doomed = folder.rename(self.aside(folder))  # half removed, it is no checkpoint
                failpoints.hit("checkpoint.pruned", step=step)
                with suppress(CheckpointError):  # `clean` comes again
                    remove(doomed)


def remove(path: Path) -> None:
    """A folder with all that is in it; of a link, as to a checkpoint that its owner moved to another disk, the link alone.

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
    """All files of a checkpoint, and the manifest that names what their writers say they wrote, on disk."""
    files = [file for writer in writers for file in writer.save_state(str(folder))]
    failpoints.hit("checkpoint.shards", step=state.step)
    metrics = {key: float(value) for key, value in state.metrics.items() if math.isfinite(value)}
    (folder / STATE).write_text(json.dumps(asdict(state) | {"metrics": metrics}, indent=1))
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
        CheckpointError: naming the file that is missing, differs, or that the manifest does not know.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{folder}: of format {manifest['format']}, this version of hybridrl reads {FORMAT}"
            )
        verify(folder, manifest["files"])
        return Checkpoint(folder=folder, state=RunState(**json.loads((folder / STATE).read_text())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: unreadable manifest or state: {error}") from error


def verify(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises:
    CheckpointError: the folder is not what `files`, of a manifest, says.
    """
    for name, entry in files.items():
        if Path(name).name != name:
            raise CheckpointError(f"{folder}: manifest names {name!r}, which is no plain file name")
        if (folder / name).is_symlink():
            raise CheckpointError(
                f"{folder / name}: a link, which could point anywhere; put the file in its place"
            )
        if not (folder / name).is_file() or (folder / name).stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{folder / name}: missing or not what the manifest says")
    if STATE not in files:
        raise CheckpointError(f"{folder}: manifest without {STATE}")
    if unknown := sorted(p.name for p in folder.glob("*.safetensors") if p.name not in files):
        raise CheckpointError(f"{folder / unknown[0]}: the manifest does not name it")
    with ThreadPoolExecutor(HASHING) as pool:
        digests = pool.map(lambda name: sha256(folder / name), files)
        for (name, entry), digest in zip(files.items(), digests, strict=True):
            if digest != entry["sha256"]:
                raise CheckpointError(f"{folder / name}: missing or not what the manifest says")


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def metric_of(folder: Path, name: str) -> float:
    """A metric of the checkpoint's step; NaN: it was not measured there, or the state cannot be read."""
    try:
        return float(json.loads((folder / STATE).read_text())["metrics"][name])
    except (OSError, ValueError, KeyError, TypeError):
        return math.nan
