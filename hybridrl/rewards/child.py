"""The program of a child process of the pool, and the only place where a reward function is called.

No object of a type that a reward function defines leaves the child: answers are JSON, with values
as floats and everything else as text of bounded length.

    owner -> child    pickled (name, number of sequences, keywords)
    child -> owner    {"name": signature, or why it cannot be loaded, ...}, once, after loading
    child -> owner    "accepted", before each call, then {"values": [...]} or {"text": ...}

A child writes no core file. Its memory is not limited, because torch and CUDA reserve far more
addresses than they use. Its working directory is the worker's, because functions may read files by
relative paths.
"""

import asyncio
import inspect
import itertools
import json
import math
import os
import resource
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import cache
from multiprocessing.connection import Connection
from numbers import Real
from typing import Any

from hybridrl.core import redact
from hybridrl.core.plain_text import described, plain
from hybridrl.rewards.guard import start_guard
from hybridrl.rewards.load import RewardFunction, load_reward
from hybridrl.rewards.signature import signature_of

FLOAT32_MAX = 3.4e38  # values are stored as float32
ACCEPTED = b"accepted"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardCall:
    """The name and options of a reward function; picklable."""

    function: str  # as in reward.functions.NAME.function
    options: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """A call that failed as a whole: it raised, or did not return one item per sequence."""

    text: str
    wrong_result: bool = False  # it returned, but not a list of the right length


Answer = list[float | str | None] | Raised
"""One entry per sequence: a value, None where the function does not apply, or an error text."""


def run(line: Connection, work: Connection, calls: Mapping[str, RewardCall]) -> None:
    """Turn this process into a guarded child that answers calls until `work` is closed.

    Args:
        line: the guard's end of its connection to the owner.
        work: the child's end of the connection for calls and answers.
        calls: the reward functions by name.
    """
    for call in calls.values():
        redact.remember(redact.secrets_in(call.options, "options"))
    start_guard(line)
    # Spawning made it inheritable. A program that a function starts must not hold it open, because
    # the owner notices the end of this process by its end.
    os.set_inheritable(work.fileno(), False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    redact.drop_variables()
    functions = {name: _loaded(name, call) for name, call in calls.items()}
    send(work, {name: _signature(function) for name, function in functions.items()})
    while True:
        try:
            name, num_sequences, keywords = work.recv()
        except EOFError:
            return
        work.send_bytes(ACCEPTED)
        answer = answer_of(functions[name], num_sequences, keywords)
        send(work, asdict(answer) if isinstance(answer, Raised) else {"values": answer})


def send(work: Connection, message: dict[str, Any]) -> None:
    work.send_bytes(json.dumps(message).encode())


def answer_of(
    function: RewardFunction | str, num_sequences: int, keywords: dict[str, Any]
) -> Answer:
    """The result of one call.

    Args:
        function: the function, or as text the reason why it could not be loaded.
    """
    if isinstance(function, str):
        return Raised(text=function)
    try:
        values = function(**keywords)
        if inspect.isawaitable(values):
            values = event_loop().run(_awaited(values))
    except BaseException as error:  # also SystemExit: no exception of a function ends the child
        return Raised(text=described(error))
    try:
        if isinstance(values, Mapping | str | bytes | bytearray | set | frozenset):
            raise TypeError("its items are not one value per sequence, in order")
        values = list(itertools.islice(values, num_sequences + 1))  # a generator may have no end
        if len(values) == num_sequences:
            return [_checked(value) for value in values]
    except BaseException as error:  # reading the returned object may run its code
        return Raised(
            text=f"returned {type(values).__name__}, must be a list of numbers "
            f"({described(error)})",
            wrong_result=True,
        )
    count = len(values) if len(values) < num_sequences else f"more than {num_sequences}"
    return Raised(
        text=f"returned {count} values for {num_sequences} completions", wrong_result=True
    )


@cache
def event_loop() -> asyncio.Runner:
    """One event loop for all calls, because an async function may keep objects bound to it."""
    return asyncio.Runner()


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _loaded(name: str, call: RewardCall) -> RewardFunction | str:
    try:
        return load_reward(name, call.function, call.options)
    except BaseException as error:
        return plain(str(error), limit=2000) if isinstance(error, ValueError) else described(error)


def _signature(function: RewardFunction | str) -> dict[str, Any] | str:
    return function if isinstance(function, str) else asdict(signature_of(function))


def _checked(value: object) -> float | str | None:
    """A finite number as a float, None as None, and an error text for anything else.

    Arrays and tensors of shape () count as numbers, e.g. np.bool_. They are converted to Python
    numbers before they are compared, since in float16 every bound above 65504 is infinite.
    """
    if value is None:
        return None
    number: Any = value
    if getattr(value, "shape", None) == ():
        number = number.item()
    if isinstance(number, Real | Decimal):
        magnitude: Any = abs(number)
        if magnitude <= FLOAT32_MAX:  # False for NaN
            converted = float(number)
            if math.isfinite(converted):  # a subclass may override __abs__
                return converted
    return f"returned {plain(f'{value!r:.100}')}, must be a finite number"
