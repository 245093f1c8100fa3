"""Row layouts of other projects: reads ShareGPT's, and says what to set or change for others."""

from collections.abc import Iterable, Mapping
from typing import Any

PROMPT_NAMES = ("question", "query", "problem", "instruction", "input", "user", "text")
ANSWER_NAMES = ("answer", "response", "output", "solution", "target", "completion")

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}

SHOWN = 8
"""Largest number of keys that a message lists."""


def as_messages(turns: Any) -> Any:
    """ShareGPT's turns, {"from": "human", "value": T}, as messages with `role` and `content`.

    Anything else is returned unchanged.
    """
    if not is_sharegpt(turns):
        return turns
    return [
        {"role": SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
        for turn in turns
    ]


def is_sharegpt(turns: Any) -> bool:
    """Whether `turns` is a list of ShareGPT's turns."""
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(isinstance(turn, dict) and {"from", "value"} <= turn.keys() for turn in turns)
        and not any("role" in turn or "content" in turn for turn in turns)
    )


def unreadable_layout(row: Mapping[str, Any]) -> str | None:
    """Why a row has no prompt that can be read, and what to do about it; None if it has one.

    Example: unreadable_layout({"question": "1+1=", "answer": "2"}) == "the row has `question`,
    `answer` and no prompt; set 'data.columns={prompt: question}', and completion: answer too where
    the answer is to be imitated"
    """
    given = {key: value for key, value in row.items() if value is not None}
    if "chosen" in given and "rejected" in given and "prompt" not in given:
        texts = isinstance(given["chosen"], str) and isinstance(given["rejected"], str)
        return _two_whole_texts() if texts else None
    if "prompt" in given:
        return None
    if "messages" in given:
        return _unanswered(given["messages"])
    return f"the row has {listed(given)} and no prompt; {_remedy(given)}"


def listed(keys: Iterable[str]) -> str:
    """Keys as text for an error message.

    Example: listed(["a", "b"]) == "`a`, `b`".
    """
    names = [f"`{key}`" for key in keys]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "no key") + more


def _remedy(given: Mapping[str, Any]) -> str:
    names = {key.strip().lower(): key for key in given}
    for name in ("prompt", "messages"):  # with white space, or in capital letters
        if name in names:
            return f"set {_columns({name: names[name]})}"
    turns = next((key for key, value in given.items() if is_sharegpt(value)), None)
    if turns is not None:
        return f"its turns are ShareGPT's: set {_columns({'messages': turns})}"
    chat = next((key for key, value in given.items() if _is_chat(value)), None)
    if chat is not None:
        return (
            f"set {_columns({'messages': chat})}, or prompt: {chat} where the conversation "
            "waits for its answer"
        )
    answer = next((names[name] for name in ANSWER_NAMES if name in names), None)
    if "instruction" in names and "input" in names:
        named_answer = ""
        if answer is not None:
            named_answer = f" and name the answer by {_columns({'completion': answer})}"
        return (
            f"as in Alpaca's data: join `{names['instruction']}` and `{names['input']}` into one "
            f"`prompt`{named_answer}; where every `{names['input']}` is empty, set "
            f"{_columns({'prompt': names['instruction']})}"
        )
    prompt = next((names[name] for name in PROMPT_NAMES if name in names), None)
    if prompt is None:
        key = _columns({"prompt": "KEY"})
        return f"rename the key that holds it to `prompt`, or name it by {key}"
    remedy = f"set {_columns({'prompt': prompt})}"
    if answer is None:
        return remedy
    return f"{remedy}, and completion: {answer} too where the answer is to be imitated"


def _two_whole_texts() -> str:
    return (
        "`chosen` and `rejected` are whole texts without a `prompt`, as in HH-RLHF; cut both "
        "after the last '\\n\\nAssistant:' that they share, and store the part before the cut as "
        "`prompt`"
    )


def _unanswered(messages: Any) -> str | None:
    if isinstance(messages, str):
        return (
            "`messages` must be a list of messages with `role` and `content`, not text; "
            "save the rows as JSON lines, which can hold one"
        )
    messages = as_messages(messages)
    if not _is_chat(messages) or any(message["role"] == "assistant" for message in messages):
        return None
    return (
        "`messages` must hold an assistant message, the response; for a prompt that the model is "
        "to answer set " + _columns({"prompt": "messages"})
    )


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value
        )
    )


def _columns(mapping: Mapping[str, str]) -> str:
    """The setting data.columns as an argument in a shell."""
    pairs = (f"{new}: {key if key.isidentifier() else repr(key)}" for new, key in mapping.items())
    text = f"data.columns={{{', '.join(pairs)}}}"
    return f'"{text}"' if "'" in text else f"'{text}'"
