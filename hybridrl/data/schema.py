"""From a row to a problem, by the keys that the row holds.

    {"prompt": P}                                               a prompt alone
    {"prompt": P, "completion": R}                              one response
    {"messages": [..., {"role": "assistant", ...}]}             the last assistant message, after what stands before it
    {"prompt": P, "chosen": R, "rejected": R}                   two responses, the better one first

P is text or a list of chat messages. R is text, or a list of messages that ends with one of the
assistant, the response; earlier messages of R belong to the prompt. R or `messages` continues the
row's `prompt` where it begins with the assistant; otherwise it is a whole conversation, which must
contain `prompt` where the row has one. Chosen and rejected share their prompt. Keys that are null
count as absent. Where a row fits several lines, chosen and rejected come before messages, and those
before completion. ShareGPT's turns are read as messages. `tools`, a list of function descriptions
or its JSON text, goes to the chat template. All other keys, and `tools`, become columns, which the
rewards may look at.
"""

import json
from typing import Any

from hybridrl.core.errors import DataError
from hybridrl.data.chat import SAYS_MORE
from hybridrl.data.columns import not_json
from hybridrl.data.layouts import as_messages, unreadable_layout
from hybridrl.data.problem import Problem
from hybridrl.settings.run import ROW_KEYS

Text = str | list[dict[str, Any]]

Response = str | dict[str, Any]
"""A text, or an assistant's message that says more than its content."""


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
    return Problem(
        uid=uid,
        prompt=prompt,
        columns=columns,
        row=name,
        responses=responses,
        tools=_tools(row.get("tools"), name),
    )


def _split(given: dict[str, Any], name: str) -> tuple[Text, tuple[Response, ...]]:
    """The prompt and its responses."""
    if "chosen" in given or "rejected" in given:
        if not ("chosen" in given and "rejected" in given):
            raise DataError(f"{name}: `chosen` and `rejected` need each other")
        (prompt, chosen), (other, rejected) = (
            _answer(given, key, name) for key in ("chosen", "rejected")
        )
        if prompt != other:
            raise DataError(
                f"{name}: `chosen` and `rejected` answer different prompts; only their last "
                "messages may differ"
            )
        return prompt, (chosen, rejected)
    for key in ("messages", "completion"):
        if key in given:
            prompt, response = _answer(given, key, name)
            return prompt, (response,)
    return _prompt(given, name), ()


def _answer(given: dict[str, Any], key: str, name: str) -> tuple[Text, Response]:
    """The prompt and the response that given[key] holds."""
    if isinstance(given[key], str) and key != "messages":
        return _prompt(given, name), given[key]
    messages = _messages(given[key], f"{name}: `{key}`")
    if key == "messages":  # a conversation may end with a user who got no answer
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{name}: `{key}` must {'hold' if key == 'messages' else 'end with'} an assistant "
            "message, the response"
        )
    return _before(messages[:-1], given, key, name), _response(messages[-1])


def _before(before: list[dict[str, Any]], given: dict[str, Any], key: str, name: str) -> Text:
    """The prompt of a response that stands after `before` in given[key].

    Raises:
        DataError: `before` begins a conversation that does not contain the row's own prompt.
    """
    if not before:
        return _prompt(given, name)
    if given.get("prompt") is None:
        return before
    prompt = _prompt(given, name)
    if before[0]["role"] == "assistant":
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [*asked, *before]
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


def _prompt(given: dict[str, Any], name: str) -> Text:
    prompt = given.get("prompt")
    return prompt if isinstance(prompt, str) else _messages(prompt, f"{name}: `prompt`")


def _messages(value: Any, what: str) -> list[dict[str, Any]]:
    """A copy of a conversation without keys that are null, as columnar files fill them in.

    An assistant's message without content has the empty one where it calls a tool or thinks.
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
    """What the row's `tools` describe; none where it is absent.

    Raises:
        DataError: it is something else than a list of objects.
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
