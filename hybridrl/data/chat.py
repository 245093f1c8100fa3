"""Renders a conversation as the text that a model reads, and checks that the text is complete.

A chat template is a program by the model's author. It may omit a role, a key or a part of a text
without an error. So every text of a row is searched for in the template's output, and a missing one
is an error that names row, role and template.

A template may change white space at both ends of a text and around tags such as </think>, and it
may escape the text as JSON. It may also omit the thinking of earlier assistant turns, as the
templates of reasoning models do: at inference, the model reads such turns without their thinking
too. No part of the response that is trained on may be missing.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hybridrl.core.errors import ConfigError, DataError
from hybridrl.data.marks import Marks
from hybridrl.data.template_limits import bounded
from hybridrl.settings.run import DataConfig

Message = dict[str, Any]
Tools = Sequence[dict[str, Any]]

THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message for the thinking that precedes its content."""

SAYS_MORE = (*THINKING_KEYS, "tool_calls")
"""Keys of an assistant's message that contain more than its content."""

END_OF_THINKING = "</think>"

OPENING_TAG = r"<\w+>|\[\w+\]"

RESERVED = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {
    "documents",
    "kwargs",
} | {"messages"}
"""Arguments of a template that a user may not set."""


class ChatTemplate:
    """A tokenizer's chat template, or data.chat_template_file, with data.chat_template_kwargs."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        arguments: Mapping[str, Any],
        source: str | None = None,
        name: str = "the model's chat template",
        section: str = "data",
    ) -> None:
        """
        Args:
            arguments: keyword arguments of the template.
            source: a Jinja template; None: the tokenizer's own.
            name: how errors name the template.
            section: the section of the settings with the arguments: data, or teachers.NAME for a
                teacher's own template.
        """
        self.tokenizer = tokenizer
        self.arguments = dict(arguments)
        self.source = source
        self.name = name
        self.section = section
        self.unclosed: list[tuple[str, str]] = []
        """(row, tag) of responses that do not close the tag with which the template opens their
        turn.
        """

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> "ChatTemplate":
        """The template of a run.

        Raises:
            ConfigError: the file cannot be read, or the template does not read an argument.
        """
        if config.chat_template_file is None:
            template = cls(tokenizer, config.chat_template_kwargs)
        else:
            template = cls(
                tokenizer,
                config.chat_template_kwargs,
                read_template(config.chat_template_file),
                f"data.chat_template_file={config.chat_template_file}",
            )
        template.check_arguments()
        return template

    def check_arguments(self) -> None:
        """Refuse an argument that the template would ignore.

        Raises:
            ConfigError: names the argument.
        """
        source = str(self.source or self.tokenizer.chat_template or "")
        for name in self.arguments:
            if name in RESERVED:
                raise ConfigError(
                    f"{self.section}.chat_template_kwargs.{name}: is set by hybridrl itself; leave "
                    "it out"
                )
            if not re.search(rf"\b{re.escape(str(name))}\b", source):
                raise ConfigError(
                    f"{self.section}.chat_template_kwargs.{name}: {self.name} does not read an "
                    "argument of this name; correct the name, or leave it out"
                )

    def prompt(self, messages: Sequence[Message], tools: Tools, row: str) -> str:
        """The text before the assistant's next turn.

        If the last message is the assistant's, it is the text before the rest of that turn.

        Args:
            tools: may be empty.
            row: how errors name the conversation.

        Raises:
            DataError: there is no template, or it refuses the messages or omits a part of them.
        """
        before, prefill = split_prefill(messages)
        if not prefill:
            text = self.render(before, tools, row, answered=False)
            self._check(text, before, tools, row, answered=False)
            return text
        if not before or any(prefill.get(key) for key in SAYS_MORE):
            raise DataError(
                f"{row}: the prompt ends with a message of the assistant that cannot be "
                "continued; end it with a user's or a tool's message, or with the beginning of "
                "an answer after one of those"
            )
        text = self.prompt(before, tools, row)
        beginning = prefill["content"]
        start, _ = self.around_answer(before, tools, row, text)
        tag = re.match(rf"\s*({OPENING_TAG})", beginning)
        if tag and (tag.group(1) in start or text.rstrip().endswith(tag.group(1))):
            start = ""  # the row's own thinking replaces the template's empty thinking
        return text + start + self._continuation(before, "", beginning, tools, row)

    def response(
        self, messages: Sequence[Message], answer: Message, tools: Tools, prompt: str, row: str
    ) -> str:
        """The text that follows `prompt`, with the template's end of the turn.

        If the template opens the assistant's turn with other text than it writes for an answered
        turn, the answer's own text follows the opening, as it would in generation.

        Args:
            messages: those of the prompt.
            answer: the assistant's message; it continues the last of `messages` if that is the
                assistant's.
            prompt: prompt(messages, tools, row).

        Raises:
            DataError: the template omits a part of the answer, or cannot write it after `prompt`.
        """
        before, prefill = split_prefill(messages)
        beginning = prefill.get("content", "")
        whole = {**prefill, **answer, "content": beginning + answer["content"]}
        answered = [*before, whole]
        rendered = self.render(answered, tools, row, answered=True)
        rest = after(prompt, rendered)
        if rest is not None:
            self._check(rendered, answered, tools, row, answered=True)
            return self._continuation(before, beginning, rest, tools, row)
        if any(answer.get(key) for key in SAYS_MORE):
            raise DataError(
                f"{row}: {self.name} writes the prompt differently once the assistant has "
                "answered, so the tokens of the response's tool calls or thinking cannot be "
                "separated from it; set data.chat_template_file to a template that only appends"
            )
        rest = self._continuation(before, beginning, answer["content"], tools, row)
        tag = re.search(r"<\w+>$", prompt.rstrip())
        if tag and tag.group().replace("<", "</") not in rest:
            self.unclosed.append((row, tag.group()))
        _, end = self.around_answer(before, tools, row, prompt)
        return rest + end

    def around_answer(
        self, messages: Sequence[Message], tools: Tools, row: str, prompt: str
    ) -> tuple[str, str]:
        """The template's text between the prompt and an answer, and after the answer.

        Both are empty if the template changes the answer, so that they cannot be determined.

        Raises:
            DataError: as render.
        """
        placeholder = Marks().around("0", "the answer")
        answer = {"role": "assistant", "content": placeholder}
        rendered = self.render([*messages, answer], tools, row, answered=True)
        start, separator, end = rendered.rpartition(placeholder)
        return (after(prompt, start) or "", end) if separator else ("", "")

    def render(self, messages: Sequence[Message], tools: Tools, row: str, *, answered: bool) -> str:
        """The template's output, unchecked.

        Args:
            answered: `messages` end with the answer; otherwise the template opens the assistant's
                turn.

        Raises:
            DataError: there is no chat template, or it refuses the messages.
        """
        if not (self.source or self.tokenizer.chat_template):
            raise DataError(
                f"{row}: the model's tokenizer has no chat template; set data.chat_template_file "
                "to one, or use text prompts and data.chat_template=false"
            )
        try:
            with bounded(self.source or self.tokenizer.chat_template):
                text = self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) or None,
                    chat_template=self.source,
                    tokenize=False,
                    add_generation_prompt=not answered,
                    **self.arguments,
                )
        except Exception as error:  # a template is a program and may raise anything
            raise DataError(f"{row}: {self.name} refuses it: {error}") from error
        assert isinstance(text, str)
        return text

    def _check(
        self,
        text: str,
        messages: Sequence[Message],
        tools: Tools,
        row: str,
        *,
        answered: bool,
    ) -> None:
        """Check that `text` contains everything in `messages` and `tools`.

        Raises:
            DataError: names the first text that is missing.
        """
        marks = Marks()
        response = len(messages) - 1 if answered else len(messages)
        marked = [
            _marked_message(message, i, marks, trained=i == response)
            for i, message in enumerate(messages)
        ]
        marked_tools = [_marked_tool(tool, marks) for tool in tools]
        try:
            rendered = self.render(marked, marked_tools, row, answered=answered)
        except DataError:  # the template refuses a text with marks
            rendered = ""
        missing = marks.missing(rendered, text)
        if missing is not None:
            remedy = (
                "set data.chat_template_file to a template that writes it"
                if self.section == "data"
                else f"set {self.section}.chat_template=student"
            )
            raise DataError(
                f"{row}: {self.name} leaves out {missing.what}: {missing.text[:80]!r}; correct "
                f"the row, or {remedy}"
            )

    def _continuation(
        self, messages: Sequence[Message], beginning: str, rest: str, tools: Tools, row: str
    ) -> str:
        """`rest` without its first tag if the text before it already ends with that tag.

        An example is the <think> with which a template opens a turn.

        Args:
            messages: all before the assistant's turn.
            beginning: the assistant's own text before `rest`.

        Raises:
            DataError: `rest` repeats a tag of the template's opening further on.
        """
        tags = set(re.findall(OPENING_TAG, rest))
        if not tags:
            return rest
        unopened = self.render(messages, tools, row, answered=True)
        opening = self.render(messages, tools, row, answered=False)
        opening = opening[len(unopened) :] if opening.startswith(unopened) else ""
        before = opening + beginning
        first = re.match(rf"\s*({OPENING_TAG})", rest)
        if first and before.rstrip().endswith(first.group(1)):
            space = before[len(before.rstrip()) :]
            return rest[first.end() :].removeprefix(space)
        repeated = next((tag for tag in re.findall(OPENING_TAG, opening) if tag in tags), None)
        if repeated is not None:
            raise DataError(
                f"{row}: {self.name} opens the assistant's turn with {opening!r}, and the "
                f"response holds {repeated} once more; remove it from the response, or change "
                "data.chat_template_kwargs"
            )
        return rest


def after(prompt: str, rendered: str) -> str | None:
    """The text after `prompt` in `rendered`; None if `rendered` does not begin with `prompt`.

    White space after an opening tag at the end of `prompt` may be missing, as in "<think></think>4"
    after "<think>\\n".
    """
    if rendered.startswith(prompt):
        return rendered[len(prompt) :]
    opened = prompt.rstrip()
    if rendered.startswith(opened) and re.search(rf"(?:{OPENING_TAG})$", opened):
        return rendered[len(opened) :]
    return None


def split_prefill(messages: Sequence[Message]) -> tuple[list[Message], Message]:
    """The messages before the last one, and the last one, if it is the assistant's.

    Otherwise all messages, and an empty message.
    """
    if messages[-1]["role"] == "assistant":
        return list(messages[:-1]), messages[-1]
    return list(messages), {}


def read_template(path: str) -> str:
    """The text of data.chat_template_file.

    Raises:
        ConfigError: the file cannot be read, or is empty.
    """
    try:
        source = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.chat_template_file={path}: cannot be read as text: {error}; name a Jinja file"
        ) from error
    if not source.strip():
        raise ConfigError(f"data.chat_template_file={path}: is empty; name a Jinja file")
    return source


def _marked_message(message: Message, index: int, marks: Marks, *, trained: bool) -> Message:
    """A copy with marks around every text that the template's output must contain."""
    role = message["role"]
    place = "the response" if trained else f"message {index + 1}"
    marked = dict(message)
    content = message["content"]
    thinking = ""
    if role == "assistant" and not trained:
        head, tag, _ = content.rpartition(END_OF_THINKING)
        thinking = head + tag
    answer = content[len(thinking) :]
    marked["content"] = thinking + marks.around(answer, f"the content of {place}, role `{role}`")
    if trained:
        for key in THINKING_KEYS:
            if isinstance(message.get(key), str):
                marked[key] = marks.around(message[key], f"`{key}` of {place}, role `{role}`")
    if message.get("tool_calls"):
        what = f"a tool call of {place}, role `{role}`"
        marked["tool_calls"] = [_marked_call(call, what, marks) for call in message["tool_calls"]]
    return marked


