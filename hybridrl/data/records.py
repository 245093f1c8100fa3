"""Problems from the rows of a file, a folder or a dataset on the hub; what a row may hold is told in schema.py.

    train.jsonl                              one JSON object a line, as any file that is no .parquet
    train.parquet
    DIR, DIR:SPLIT                           a dataset's folder, of save_to_disk or of data files
    OWNER/NAME[:CONFIG][:SPLIT]              a dataset on the Hugging Face hub

The last three need the optional packages of hybridrl[data]. A dataset of one split needs no :SPLIT.
"""

import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from hybridrl.data import schema
from hybridrl.data.problem import Problem
from hybridrl.errors import ConfigError, DataError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[^:/]+){0,2}")
FILE_NAME = re.compile(
    r".*\.(jsonl?|parquet|csv|txt)"
)  # a file that is missing is not looked for on the hub

Row = tuple[int, dict[str, Any]]
"""Number, from 1, and what the row holds."""


def load(path: str, split: str, revision: str | None = None) -> list[Problem]:
    """Problems of one source; uids count its rows (of .jsonl: lines, empty ones included) from 1, e.g. "train-000003".

    Args:
        split: "train" or "heldout", how uids begin.
        revision: of a dataset on the hub; None: the newest.

    Raises:
        ConfigError: the source needs a package that is not installed.
        DataError: no such source, no rows, or a bad row, named as path:number.
    """
    problems = [
        schema.problem(row, f"{path}:{number}", f"{split}-{number:06d}")
        for number, row in rows(path, revision)
    ]
    if not problems:
        raise DataError(
            f"{path}: holds no rows; needs at least one with a `prompt`, `messages`, or `chosen` and `rejected`"
        )
    return problems


def rows(path: str, revision: str | None = None) -> Iterator[Row]:
    """Raises: as load."""
    folder, _, split = path.partition(":") if not Path(path).exists() else (path, "", "")
    if Path(folder).is_dir():
        return _dataset(path, folder, None, split, None)
    if HUB_NAME.fullmatch(path) and not FILE_NAME.fullmatch(path) and not Path(path).exists():
        name, *rest = path.split(":")
        return _dataset(
            path, name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "", revision
        )
    return _parquet(path) if path.endswith(".parquet") else _jsonl(path)


def _jsonl(path: str) -> Iterator[Row]:
    try:
        lines = (
            Path(path).read_text(encoding="utf-8").split("\n")
        )  # splitlines knows ends of lines that JSON allows in a text
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}:{number}: is a {type(row).__name__}; needs an object with a `prompt` key"
            )
        yield number, row


def _parquet(path: str) -> Iterator[Row]:
    parquet = _package("pyarrow.parquet", path)
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise DataError(f"{path}: cannot be read as parquet: {error}") from error
    return enumerate(table.to_pylist(), 1)


def _dataset(
    path: str, name: str, config: str | None, split: str, revision: str | None
) -> Iterator[Row]:
    """Args: name: a folder or a name on the hub. split: "": the only one."""
    datasets = _package("datasets", path)
    saved = any(
        (Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")
    )  # by save_to_disk
    try:
        found = (
            datasets.load_from_disk(name)
            if saved
            else datasets.load_dataset(name, config, revision=revision)
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: no dataset can be read there: {error}") from error
    splits = found if isinstance(found, dict) else {split: found}
    if not split and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        raise DataError(
            f"{path}: name one of its splits, e.g. {name}:{next(iter(splits))}; it has {', '.join(map(str, splits))}"
        )
    return enumerate(splits[split], 1)


def _package(name: str, path: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"data.path or data.heldout_path={path}: reading it needs {name}; pip install 'hybridrl[data]'"
        ) from error
