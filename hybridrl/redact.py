"""Secrets: which names and values they have, and how they are kept out of what a run writes.

A secret comes from the environment. What knows its value (the driver) masks it in everything that it writes; what
does not need it (workers, and the children that run reward functions) is started without it.

    setting_is_secret("options.api_key")      -> True       "eos_token", "max_new_tokens" -> False
    variable_is_secret("WANDB_API_KEY")       -> True       "TOKENIZERS_PARALLELISM" -> False
    text("at https://me:pw@host/x")           -> "at https://***@host/x"
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

MASK = "***"
SHORTEST = 8
"""Characters; a shorter value of a secret variable is too likely an ordinary word to be masked wherever it stands."""

VARIABLE = re.compile(
    r"((^|_)(key|token|credential)s?(?=_|$)|secret|passw(or)?d|apikey)(?!.*_(path|file|dir)$)",
    re.IGNORECASE,
)
SETTING = re.compile(
    r"(^|[._-])(api|access|auth|bearer|hf|hub|private|secret|session|wandb)[_-]?(key|token)s?$|secret|passw(or)?d|credential|(^|\.)token$",
    re.IGNORECASE,
)
OPTION = re.compile(
    r"(^|[._-])(key|token|pat|pwd|auth|authorization|bearer|passphrase)$", re.IGNORECASE
)
"""Further secrets among `options`, whose names are not ours; but for ORDINARY ones."""
ORDINARY = re.compile(
    r"(eos|bos|pad|unk|sep|cls|mask|stop|start|end|answer|sort)[_-](token|key)", re.IGNORECASE
)
REFERENCE = re.compile(r"\$\{oc\.env:\s*(\w+)")
URL_USER = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")
ASSIGNMENT = re.compile(r"([\w.-]+)=(?!['\"]?(?:\$\{|$))[^\s,;&]+")
SETTING_LINE = re.compile(r"^(\s*(?:- )?['\"]?([\w.-]+)['\"]?: )(?!\$\{)(\S.*)$", re.MULTILINE)

NEEDED = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH_TOKEN")
"""What a worker cannot do without: to load a private model on its own node, and to speak with Ray."""


def variable_is_secret(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return VARIABLE.search(name) is not None


def setting_is_secret(key: str) -> bool:
    """Whether the setting of this (dotted) key holds a secret: by its last name, among `options` by any of them."""
    *outer, name = key.split(".")
    free = [*outer, name][outer.index("options") + 1 :] if "options" in outer else []
    return SETTING.search(name) is not None or any(
        SETTING.search(part) or (OPTION.search(part) and not ORDINARY.fullmatch(part))
        for part in free
    )


class Secret(str):
    """A setting that came from a variable of the environment: a secret whatever its key, also in the worker that it is sent to."""


def referred(written: Any, resolved: Any) -> Any:
    """`resolved`, in which each text that refers to a variable, ${oc.env:NAME} in `written`, is a Secret; the variables' values are
    remembered. A variable that holds a path which exists, as HOME does, is none."""
    if isinstance(written, Mapping):
        return {key: referred(part, resolved[key]) for key, part in written.items()}
    if isinstance(written, list):
        return [referred(part, value) for part, value in zip(written, resolved, strict=True)]
    if not isinstance(written, str) or not isinstance(resolved, str):
        return resolved
    values = [os.environ.get(name, "") for name in REFERENCE.findall(written)]
    hidden = [
        value for value in values if value and not (os.path.isabs(value) and os.path.exists(value))
    ]
    remember(hidden)
    return Secret(resolved) if hidden else resolved


def is_secret(value: Any, key: str) -> bool:
    """Whether a leaf of the settings holds a secret: not empty, a Secret or a text or number of such a key."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        return False
    return isinstance(value, Secret) or setting_is_secret(key)


_remembered: set[str] = set()


def remember(values: Iterable[str]) -> None:
    """Values that this process masks wherever they stand, beside those of its environment; of "Bearer abc..." also the second word."""
    _remembered.update(
        form for value in values for form in (value, re.sub(r"^\w+\s+(?=\S+$)", "", value))
    )


def secrets_in(value: Any, key: str = "") -> Iterator[str]:
    """The secrets in nested mappings, lists and dataclasses."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from secrets_in(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from secrets_in(part, key)
    elif is_secret(value, key):
        yield str(value)


def text(value: str) -> str:
    """`value` with secrets masked: what is remembered, values of secret variables, users of URLs, what stands after SECRET_KEY=."""
    secrets = _remembered | {v for name, v in os.environ.items() if variable_is_secret(name)}
    for secret in sorted(
        (s for s in secrets if len(s) >= SHORTEST), key=len, reverse=True
    ):  # one may hold another
        value = value.replace(secret, MASK)
    value = ASSIGNMENT.sub(lambda m: f"{m[1]}={MASK}" if setting_is_secret(m[1]) else m[0], value)
    return URL_USER.sub(MASK, value)


def tree(value: Any, key: str = "") -> Any:
    """A copy of nested mappings and lists in which secrets are masked, by key and by value."""
    if isinstance(value, Mapping):
        return {
            name: tree(part, f"{key}.{name}" if key else str(name)) for name, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [tree(part, key) for part in value]
    if is_secret(value, key):
        return MASK
    return text(value) if isinstance(value, str) else value


def yaml_text(value: str) -> str:
    """As `text`, and what stands after a key of block YAML that is secret among options is masked, a reference ${...} left."""
    return SETTING_LINE.sub(
        lambda m: f"{m[1]}'{MASK}'" if setting_is_secret(f"options.{m[2]}") else m[0], text(value)
    )


def worker_variables() -> dict[str, str]:
    """Empties, for a worker's environment, each secret variable of this process that it does not need."""
    return {name: "" for name in os.environ if variable_is_secret(name) and name not in NEEDED}


def drop_variables(*, needed: tuple[str, ...] = ()) -> dict[str, str]:
    """Take secret variables out of this process's environment; returns them."""
    return {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if variable_is_secret(name) and name not in needed
    }


@contextmanager
def without_secrets() -> Iterator[None]:
    """A process started meanwhile inherits no secret variable, not even in /proc/PID/environ."""
    dropped = drop_variables()
    try:
        yield
    finally:
        os.environ.update(dropped)


class Formatter(logging.Formatter):
    """A log line, its traceback included, with secrets masked."""

    def format(self, record: logging.LogRecord) -> str:
        return text(super().format(record))


def log_warnings() -> None:
    """What this process logs, its libraries included, goes to stderr from warnings on, with secrets masked."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
