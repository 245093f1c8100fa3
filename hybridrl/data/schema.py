"""Converts a row to a problem, by the keys that the row has.

    {"prompt": P}                                      a prompt alone
    {"prompt": P, "completion": R}                     one response
    {"messages": [..., {"role": "assistant", ...}]}    the last assistant message is the response
    {"prompt": P, "chosen": R, "rejected": R}          two responses, the better one first

P is text or a list of chat messages. R is text, or a list of messages whose last one, the
assistant's, is the response; its earlier messages belong to the prompt. If R or `messages` begins
with the assistant, it continues the row's `prompt`; otherwise it is a whole conversation, which
must contain `prompt` if the row has one. Chosen and rejected must have the same prompt. Keys that
are null count as absent. If a row fits several lines, chosen and rejected take precedence over
messages, and messages over completion. ShareGPT's turns are read as messages. `tools`, a list of
function descriptions or its JSON text, is passed to the chat template. All other keys, and `tools`,
become columns, which reward functions may read.
"""

import json
from typing import Any

from hybridrl.core.errors import DataError
from hybridrl.data.chat import SAYS_MORE
from hybridrl.data.columns import not_json
from hybridrl.data.layouts import as_messages, unreadable_layout
from hybridrl.data.problem import Problem
from hybridrl.settings.sources import ROW_KEYS

Text = str | list[dict[str, Any]]

Response = str | dict[str, Any]
"""A text, or an assistant's message that has more than content."""


def problem(row: dict[str, Any], name: str, uid: str) -> Problem:
    """The problem of a row.

    Args:
        name: how errors name the row, e.g. "train.jsonl:7".

    Raises:
        DataError: the row fits no line of the table above, or a value of its keys is not JSON.
    """
    values = {key: as_messages(row[key]) for key in ROW_KEYS if row.get(key) is not None}
    for key, value in values.items():
        if (reason := not_json(value)) is not None:
            raise DataError(f"{name}: `{key}` cannot be read: {reason}; store it as text")
    if (misfit := unreadable_layout(row)) is not None:
        raise DataError(f"{name}: {misfit}")
    columns = {key: value for key, value in row.items() if key not in ROW_KEYS}
    prompt, responses = _split(values, name)
    return Problem(
        uid=uid,
        prompt=prompt,
        columns=columns,
        row=name,
        responses=responses,
        tools=_tools(row.get("tools"), name),
    )


def _split(values: dict[str, Any], name: str) -> tuple[Text, tuple[Response, ...]]:
    """The prompt and its responses."""
    if "chosen" in values or "rejected" in values:
        if not ("chosen" in values and "rejected" in values):
            raise DataError(f"{name}: `chosen` and `rejected` must be given together")
        prompt, chosen = _answer(values, "chosen", name)
        other_prompt, rejected = _answer(values, "rejected", name)
        if prompt != other_prompt:
            raise DataError(
                f"{name}: `chosen` and `rejected` answer different prompts; only their last "
                "messages may differ"
            )
        return prompt, (chosen, rejected)
    for key in ("messages", "completion"):
        if key in values:
            prompt, response = _answer(values, key, name)
            return prompt, (response,)
    return _prompt(values, name), ()


def _answer(values: dict[str, Any], key: str, name: str) -> tuple[Text, Response]:
    """The prompt and the response of values[key]."""
    if isinstance(values[key], str) and key != "messages":
        return _prompt(values, name), values[key]
    messages = _messages(values[key], f"{name}: `{key}`")
    if key == "messages":  # a conversation may end with a user's message without an answer
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{name}: `{key}` must {'hold' if key == 'messages' else 'end with'} an assistant "
            "message, the response"
        )
    return _before(messages[:-1], values, key, name), _response(messages[-1])


def _before(before: list[dict[str, Any]], values: dict[str, Any], key: str, name: str) -> Text:
    """The prompt of a response that follows `before` in values[key].

    Raises:
        DataError: `before` begins a conversation that does not contain the row's own prompt.
    """
    if not before:
        return _prompt(values, name)
    if values.get("prompt") is None:
        return before
    prompt = _prompt(values, name)
    if before[0]["role"] == "assistant":
        question = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [*question, *before]
    if isinstance(prompt, str):
        contained = any(message["content"].strip() == prompt.strip() for message in before)
    else:
        contained = all(message in before for message in prompt)
    if not contained:
        raise DataError(
            f"{name}: `{key}` is a whole conversation that does not contain `prompt`; leave "
            f"`prompt` out, or let `{key}` hold only what follows it, beginning with the assistant"
        )
    return before


def _response(message: dict[str, Any]) -> Response:
    return message if message.keys() & SAYS_MORE else message["content"]


def _prompt(values: dict[str, Any], name: str) -> Text:
    prompt = values.get("prompt")
    return prompt if isinstance(prompt, str) else _messages(prompt, f"{name}: `prompt`")


def _messages(value: Any, what: str) -> list[dict[str, Any]]:
    """A copy of a conversation without null keys, with which columnar files fill rows.

    An assistant's message without content that calls a tool or thinks gets an empty content.

    Raises:
        DataError: `value` is not a list of messages with `role` and `content`; the error begins
            with `what`.
    """
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        messages = [
            {key: field for key, field in message.items() if field is not None and field != []}
            for message in value
        ]
        for message in messages:
            if message.get("role") == "assistant" and message.keys() & SAYS_MORE:
                message.setdefault("content", "")
            _check_calls(message, what)
        if all(isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
            return messages
    raise DataError(
        f"{what} must be text or a list of messages with `role` and `content`, both text"
    )


def _check_calls(message: dict[str, Any], what: str) -> None:
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(
        isinstance(call, dict)
        and isinstance(function := call.get("function", call), dict)
        and isinstance(function.get("name"), str)
        for call in calls
    ):
        raise DataError(
            f"{what}: `tool_calls` must be a list of calls, each with a `function` that has a "
            "`name` and `arguments`"
        )


def _tools(value: Any, name: str) -> tuple[dict[str, Any], ...]:
    """The descriptions in the row's `tools`; empty if it is absent.

    Raises:
        DataError: `tools` is neither a list of objects nor the JSON text of one.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{name}: `tools` is text that is not JSON: {error}; it holds function "
                "descriptions for the chat template, so rename the column if it is meant for the "
                "rewards"
            ) from error
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(
            f"{name}: `tools` must be a list of function descriptions, or its JSON text; "
            "rename the column if it is meant for the rewards"
        )
    return tuple(value)
