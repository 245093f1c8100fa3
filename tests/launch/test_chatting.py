"""`hybridrl chat`: the text that the model reads, the commands, and Ctrl-C."""

import io
import os
import signal
from collections.abc import Iterator, Sequence

import pytest

from hybridrl.core.errors import ConfigError, DataError
from hybridrl.launch.chatting import Chat, alone, converse
from hybridrl.launch.loadable_model import find_model
from hybridrl.models.tiny import tiny_tokenizer
from hybridrl.settings.run import DataConfig

TEMPLATE = (
    "{% set marks = {'user': '=', 'assistant': ':', 'system': '+'} %}"
    "{% for m in messages %}{{ marks[m.role] }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}:{% endif %}"
)


CTRL_C = "ctrl-c"


class Parrot:
    """A model that answers with given pieces of text; at a piece CTRL_C, Ctrl-C is pressed."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.read: list[str] = []
        self.seeds: list[int] = []
        self.closed = 0

    def answer(self, token_ids: Sequence[int], *, temperature: float, seed: int) -> Iterator[str]:
        self.read.append(tiny_tokenizer().decode(list(token_ids)))
        self.seeds.append(seed)
        try:
            for piece in self.answers.pop(0):
                if piece == CTRL_C:
                    os.kill(os.getpid(), signal.SIGINT)
                else:
                    yield piece
        finally:
            self.closed += 1


def chat(template: str | None = None, limit: int = 60) -> Chat:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Chat(tokenizer=tokenizer, data=DataConfig(), max_prompt_tokens=limit)


def printed(conversation: Chat, engine: Parrot, *lines: str) -> str:
    out = io.StringIO()

    def say(*values: str, end: str = "\n", flush: bool = False) -> None:
        print(*values, end=end, file=out)

    converse(conversation, engine, 0.0, 5, io.StringIO("".join(f"{x}\n" for x in lines)), say)
    return out.getvalue()


def test_the_model_reads_the_conversation_so_far_and_reset_forgets_it():
    engine = Parrot(["3", "4"], ["5"], ["6"])
    assert printed(chat(TEMPLATE), engine, "1", "", "2", "/reset", "7") == (
        "34\n5\n(a new conversation)\n6\n"
    )
    texts = [text.replace(" ", "") for text in engine.read]
    assert [text.removeprefix("<bos>") for text in texts] == ["=1:", "=1:34=2:", "=7:"]
    assert engine.seeds == [5, 6, 7]


def test_without_a_chat_template_each_line_is_a_prompt_by_itself():
    engine = Parrot(["3"], ["5"])
    printed(chat(), engine, "1+2=3:", "2+2=4:")
    assert len(engine.read) == 2 and "1+2" not in engine.read[1]


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said():
    engine = Parrot(["3", CTRL_C, "4", "9"], ["5"])
    conversation = chat(TEMPLATE)
    assert printed(conversation, engine, "1", "2") == "34\n5\n", "9 is not sampled any more"
    assert [message["content"] for message in conversation.messages] == ["1", "34", "2", "5"]
    assert engine.closed == 2
    with pytest.raises(KeyboardInterrupt):
        printed(conversation, Parrot([CTRL_C, CTRL_C, "4"]), "1")


def test_a_conversation_that_is_too_long_is_refused_and_goes_on_after_a_reset():
    engine = Parrot(["3"])
    said = printed(chat(TEMPLATE, limit=4), engine, "1 2 3 4 5 6", "/reset", "1")
    assert "the conversation: the prompt has" in said and said.endswith("3\n")
    assert "; /reset begins a new conversation)" in said and "drop_too_long" not in said


def test_the_system_message_is_read_first_and_needs_a_chat_template():
    engine = Parrot(["3"])
    assert printed(chat(TEMPLATE), engine, "/system 8", "1").startswith("(the system message")
    assert engine.read[0].replace(" ", "").removeprefix("<bos>") == "+8=1:"
    with pytest.raises(ConfigError, match="no chat template"):
        chat().set_system("8")
    assert "no such command" in printed(chat(TEMPLATE), engine, "/sistem 8")


def test_a_row_that_the_template_refuses_is_an_error_of_the_conversation():
    refusing = "{{ raise_exception('only one turn') }}"
    with pytest.raises(
        DataError, match="the conversation: the model's chat template refuses it: only one"
    ):
        chat(refusing).prompt("1")


def test_answers_as_long_as_a_sequence_are_refused_before_the_engine_starts():
    """The model has 64 positions."""
    student = "builtin:countdown-student"
    longest = alone(find_model(student, ["rollout.max_new_tokens=63"])).settings.rollout
    assert (longest.sequence_limit, longest.response_limit) == (64, 63)
    message = r"^rollout\.max_new_tokens=64: leaves no room .* give a number below 64$"
    with pytest.raises(ConfigError, match=message):
        alone(find_model(student, ["rollout.max_new_tokens=64"]))
