"""`hybridrl chat`: a conversation with a model, in a terminal or by lines of the standard input."""

import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from tempfile import TemporaryFile
from threading import Event
from types import FrameType
from typing import Protocol, TextIO

from transformers import PreTrainedTokenizerBase

from hybridrl.core.errors import ConfigError, DataError
from hybridrl.data.chat import Message
from hybridrl.data.problem import Problem
from hybridrl.data.prompts import TooLong, tokenize
from hybridrl.launch.alignment import reads_own_prompts
from hybridrl.launch.loadable_model import LoadableModel, find_model, model_parser
from hybridrl.models.limits import most_positions
from hybridrl.models.loading import load_tokenizer, model_config
from hybridrl.settings.run import DataConfig, RunSettings

LONGEST = 8192
"""Most tokens of a conversation where rollout.max_model_len is not set; fewer where the model has
fewer positions.
"""
ANSWER_SHARE = 2
"""These tokens, divided by it, are for an answer where rollout.max_new_tokens is not set."""
HELP = (
    "/reset forgets the conversation, /system TEXT sets the system message, Ctrl-C stops an "
    "answer, Ctrl-D ends"
)


class Engine(Protocol):
    """Answers prompts; rollout.chat_engine.ChatEngine is one."""

    def answer(self, token_ids: Sequence[int], *, temperature: float, seed: int) -> Generator[str]:
        """The pieces of the text of a response, as they are sampled."""


@dataclass(slots=True, kw_only=True)
class Chat:
    """A conversation so far.

    A model with a chat template reads all of it; one without reads each line by itself.

    Example: after "hello" and an answer, `messages` are the user's and the assistant's.
    """

    tokenizer: PreTrainedTokenizerBase
    data: DataConfig  # how prompts are rendered
    max_prompt_tokens: int
    messages: list[Message] = field(default_factory=list)

    @property
    def has_history(self) -> bool:
        """Whether the model reads earlier messages."""
        return bool(self.data.chat_template_file or self.tokenizer.chat_template)

    def prompt(self, text: str) -> tuple[int, ...]:
        """The conversation with `text`, rendered as a row of data is, as tokens to continue.

        Raises:
            DataError: the template refuses the conversation, or it is too long.
        """
        question = {"role": "user", "content": text}
        problem = Problem(
            uid="chat",
            prompt=[*self.messages, question] if self.has_history else text,
            columns={},
            row="the conversation",
        )
        [prompt] = tokenize([problem], self.tokenizer, self.data, self.max_prompt_tokens)
        return prompt.input_ids

    def add(self, text: str, answer: str) -> None:
        """Remember a question and its answer."""
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ]

    def reset(self) -> None:
        """Forget the messages; the system message remains."""
        self.messages = []

    def set_system(self, text: str) -> None:
        """Set the system message, or remove it if the text is empty.

        Raises:
            ConfigError: the model has no chat template.
        """
        if not self.has_history:
            raise ConfigError(
                "/system: the model has no chat template, so it cannot read a system message; give "
                "a template by data.chat_template_file=FILE"
            )
        self.data = replace(self.data, system_prompt=text or None)


def main(arguments: Sequence[str]) -> int:
    """Run the verb; returns its exit status.

    Raises:
        HybridRLError: as find_model; or the engine refuses the settings.
    """
    given = model_parser("chat", "Talk to a model.").parse_intermixed_args(arguments)
    model = alone(
        find_model(
            given.source,
            given.overrides,
            step=given.step,
            teacher=given.teacher,
            settings_of=given.settings,
        )
    )
    model.check()
    settings = model.settings
    print(f"loading {model.name} ...", flush=True)
    several = settings.rollout.tensor_parallel > 1
    with quiet_start(), kept_from_children() if several else nullcontext():
        from hybridrl.rollout.chat_engine import ChatEngine  # changes torch

        engine = ChatEngine(settings, settings.model, model.device)
    rollout = settings.rollout
    chat = Chat(
        tokenizer=model.tokenizer(),
        data=replace(settings.data, drop_too_long=False),
        max_prompt_tokens=rollout.sequence_limit - rollout.response_limit,
    )
    print(f"{model.name}; {HELP}")
    if not chat.has_history:
        print("the model has no chat template: it continues each line, without the earlier ones")
    converse(chat, engine, temperature_of(settings), settings.run.seed, sys.stdin, print)
    return 0


def temperature_of(settings: RunSettings) -> float:
    own = settings.generate.temperature
    return settings.algorithm.temperature if own is None else own


