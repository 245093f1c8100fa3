"""The rows of one file: JSON lines, a JSON array, CSV, TSV or Parquet, also compressed.

CSV, TSV and Parquet are recognised by the ending of the name, Parquet also by its first bytes;
every other file is read as JSON. Compression and the encoding of text (UTF-8, or UTF-16 and UTF-32
with a byte order mark) are recognised by the first bytes. Every error names the file, the line if
there is one, and a remedy.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from hybridrl.core.errors import ConfigError, DataError
from hybridrl.data.layouts import listed

Row = tuple[int, dict[str, Any]]
"""(number from 1, content)."""

COMPRESSED = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ": lzma.decompress}
"""The decompression function by the first bytes of a file."""

FOREIGN = {
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save the sheet as .csv",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it with unzstd",
    b"ARROW1": "an Arrow file; save it as .parquet",
    b"\x80\x04": "a pickle, which could run any code; save it as JSON lines",
    b"\x80\x05": "a pickle, which could run any code; save it as JSON lines",
}
"""First bytes of formats that are recognised but not read."""

PARQUET = b"PAR1"

BYTE_ORDER_MARKS = {  # longer marks first, since that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

COMPRESSED_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".zip")
ENDINGS = (".json", ".jsonl", ".ndjson", ".txt", ".csv", ".tsv", ".parquet", ".pq")

LARGEST_CELL = 2**31 - 1  # characters; the csv module's own limit is 131072


def is_file_name(path: str) -> bool:
    """Whether the name has the ending of a data file, whether or not the file exists."""
    return Path(path).suffix.lower() in ENDINGS + COMPRESSED_ENDINGS


def file_rows(path: str) -> Iterator[Row]:
    """The rows of the file at `path`; those of JSON lines and CSV are numbered by their first line.

    Raises:
        ConfigError: the file is Parquet, and the package that reads it is not installed.
        DataError: there is no such file, or a part of it cannot be read.
    """
    data = _content(path)
    ending = _ending(path)
    if data.startswith(PARQUET) or ending in (".parquet", ".pq"):
        return table_rows(path, _parquet(path, data))
    text = _text(path, data)
    if ending in (".csv", ".tsv"):
        return _csv(path, text, "\t" if ending == ".tsv" else ",")
    return _array(path, text) if text.lstrip().startswith("[") else _lines(path, text)


def _ending(path: str) -> str:
    """The ending that determines the format, e.g. ".csv" of rows.csv.gz."""
    whole = Path(path)
    if whole.suffix.lower() in COMPRESSED_ENDINGS:
        whole = whole.with_suffix("")
    return whole.suffix.lower()


def _content(path: str) -> bytes:
    """The decompressed bytes of the file."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file; correct the path") from error
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise DataError(f"{path}: cannot be read: {error}") from error
    for start, what in FOREIGN.items():
        if data.startswith(start):
            raise DataError(f"{path}: is {what}")
    for start, unpack in COMPRESSED.items():
        if data.startswith(start):
            try:
                return unpack(data)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise DataError(
                    f"{path}: cannot be unpacked: {error}; get the file again, it may be cut short"
                ) from error
    return data


def _text(path: str, data: bytes) -> str:
    marked = (name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark))
    encoding = next(marked, "utf-8")
    if encoding == "utf-8" and b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: holds a NUL byte, so it is not UTF-8 text; save the file as UTF-8"
        )
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: the byte 0x{data[error.start]:02x} is not valid {encoding.upper()}; "
            f"convert the file, e.g. iconv -f WINDOWS-1252 -t UTF-8 {Path(path).name} > "
            f"converted{Path(path).suffix}"
        ) from error


def _lines(path: str, text: str) -> Iterator[Row]:
    first = True
    for number, line in enumerate(text.split("\n"), 1):  # JSON strings may hold other line ends
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError as error:
            raise DataError(f"{path}:{number}: is nested too deep; flatten it") from error
        except ValueError as error:
            keys = _keys_of_one_object(text) if first else None
            if keys is not None:
                raise DataError(
                    f"{path}: is one JSON object, with {listed(keys)}; write one object a line, "
                    "or an array of objects"
                ) from error
            raise DataError(
                f"{path}:{number}: not JSON: {_reason(error, line)}; write one JSON object a "
                "line, as json.dumps does"
            ) from error
        yield number, _checked_object(row, f"{path}:{number}")
        first = False