def _marked_call(call: dict[str, Any], what: str, marks: Marks) -> dict[str, Any]:
    function = dict(call.get("function") or call)
    if isinstance(function.get("name"), str):
        function["name"] = marks.around(function["name"], f"the name in {what}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # JSON text must be written unchanged: as a string within JSON it would be quoted twice.
        function["arguments"] = marks.around(
            arguments, f"the arguments in {what} (or write them as a quoted string)", escaped=False
        )
    elif arguments is not None:
        function["arguments"] = _marked_json(arguments, f"an argument in {what}", marks)
    return {**call, "function": function} if call.get("function") else function


def _marked_tool(tool: dict[str, Any], marks: Marks) -> dict[str, Any]:
    function = dict(tool.get("function") or tool)
    for key in ("name", "description"):
        if isinstance(function.get(key), str):
            function[key] = marks.around(function[key], f"the {key} of a tool in `tools`")
    return {**tool, "function": function} if tool.get("function") else function


def _marked_json(value: Any, what: str, marks: Marks) -> Any:
    match value:
        case str():
            return marks.around(value, what)
        case dict():
            return {
                marks.around(key, what): _marked_json(item, what, marks)
                for key, item in value.items()
            }
        case list():
            return [_marked_json(item, what, marks) for item in value]
        case _:
            return value
