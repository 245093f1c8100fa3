"""What runs inside a child process of the pool: the only place where a reward function is called.

Nothing of a reward function's own types leaves the child: answers go back as JSON, values as floats
and everything else as bounded text.

    owner -> child    pickled (name, number of sequences, keywords)
    child -> owner    {"name": signature or why it cannot be loaded, ...}, once, when all are loaded
    child -> owner    "taken", before each call, and {"values": [...]} or {"raised": text} after it

A child leaves no core file. Its memory is not bounded: torch and CUDA reserve far more addresses
than they use. Its working directory is that of the worker, since functions read files of theirs by
relative paths.
"""

import asyncio
import inspect
import itertools
import json
import math
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

FLOAT32_MAX = 3.4e38  # values travel as float32
TAKEN = b"taken"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardCall:
    """Names a reward function and its options; picklable."""

    function: str  # as in reward.functions.NAME.function
    options: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """The call as a whole failed: it raised, or did not return one value per sequence."""

    text: str
    wrong_result: bool = False  # it returned, but not a list of the right length


Answer = list[float | str | None] | Raised
"""One entry per sequence: its value, None where the function does not apply, or why it is no
value.
"""


def run(line: Connection, work: Connection, calls: Mapping[str, RewardCall]) -> None:
    """Start a guard and, below it, a child that loads the functions and answers calls until `work`
    closes.
    """
    for call in calls.values():
        redact.remember(redact.secrets_in(call.options, "options"))
    start_guard(line)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    redact.drop_variables()
    functions = {name: _loaded(name, call) for name, call in calls.items()}
    send(work, {name: _signature(function) for name, function in functions.items()})
    while True:
        try:
            name, num_sequences, keywords = work.recv()
        except EOFError:
            return
        work.send_bytes(TAKEN)
        answer = answer_of(functions[name], num_sequences, keywords)
        send(work, asdict(answer) if isinstance(answer, Raised) else {"values": answer})


def send(work: Connection, message: dict[str, Any]) -> None:
    work.send_bytes(json.dumps(message).encode())


def answer_of(
    function: RewardFunction | str, num_sequences: int, keywords: dict[str, Any]
) -> Answer:
    """What one call comes to; a function given as str could not be loaded, for that reason."""
    if isinstance(function, str):
        return Raised(text=function)
    try:
        values = function(**keywords)
        if inspect.isawaitable(values):
            values = event_loop().run(_awaited(values))
    except BaseException as error:  # SystemExit too: a child survives whatever a function raises
        return Raised(text=described(error))
    try:
        if isinstance(values, Mapping | str | bytes | bytearray | set | frozenset):
            raise TypeError("its items are not one value per sequence, in order")
        values = list(itertools.islice(values, num_sequences + 1))  # a generator may have no end
        if len(values) == num_sequences:
            return [_checked(value) for value in values]
    except BaseException as error:  # what it returned has code of its own
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
    """One for all calls: what an async function keeps from call to call, e.g. a session, belongs to
    its loop.
    """
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
    """The finite number that `value` is, None for None, else a sentence.

    Numbers are Python's and those of one element that numpy and torch return, e.g. np.bool_ or an
    array of shape (). They become Python's before they are compared: in float16 every bound that is
    larger than 65504 is infinite.
    """
    if value is None:
        return None
    number = value.item() if getattr(value, "shape", None) == () else value
    if isinstance(number, Real | Decimal) and abs(number) <= FLOAT32_MAX:  # False for NaN
        converted = float(number)
        if math.isfinite(converted):
            return converted
    return f"returned {plain(f'{value!r:.100}')}, must be a finite number"