def _keys_of_one_object(text: str) -> list[str] | None:
    """The keys if the whole text is one JSON object over several lines, else None."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return list(whole) if isinstance(whole, dict) else None


def _array(path: str, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except RecursionError as error:
        raise DataError(f"{path}: is nested too deep; flatten its rows") from error
    except ValueError as error:
        if _is_json(text.lstrip().partition("\n")[0]):
            return _lines(path, text)  # one value per line, the first of which is a list
        line = getattr(error, "lineno", 1)
        raise DataError(
            f"{path}:{line}: not JSON: {_reason(error, text)}; correct the array, or write one "
            "JSON object a line"
        ) from error
    return (
        (number, _checked_object(row, f"{path}:{number}")) for number, row in enumerate(rows, 1)
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _reason(error: ValueError, text: str) -> str:
    """The reason of a JSON error, and the text at its position."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    shown = text[error.pos : error.pos + 30]
    return f"{error.msg} at column {error.colno}, before {shown!r}"


def _checked_object(row: Any, name: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f"{name}: is of type {type(row).__name__}; needs an object with a `prompt` key"
        )
    return row


def _csv(path: str, text: str, delimiter: str) -> Iterator[Row]:
    """Rows with the names of the header as keys; every cell is text."""
    limit = csv.field_size_limit(LARGEST_CELL)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        next_line = 1  # the line on which the next row begins
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DataError(
                    f"{path}:{next_line}: not CSV: {error}; put a cell with quotes, commas or line "
                    'breaks into double quotes, and write a quote inside of it as ""'
                ) from error
            number = next_line
            next_line = reader.line_num + 1
            if cells is None:
                return
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _header(cells, f"{path}:{number}")
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}:{number}: has {len(cells)} cells, the header has {len(header)}; "
                    "put a cell that holds a comma, a tab or a line break into double quotes"
                )
            yield number, dict(zip(header, cells, strict=True))
    finally:
        csv.field_size_limit(limit)


def _header(cells: list[str], name: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    repeated = next((cell for cell in header if header.count(cell) > 1), None)
    if repeated is not None or "" in header:
        what = f"names `{repeated}` twice" if repeated else "has a column without a name"
        raise DataError(f"{name}: the header {what}; give each column a name of its own")
    return header


def _parquet(path: str, data: bytes) -> Any:
    parquet = package("pyarrow.parquet", path)
    try:
        return parquet.read_table(io.BytesIO(data))
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise DataError(
            f"{path}: cannot be read as parquet: {error}; get the file again, or save it as JSON "
            "lines"
        ) from error


class Unreadable:
    """Replaces a cell whose value Python cannot represent; `reason` says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def table_rows(path: str, table: Any) -> Iterator[Row]:
    """The rows of a pyarrow.Table, converted column by column.

    A cell that cannot be converted, such as a year 300000 or an unknown time zone, becomes an
    Unreadable and does not affect the others; the caller decides what it means for the row. In
    messages and descriptions of tools, nulls are removed, with which a table fills fields that only
    other rows have.
    """
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            columns[name] = column.to_pylist()
        except Exception:  # a conversion may raise any exception
            columns[name] = [_cell(scalar) for scalar in column]
        if holds_messages(column.type):
            columns[name] = list(map(without_nulls, columns[name]))
    return (
        (number + 1, {name: values[number] for name, values in columns.items()})
        for number in range(table.num_rows)
    )


def holds_messages(kind: Any) -> bool:
    """Whether this pyarrow.DataType is a list of messages or of descriptions of tools."""
    entry = getattr(kind, "value_type", None)
    fields = [entry.field(i).name for i in range(entry.num_fields)] if entry is not None else []
    return not {"role", "from", "function"}.isdisjoint(fields)


def without_nulls(value: Any) -> Any:
    """A copy of nested values without the object keys whose value is null."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return list(map(without_nulls, value)) if isinstance(value, list) else value


def _cell(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except Exception as error:
        return Unreadable(f"{type(error).__name__}: {error}")


def package(name: str, path: str) -> ModuleType:
    """Import an optional package that reads the file or data set at `path`.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{path}: reading it needs {name}; pip install 'hybridrl[data]'"
        ) from error
