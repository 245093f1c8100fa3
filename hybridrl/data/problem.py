"""A problem before any tokenizer has seen it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a data source yields.

    Example: Problem(uid="train-000007", prompt="3 7 9=24:", columns={"numbers": [3, 7, 9],
    "target": 24}, row="countdown problem 7")
    """

    uid: str  # unique in its split, e.g. "heldout-000042"
    prompt: str | list[dict[str, Any]]  # text, or chat messages with `role` and `content`
    columns: dict[str, Any]  # what the rewards may look at
    row: str  # where it came from, for error messages, e.g. "train.jsonl:7"
    responses: tuple[
        str | dict[str, Any], ...
        # given answers: none, one to imitate, or (chosen, rejected); an assistant's message where
        # it is more than its content
    ] = ()
    tools: tuple[dict[str, Any], ...] = ()  # descriptions of functions, for the chat template
