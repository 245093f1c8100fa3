"""Checkpoints: a folder that appears whole or not at all, with the sha256 of every file in its manifest."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybridrl.errors import CheckpointError

log = logging.getLogger(__name__)
MANIFEST, STATE = "manifest.json", "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Everything of the controller that a resumed run needs; weights and optimizer lie beside it."""

    step: int  # optimizer steps done
    weight_version: int
    optimizer_steps: int
    prompts: dict[str, Any]  # the data cursor, and the uids that were drawn and not trained on
    schedules: dict[str, float]  # where feedback schedules hold their weights
    wandb_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    folder: Path
    state: RunState


class Checkpointer:
    """checkpoints/step_NNNNNN under the run directory; the newest `keep` stay."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.root, self.keep = run_dir / "checkpoints", keep

    def save(self, state: RunState, write_learner: Callable[[str], None]) -> Path:
        """Write into a temporary folder, sync it to disk, rename it; only then drop the oldest.

        Args:
            write_learner: puts the learner's files into the folder it is given.
        """
        final = self.root / f"step_{state.step:06d}"
        unfinished = self.root / f".unfinished-{final.name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_learner(str(unfinished))
        (unfinished / STATE).write_text(json.dumps(asdict(state), indent=1))
        files = {p.name: {"sha256": sha256(p), "bytes": p.stat().st_size} for p in sorted(unfinished.iterdir())}
        (unfinished / MANIFEST).write_text(json.dumps({"format": 1, "step": state.step, "files": files}, indent=1))
        for path in (*unfinished.iterdir(), unfinished):
            sync_to_disk(path)
        if final.exists():  # the same step again, after a resume from an older one
            shutil.rmtree(final)
        unfinished.rename(final)
        sync_to_disk(self.root)
        for old in self.folders()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def folders(self) -> list[Path]:
        """Committed checkpoints, oldest first."""
        found = [p for p in self.root.glob("step_*") if re.fullmatch(r"step_\d{6,}", p.name)]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))

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
            raise CheckpointError(f"no usable checkpoint in {self.root}: {'; '.join(damaged)}; remove the folder to start afresh")
        return None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Verify every file against the manifest, then read the state.

    Raises:
        CheckpointError: naming the file that is missing or differs.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        for name, entry in files.items():
            if Path(name).name != name:
                raise CheckpointError(f"{folder}: manifest names {name!r}, which is no plain file name")
            if not (folder / name).is_file() or sha256(folder / name) != entry["sha256"]:
                raise CheckpointError(f"{folder / name}: missing or not what the manifest says")
        if STATE not in files:
            raise CheckpointError(f"{folder}: manifest without {STATE}")
        return Checkpoint(folder=folder, state=RunState(**json.loads((folder / STATE).read_text())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: unreadable manifest or state: {error}") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