def alone(model: LoadableModel) -> LoadableModel:
    """The model with lengths, and as the only model of its settings, so that a teacher has its own
    tokenizer and chat template.

    Raises:
        ConfigError: rollout.max_new_tokens leaves no room for a question.
    """
    config = model.config
    settings = replace(model.settings, model=config)
    positions = most_positions(model_config(config.path, config.revision, setting=model.setting))
    rollout = settings.rollout
    length = rollout.max_model_len or int(min(positions, LONGEST))
    new = rollout.max_new_tokens or max(length // ANSWER_SHARE, 1)
    if new >= length:
        raise ConfigError(
            f"rollout.max_new_tokens={new}: leaves no room for a question in a sequence of "
            f"{length} tokens; give a number below {length}"
        )
    rollout = replace(rollout, max_model_len=length, max_new_tokens=new, max_num_seqs=1)
    # A conversation is rendered by the chat template, as messages in the data are.
    tokenizer = load_tokenizer(config.path, config.revision, eos=config.eos)
    templated = bool(settings.data.chat_template_file or tokenizer.chat_template)
    data = replace(settings.data, chat_template=templated)
    if model.teacher is not None and reads_own_prompts(settings, model.teacher):
        own = settings.teachers[model.teacher].chat_template_kwargs
        data = replace(data, chat_template_file=None, chat_template_kwargs=own)
        data = replace(data, chat_template=bool(tokenizer.chat_template))
    return replace(model, teacher=None, settings=replace(settings, rollout=rollout, data=data))


@contextmanager
def quiet_start() -> Iterator[None]:
    """Hold back the output of the block unless it fails, since vLLM prints pages at its start."""
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    sys.stdout.flush()
    sys.stderr.flush()
    shown = [os.dup(descriptor) for descriptor in (1, 2)]
    with TemporaryFile() as held_back:
        for descriptor in (1, 2):
            os.dup2(held_back.fileno(), descriptor)
        try:
            yield
        except BaseException:
            held_back.seek(0)
            os.write(shown[1], held_back.read())
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), shown, strict=True):
                os.dup2(original, descriptor)
                os.close(original)


@contextmanager
def held_interrupt() -> Iterator[Event]:
    """Yield an event that the first Ctrl-C in the block sets; the next raises KeyboardInterrupt.

    The first one raises nothing, since an exception in a forward pass could break the engine.
    """
    event = Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Keep the terminal's Ctrl-C from processes that start in the block. It would end the processes
    of an engine with several devices. This process gets a Ctrl-C after the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def converse(
    chat: Chat,
    engine: Engine,
    temperature: float,
    seed: int,
    lines: TextIO,
    say: Callable[..., None],
) -> None:
    """Answer each line until the input ends.

    Args:
        seed: the seed of the first answer; each later answer has the next number.
        say: prints text, as the function print.
    """
    is_terminal = lines.isatty()
    while (line := next_line(lines, say if is_terminal else None)) is not None:
        text = line.strip()
        try:
            if text.startswith("/"):
                command(chat, text, say)
            elif text:
                answer = answered(engine, chat.prompt(text), temperature, seed, say)
                chat.add(text, answer)
                seed += 1
        except TooLong as error:
            say(f"({str(error).partition(';')[0]}; /reset begins a new conversation)")
        except (ConfigError, DataError) as error:
            say(f"({error})")


def next_line(lines: TextIO, say: Callable[..., None] | None) -> str | None:
    """The next line; None at the end of the input.

    Args:
        say: prints a prompt for the user; None: there is no terminal.
    """
    while True:
        try:
            if say is not None:
                say("> ", end="", flush=True)
            return lines.readline() or None
        except KeyboardInterrupt:  # Ctrl-C stops answers, and Ctrl-D ends the conversation
            if say is None:
                raise
            say()


def command(chat: Chat, text: str, say: Callable[..., None]) -> None:
    """Carry out a line that begins with a slash."""
    name, _, rest = text.partition(" ")
    if name == "/reset":
        chat.reset()
        say("(a new conversation)")
    elif name == "/system":
        chat.set_system(rest.strip())
        say("(the system message is set)" if rest.strip() else "(no system message)")
    else:
        say(f"({name}: no such command; {HELP})")


def answered(
    engine: Engine,
    prompt: Sequence[int],
    temperature: float,
    seed: int,
    say: Callable[..., None],
) -> str:
    """Print an answer while it is sampled; returns its text, which Ctrl-C may cut short."""
    pieces = []
    with (
        held_interrupt() as interrupt,
        closing(engine.answer(prompt, temperature=temperature, seed=seed)) as sampled,
    ):
        for piece in sampled:
            say(piece, end="", flush=True)
            pieces.append(piece)
            if interrupt.is_set():
                break
    say()
    return "".join(pieces)
