"""Makes the conversation that the model reads from a problem and the settings of the prompt.

data.system_prompt becomes its first message, and data.instruction is put around the user's text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybridrl.core.errors import ConfigError, DataError
from hybridrl.data.chat import SAYS_MORE, ChatTemplate, Message
from hybridrl.data.problem import Problem
from hybridrl.settings.run import DataConfig

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles whose spelling is checked; others are defined by the model's own template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The messages before the response."""

    messages: list[Message]
    tools: tuple[dict[str, Any], ...]
    templated: bool  # a chat template renders it for the model
    row: str  # how errors name it

    def prompt_text(self, template: ChatTemplate) -> str:
        """The text that the model continues.

        Raises:
            DataError: as ChatTemplate.prompt.
        """
        if not self.templated:
            return self.messages[-1]["content"]
        return template.prompt(self.messages, self.tools, self.row)

    def response_text(
        self, response: str | Message, prompt_text: str, template: ChatTemplate
    ) -> str:
        """The text after prompt_text, including the end of the turn if a template writes one.

        Raises:
            DataError: as ChatTemplate.response; or the response has tool calls or thinking, and
                there is no template to write them.
        """
        answer = response
        if isinstance(answer, str):
            answer = {"role": "assistant", "content": answer}
        if self.templated:
            return template.response(self.messages, answer, self.tools, prompt_text, self.row)
        extra = next((key for key in SAYS_MORE if answer.get(key)), None)
        if extra is not None:
            raise DataError(
                f"{self.row}: the response holds `{extra}`, which only a chat template can write; "
                "set data.chat_template=true"
            )
        return answer["content"]


def conversation(problem: Problem, config: DataConfig) -> Conversation:
    """The conversation of a problem.

    Raises:
        ConfigError: data.system_prompt is set and the row has a system message, or data.instruction
            is set and the row has no user's message.
        DataError: the prompt is empty, a role is spelled in another way than in ROLES, or there are
            tools without a chat template.
    """
    row = problem.row
    prompt = problem.prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    templated = is_templated(problem, config)
    for message in messages:
        role = message["role"]
        spelled = role.strip().lower()
        if role != spelled and spelled in ROLES:
            raise DataError(
                f"{row}: chat templates do not know the role `{role}`; write `{spelled}`"
            )
    if problem.tools and not templated:
        raise DataError(
            f"{row}: the row's `tools` can only be written by a chat template; set "
            "data.chat_template=true, or rename the column if it is meant for the rewards"
        )
    questions = [message for message in messages if message["role"] != "assistant"] or messages
    if questions[-1]["role"] != "tool" and not questions[-1]["content"].strip():
        raise DataError(f"{row}: the prompt is empty")
    messages = _instructed(messages, config.instruction, row)
    if config.system_prompt is not None:
        if any(message["role"] in ("system", "developer") for message in messages):
            raise ConfigError(
                f"data.system_prompt={config.system_prompt!r}: {row} has a system message of its "
                "own; set data.system_prompt=null, or remove the message from the rows"
            )
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    return Conversation(messages=messages, tools=problem.tools, templated=templated, row=row)


def is_templated(problem: Problem, config: DataConfig) -> bool:
    """Whether a chat template renders the problem for the model."""
    return config.chat_template or not isinstance(problem.prompt, str)


def check_template_settings(config: DataConfig, problems: Sequence[Problem]) -> None:
    """Refuse a setting of the chat template in a run that uses none.

    Raises:
        ConfigError: names the setting.
    """
    is_set = {
        "system_prompt": config.system_prompt is not None,
        "chat_template_kwargs": bool(config.chat_template_kwargs),
        "chat_template_file": config.chat_template_file is not None,
    }
    name = next((name for name in is_set if is_set[name]), None)
    if name is None or all(is_templated(problem, config) for problem in problems):
        return
    raise ConfigError(
        f"data.{name}: only has an effect in a chat template, so it needs "
        "data.chat_template=true; or leave it out"
    )


def _instructed(messages: Sequence[Message], instruction: str, row: str) -> list[Message]:
    """The messages with the instruction around the last text of a user."""
    instructed = list(messages)
    if instruction == "{prompt}":
        return instructed
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise ConfigError(
            f"data.instruction={instruction!r}: {row} has no user message to put it around; "
            "set it to '{prompt}'"
        )
    content = messages[users[-1]]["content"]
    instructed[users[-1]] = {
        **messages[users[-1]],
        "content": instruction.replace("{prompt}", content),
    }
    return instructed
