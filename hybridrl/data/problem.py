"""A problem before tokenization."""

from dataclasses import dataclass
from typing import Any

SOURCE = "data_source"
"""The column with the name of a problem's data source, unless its row has such a column itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One item of a data source.

    Example: Problem(uid="train-000007", prompt="3 7 9=24:", columns={"numbers": [3, 7, 9],
    "target": 24}, row="countdown problem 7")
    """

    uid: str  # unique in its split, e.g. "heldout-000042", or "math/heldout-000042" of data.sources
    prompt: str | list[dict[str, Any]]  # text, or chat messages with `role` and `content`
    columns: dict[str, Any]  # values that reward functions may read
    row: str  # where it came from, for error messages, e.g. "train.jsonl:7"
    responses: tuple[str | dict[str, Any], ...] = ()
    """Empty, one response to imitate, or (chosen, rejected): texts, or assistant's messages that
    have more than content.
    """
    tools: tuple[dict[str, Any], ...] = ()  # descriptions of functions, for the chat template


def source_of(uid: str) -> str | None:
    """The name of the source in the uid of a problem or prompt; None: there are no data.sources.

    Example: source_of("math/train-000003@1") == "math".
    """
    name, slash, _ = uid.partition("/")
    return name if slash else None
