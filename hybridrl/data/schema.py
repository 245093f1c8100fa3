"""From a row to a problem, by the keys that the row holds.

    {"prompt": P}                                               a prompt alone
    {"prompt": P, "completion": R}                              one response
    {"messages": [..., {"role": "assistant", ...}]}             the last assistant message, after what stands before it
    {"prompt": P, "chosen": R, "rejected": R}                   two responses, the better one first

P is text or a list of chat messages. R is text, a list of one assistant message, or a whole conversation, which then
brings its own prompt: chosen and rejected share it, and the row's `prompt`, if any, is not read. Keys that are null
count as absent. Where a row fits several lines, chosen and rejected come before messages, and those before completion.
ShareGPT's turns are read as messages. All other keys become columns, which the rewards may look at.
"""

from typing import Any

from hybridrl.config import ROW_KEYS
from hybridrl.data.columns import not_json
from hybridrl.data.layouts import as_messages, unreadable_layout
from hybridrl.data.problem import Problem
from hybridrl.errors import DataError

Text = str | list[dict[str, Any]]


def problem(row: dict[str, Any], name: str, uid: str) -> Problem:
    """Args: name: what errors call the row, e.g. "train.jsonl:7".

    Raises:
        DataError: no schema fits, or a value that one reads is not JSON.
    """
    given = {key: as_messages(row[key]) for key in ROW_KEYS if row.get(key) is not None}
    for key, value in given.items():
        if (reason := not_json(value)) is not None:
            raise DataError(f"{name}: `{key}` cannot be read: {reason}; store it as text")
    if (misfit := unreadable_layout(row)) is not None:
        raise DataError(f"{name}: {misfit}")
    columns = {key: value for key, value in row.items() if key not in ROW_KEYS}
    prompt, responses = _split(given, name)
    return Problem(uid=uid, prompt=prompt, columns=columns, row=name, responses=responses)


def _split(given: dict[str, Any], name: str) -> tuple[Text, tuple[str, ...]]:
    """The prompt and its responses."""
    if "chosen" in given or "rejected" in given:
        if not ("chosen" in given and "rejected" in given):
            raise DataError(f"{name}: `chosen` and `rejected` need each other")
        (prompt, chosen), (other, rejected) = (
            _answer(given, key, name) for key in ("chosen", "rejected")
        )
        if prompt != other:
            raise DataError(
                f"{name}: `chosen` and `rejected` answer different prompts; only their last messages may differ"
            )
        return prompt, (chosen, rejected)
    for key in ("messages", "completion"):
        if key in given:
            prompt, response = _answer(given, key, name)
            return prompt, (response,)
    return _prompt(given, name), ()


def _answer(given: dict[str, Any], key: str, name: str) -> tuple[Text, str]:
    """The prompt and the response that given[key] holds."""
    if isinstance(given[key], str) and key != "messages":
        return _prompt(given, name), given[key]
    messages = _messages(given[key], f"{name}: `{key}`")
    if key == "messages":  # a conversation may end with a user who got no answer
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{name}: `{key}` must {'hold' if key == 'messages' else 'end with'} an assistant message, the response"
        )
    before = messages[:-1]
    return before or _prompt(given, name), messages[-1]["content"]


def _prompt(given: dict[str, Any], name: str) -> Text:
    prompt = given.get("prompt")
    return prompt if isinstance(prompt, str) else _messages(prompt, f"{name}: `prompt`")


def _messages(value: Any, what: str) -> list[dict[str, Any]]:
    """A copy of a conversation without keys that are null, as columnar files fill them in."""
    chat = isinstance(value, list) and value and all(isinstance(message, dict) for message in value)
    if not chat or not all(
        isinstance(message.get(key), str) for message in value for key in ("role", "content")
    ):
        raise DataError(
            f"{what} must be text or a list of messages with `role` and `content`, both text"
        )
    return [
        {key: field for key, field in message.items() if field is not None} for message in value
    ]
