"""Renames a row's keys by data.columns, and removes columns with values that are not JSON."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hybridrl.core.errors import DataError
from hybridrl.data.layouts import as_messages, listed
from hybridrl.data.problem import Problem
from hybridrl.data.row_files import Unreadable
from hybridrl.settings.sources import ROW_KEYS

log = logging.getLogger(__name__)

DEEPEST = 100
"""Largest number of nested levels of lists and objects; json, pickle and repr fail somewhat below
1000.
"""


def renamed(row: Mapping[str, Any], columns: Mapping[str, str | None], name: str) -> dict[str, Any]:
    """The row with the keys of data.columns under their new names.

    A renamed key also remains a column for the rewards under its old name, unless that is one of
    ROW_KEYS.

    Args:
        columns: data.columns; a name that is absent refers to the key of the same name.
        name: how errors name the row.

    Raises:
        DataError: the row lacks a key that data.columns names, or another key would be read instead
            of it.
    """
    chosen = {new: key for new, key in columns.items() if key is not None and key != new}
    for new, key in chosen.items():
        if key not in row:
            raise DataError(
                f"{name}: data.columns.{new}={key}: the row has no `{key}`; it has {listed(row)}"
            )
    removed = {new for new, key in columns.items() if key is None}
    removed |= chosen.keys() | (set(chosen.values()) & set(ROW_KEYS))
    result = {key: value for key, value in row.items() if key not in removed}
    result |= {new: row[key] for new, key in chosen.items()}
    for new, key in chosen.items():
        if (instead := _read_instead(new, result)) is not None:
            raise DataError(
                f"{name}: data.columns.{new}={key}: is not read, since the row holds "
                f"`{instead}` too, which comes first; leave that out by "
                f"data.columns.{instead}=null"
            )
    return result


def _read_instead(key: str, row: Mapping[str, Any]) -> str | None:
    """The key that the schema reads instead of `key`; None if it reads `key`, or `key` is a column
    for the rewards.
    """
    if key not in ROW_KEYS:
        return None
    ranks = (("chosen", "rejected"), ("messages",), ("completion",))
    present = [[name for name in names if row.get(name) is not None] for names in ranks]
    first = next((names for names in present if names), [])
    if not first or key in first:
        return None
    # A text, a single message or a list that the assistant begins uses the row's prompt.
    if key == "prompt" and not _is_whole(row[first[0]]):
        return None
    return first[0]


def _is_whole(value: Any) -> bool:
    """Whether a key of the row holds a conversation that contains its prompt."""
    messages = as_messages(value)
    if not isinstance(messages, list) or len(messages) < 2:
        return False
    return not isinstance(messages[0], dict) or messages[0].get("role") != "assistant"


def not_json(value: Any) -> str | None:
    """Why `value` cannot be sent to the reward functions as JSON; None if it can."""
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
        containers = [part for part in level if isinstance(part, dict | list)]
        inner = [c.values() if isinstance(c, dict) else c for c in containers]
        level = [part for parts in inner for part in parts]
    return bool(level)


def json_columns(problems: Sequence[Problem]) -> list[Problem]:
    """The problems without the columns that contain a value that is not JSON.

    Each removed column is logged once with the reason.
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
