"""Reads the files that wandb has written for a run."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

FILE_HEADER = 7
BLOCK = 32768
RECORD_HEADER = 7  # 4 bytes of a checksum, 2 of the length, 1 of the kind
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


LIMIT_S = 60.0


def records(run_dir: Path) -> list[Record]:
    """The records of the .wandb file under a run directory. Waits for the last record, which
    wandb's own process writes after the run is finished.
    """
    return wait_for(run_dir, "exit")


def wait_for(
    run_dir: Path, kind: str, meanwhile: Callable[[], None] = lambda: None
) -> list[Record]:
    """Wait until a record of a kind is on disk; returns all records that are then on disk.

    Args:
        meanwhile: a function that is called repeatedly until then.

    Raises:
        AssertionError: there is no such record after LIMIT_S.
    """
    [path] = run_dir.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + LIMIT_S
    while True:
        found = [Record.FromString(data) for data in _entries(path.read_bytes())]
        if any(record.HasField(kind) for record in found):
            return found
        assert time.monotonic() < deadline, f"{path} has no record of {kind}"
        meanwhile()
        time.sleep(0.05)


def config(run_dir: Path) -> dict[str, Any]:
    """The config with which the run was started."""
    [begun] = [r.run for r in records(run_dir) if r.HasField("run")]
    return {item.key: json.loads(item.value_json) for item in begun.config.update}


def tables(run_dir: Path, key: str) -> list[dict[str, Any]]:
    """The tables that were logged under a key, each with `columns` and `data`."""
    folder = f"wandb/offline-run-*/files/media/table/{key}_*.table.json"
    return [json.loads(path.read_text()) for path in sorted(run_dir.glob(folder))]


def _entries(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format; an incomplete last one is ignored."""
    place = FILE_HEADER
    parts = b""
    while place + RECORD_HEADER <= len(data):
        room = BLOCK - place % BLOCK
        if room < RECORD_HEADER:  # the rest of a block is zeros
            place += room
            continue
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        kind = data[place + 6]
        place += RECORD_HEADER + length
        if place > len(data):
            return
        parts += data[place - length : place]
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""
