"""The row's keys under the names that are read (data.columns), and the values that no reward
function can be given.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hybridrl.core.errors import DataError
from hybridrl.data.layouts import listed
from hybridrl.data.problem import Problem
from hybridrl.data.row_files import Unreadable
from hybridrl.settings.run import ROW_KEYS

log = logging.getLogger(__name__)

DEEPEST = (
    100  # lists and objects inside one another; json, pickle and repr fail somewhat below 1000
)


def renamed(row: Mapping[str, Any], columns: Mapping[str, str | None], name: str) -> dict[str, Any]:
    """The row with the keys of data.columns under their new names.

    A key that is renamed stays a column for the rewards under its old name too, unless that is one
    of ROW_KEYS.

    Args:
        columns: data.columns; names that are absent mean themselves.
        name: what errors call the row.

    Raises:
        DataError: the row lacks a key that data.columns names, or another key would be read instead
            of it.
    """
    chosen = {ours: key for ours, key in columns.items() if key is not None and key != ours}
    for ours, key in chosen.items():
        if key not in row:
            raise DataError(
                f"{name}: data.columns.{ours}={key}: the row has no `{key}`; it has {listed(row)}"
            )
    left_out = {ours for ours, key in columns.items() if key is None}
    left_out |= chosen.keys() | (set(chosen.values()) & set(ROW_KEYS))
    found = {key: value for key, value in row.items() if key not in left_out}
    found |= {ours: row[key] for ours, key in chosen.items()}
    for ours in chosen:
        if (instead := _read_instead(ours, found)) is not None:
            raise DataError(
                f"{name}: data.columns.{ours}={chosen[ours]}: is not read, since the row holds "
                f"`{instead}` too, which comes first; leave that out by "
                f"data.columns.{instead}=null"
            )
    return found


def _read_instead(ours: str, row: Mapping[str, Any]) -> str | None:
    """The key that the schema reads in the place of `ours`; None where it reads `ours`, or `ours`
    is a column.
    """
    if ours not in ROW_KEYS:
        return None
    ranks = (("chosen", "rejected"), ("messages",), ("completion",))
    given = [[key for key in keys if row.get(key) is not None] for keys in ranks]
    first = next((keys for keys in given if keys), [])
    if not first or ours in first:
        return None
    if ours == "prompt":  # text and a lone answer leave the prompt to the row
        conversation = isinstance(row[first[0]], list) and len(row[first[0]]) > 1
        return first[0] if conversation else None
    return first[0]


def not_json(value: Any) -> str | None:
    """Why `value` cannot travel to the reward functions as JSON; None where it can."""
    if isinstance(value, Unreadable):
        return value.reason
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        return str(error)
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(value):
        return f"it is nested more than {DEEPEST} deep"
    return None


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        inner = (
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        )
        level = [part for parts in inner for part in parts]
    return bool(level)


def json_columns(problems: Sequence[Problem]) -> list[Problem]:
    """The problems without the columns that some of them cannot hand to the rewards; which and why
    is logged once each.
    """
    reasons: dict[str, str] = {}
    for problem in problems:
        for key, value in problem.columns.items():
            if key not in reasons and (reason := not_json(value)) is not None:
                reasons[key] = f"{problem.row}: {reason}"
    for key, reason in reasons.items():
        log.warning(
            "the column `%s` is left out, so that no reward function can read it (%s); store it "
            "as text if one needs it",
            key,
            reason,
        )
    if not reasons:
        return list(problems)
    return [
        replace(p, columns={k: v for k, v in p.columns.items() if k not in reasons})
        for p in problems
    ]
