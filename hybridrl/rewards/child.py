"""What runs inside a child process of the pool: the only place where a reward function is called.

Nothing of a reward function's own types leaves the child: values go back as floats, everything else as text.

A child leads a session of its own, so that it can be killed together with all that its functions started. It leaves no core file. Its
memory is not bounded: torch and CUDA reserve far more addresses than they use. Its working directory is that of the worker, since
functions read files of theirs by relative paths.
"""

import fcntl
import multiprocessing
import os
import resource
import select
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from hybridrl.redact import drop_variables
from hybridrl.rewards.load import RewardFunction, accepted_names, load_reward

FLOAT32_MAX = 3.4e38  # values travel as float32


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


_functions: dict[str, RewardFunction | str] = {}  # str: why it could not be loaded


def start(calls: Mapping[str, RewardCall]) -> None:
    """Prepare a fresh child: a session of its own that dies with the parent, no core files, no secrets, then load the functions."""
    os.setsid()
    _follow_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    drop_variables()
    for name, call in calls.items():
        try:
            _functions[name] = load_reward(name, call.function, call.options)
        except Exception as error:  # told by `loaded`, to whoever asks
            _functions[name] = str(error)


def loaded(name: str) -> frozenset[str] | str | None:
    """The keywords that the function takes (None: any), or, as a str, why it could not be loaded."""
    function = _functions[name]
    return function if isinstance(function, str) else accepted_names(function)


def call(name: str, num_sequences: int, keywords: dict[str, Any]) -> list[float | str] | Raised:
    """One entry per sequence: its value, or why it is no value."""
    function = _functions[name]
    if isinstance(function, str):
        return Raised(text=function)
    try:
        values = function(**keywords)
    except BaseException as error:  # SystemExit too: a child outlives whatever a function raises
        return Raised(text=_told(error))
    try:
        values = list(values)
        if len(values) == num_sequences:
            return [_checked(value) for value in values]
    except BaseException as error:  # what it returned has code of its own
        return Raised(
            text=f"returned {type(values).__name__}, must be a list of numbers ({_told(error)})",
            wrong_result=True,
        )
    return Raised(
        text=f"returned {len(values)} values for {num_sequences} completions", wrong_result=True
    )


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # of its own __str__
        return type(error).__name__


def _checked(value: object) -> float | str:
    if isinstance(value, Real) and abs(value) <= FLOAT32_MAX:  # False for NaN
        return float(value)
    return f"returned {value!r:.100}, must be a finite number"


def _follow_parent() -> None:
    """When the pipe from the parent closes, the kernel kills this session; a thread could not, while a call in C holds the interpreter."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    pipe = parent.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:  # closed before the kernel was asked
        os.killpg(os.getpgrp(), signal.SIGKILL)
