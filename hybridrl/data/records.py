"""Problems from the rows of a file, a folder or a dataset on the hub.

    train.jsonl, train.csv.gz, ...           a file of one of the kinds in row_files.py
    DIR, DIR:SPLIT                           a dataset's folder, of save_to_disk or of data files
    OWNER/NAME[:CONFIG][:SPLIT]              a dataset on the Hugging Face hub

schema.py describes a row. The last two sources, and Parquet, need the optional packages of
hybridrl[data]. A dataset with one split needs no :SPLIT.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hybridrl.core.errors import DataError
from hybridrl.data import schema
from hybridrl.data.columns import json_columns, renamed
from hybridrl.data.problem import Problem
from hybridrl.data.row_files import (
    Row,
    file_rows,
    holds_messages,
    is_file_name,
    package,
    without_nulls,
)

log = logging.getLogger(__name__)

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[^:/]+){0,2}")

NOT_ROWS = (".txt", ".zip", ".zst")
"""Endings of files that the datasets library reads differently from row_files.py."""

NO_COLUMNS: Mapping[str, str | None] = {}
"""Every key is read under its own name."""


def load(
    path: str,
    split: str,
    revision: str | None = None,
    columns: Mapping[str, str | None] = NO_COLUMNS,
) -> list[Problem]:
    """The problems of one source.

    Uids contain the row's number from 1, or in JSON lines and CSV its line, e.g. "train-000003".

    Args:
        split: "train" or "heldout", with which uids begin.
        revision: of a dataset on the hub; None: the newest.
        columns: data.columns.

    Raises:
        ConfigError: the source needs a package that is not installed.
        DataError: there is no such source, it has no rows, or a row is bad, which the error names
            as path:number.
    """
    problems = []
    for number, row in rows(path, revision):
        name = f"{path}:{number}"
        problems.append(schema.problem(renamed(row, columns, name), name, f"{split}-{number:06d}"))
    if not problems:
        raise DataError(
            f"{path}: holds no rows; needs at least one with a `prompt`, `messages`, or `chosen` "
            "and `rejected`"
        )
    return json_columns(problems)


def rows(path: str, revision: str | None = None) -> Iterator[Row]:
    """The numbered rows of one source.

    Raises:
        ConfigError, DataError: as load.
    """
    if Path(path).is_dir():
        return _dataset(path, path, None, "", None)
    folder, _, split = path.partition(":")
    if not Path(path).exists() and Path(folder).is_dir():
        return _dataset(path, folder, None, split, None)
    name = hub_dataset(path)
    if name is not None:
        rest = path.split(":")[1:]
        config = rest[0] if len(rest) == 2 else None
        return _dataset(path, name, config, rest[-1] if rest else "", revision)
    return file_rows(path)


def hub_dataset(path: str) -> str | None:
    """The OWNER/NAME of a path that is a dataset on the hub; None: it is a file or a folder. The
    name of a missing file is not taken for a dataset on the hub.

    Example: hub_dataset("openai/gsm8k:main:train") == "openai/gsm8k".
    """
    folder = path.partition(":")[0]
    if not HUB_NAME.fullmatch(path) or is_file_name(path) or Path(path).exists():
        return None
    return None if Path(folder).is_dir() else folder


def _dataset(
    path: str, name: str, config: str | None, split: str, revision: str | None
) -> Iterator[Row]:
    """The rows of a dataset.

    Args:
        name: a folder or a name on the hub.
        split: may be empty if there is only one.
    """
    datasets = package("datasets", path)
    markers = ("dataset_dict.json", "state.json")  # files that save_to_disk writes
    saved = any((Path(name) / marker).is_file() for marker in markers)
    try:
        loaded = (
            datasets.load_from_disk(name)
            if saved
            else datasets.load_dataset(name, config, revision=revision)
        )
    # A dataset with a loading script is a RuntimeError.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if not saved and Path(name).is_dir():
            _name_bad_file(Path(name))
        generating = isinstance(error, datasets.exceptions.DatasetGenerationError)
        # The text of a DatasetGenerationError does not include the reason.
        reason = error.__cause__ if generating else error
        raise DataError(
            f"{path}: no dataset can be read there: {reason}; correct the path, or give one file "
            "of it"
        ) from error
    splits = loaded if isinstance(loaded, dict) else {str(loaded.split or ""): loaded}
    if split and "" in splits:
        raise DataError(f"{path}: the dataset was saved without splits; write {name}")
    if not split and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        raise DataError(
            f"{path}: name one of its splits, e.g. {name}:{next(iter(splits))}; it has "
            f"{', '.join(map(str, splits))}"
        )
    return _dataset_rows(path, splits[split])


def _name_bad_file(folder: Path) -> None:
    """Read the data files of a folder one by one, because the library does not name a bad one.

    Raises:
        DataError: a file cannot be read by itself; names the first.
    """
    for file in sorted(folder.rglob("*")):
        if file.is_file() and is_file_name(file.name) and file.suffix not in NOT_ROWS:
            for _ in file_rows(str(file)):
                pass


def _dataset_rows(path: str, dataset: Any) -> Iterator[Row]:
    """The rows of one split.

    Media stay stored bytes, since decoding them needs further packages and they contain no text.
    In messages and descriptions of tools, nulls are removed, with which a table fills fields that
    only other rows have. A column whose values have different types is stored by the library as
    JSON, and decoded; a warning names it.
    """
    json_type = package("datasets", path).Json
    mixed = [name for name, feature in dataset.features.items() if isinstance(feature, json_type)]
    for name, feature in dataset.features.items():
        if getattr(feature, "decode", False) and name not in mixed:
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    if mixed:
        log.warning(
            "%s: the values of %s differ in type between rows, so the datasets library reads a "
            'text that is also JSON, such as "2" or "true", as a number or truth value; give one '
            "file of it, which is read as it is written, or store one type",
            path,
            ", ".join(f"`{name}`" for name in mixed),
        )
    conversations = [f.name for f in dataset.features.arrow_schema if holds_messages(f.type)]
    numbered = enumerate(dataset, 1)
    number = 0
    while True:
        try:
            number, row = next(numbered, (0, None))
        except Exception as error:  # a conversion may raise any exception
            raise DataError(
                f"{path}:{number + 1}: cannot be read: {type(error).__name__}: {error}; "
                "remove the column that holds it, or store it as text"
            ) from error
        if row is None:
            return
        yield number, row | {name: without_nulls(row[name]) for name in conversations}
