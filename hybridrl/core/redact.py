"""Secrets: what counts as one, and how it is kept out of what a run writes.

A secret comes from the environment. The driver, which knows its value, masks it in everything that
it writes; workers and the children that run reward functions do not need it and start without it.
What is promised:

- A secret is the value of an environment variable whose name says so (WANDB_API_KEY, DB_PASSWORD);
  what an option takes from any variable by ${oc.env:NAME}; the password of a URL, or a field named
  like a secret of a JSON object, in a variable.
- A value that is plain is none: a path, a word, words such as `not-needed`, a special token. What
  is named after a password or a secret, or comes by ${oc.env:NAME}, may be several words too; a
  single word and a path are never hidden.
- A secret of at least SHORTEST characters is masked wherever it stands, also as its repr, in JSON,
  HTML or a URL, as a single line of several, and inside of base64, as in `Authorization: Basic`.
- Masked whatever their value: the user and password of a URL, the signature and key of a URL's
  query, headers that authorise, and what stands after an option's or a variable's name that says
  so, unless it is plain.

    setting_is_secret("options.api_key", "sk-1a2b3c4d5e")     -> True       "EMPTY" -> False
    variable_is_secret("WANDB_API_KEY", "0123456789abcdef")   -> True
    variable_is_secret("S3_KEY_PREFIX", "/data/production")   -> False
    text("at https://me:pw@host/x?sig=0a1b2c3d4e")            -> "at https://***@host/x?sig=***"
"""

import base64
import html
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus, unquote

MASK = "***"
SHORTEST = 8
"""Characters; a shorter value is too likely an ordinary word to be masked wherever it stands."""

PASSWORDS = re.compile(r".*(password|passwd|passphrase|secret)s?")
KEYS = re.compile(
    r".*api_?keys?|keys?|token|credentials?|pat|auth|authorization|bearer|cookies?|sig|signature"
)
TOKENS = re.compile(r"(api|access|auth|bearer|github|gitlab|hf|hub|refresh|service|wandb)_tokens")
"""The plural alone is a number of tokens."""
SPECIAL_TOKENS = re.compile(
    r"(eos|bos|pad|unk|sep|cls|mask|stop|start|end|think|special|image|answer|sort)_(token|key)"
)
LABELS = re.compile(
    r"path|file|dir|prefix|suffix|name|type|kind|format|mode|algorithm|version|column|field|function|fn|"
    r"length|len|size|count|limit|ttl|timeout|host|port|region|sock"
)
"""A last word of a name which says that its value is about a secret and not the secret:
S3_KEY_PREFIX.
"""

LETTERS = r"(?:[A-Z]{1,15}|(?=[A-Za-z]{1,15}(?![A-Za-z]))[A-Za-z]?[a-z]+(?:[A-Z][a-z]+)*)"
WORD = re.compile(rf"(?:{LETTERS}|[a-z]{{1,14}}\d|\d{{1,4}})?")
PATH_WORD = re.compile(rf"{LETTERS}?\d{{0,4}}")
PATH = re.compile(r"(/|~|\.\.?/|\w+://)")

REFERENCE = re.compile(r"\$\{oc\.env:\s*(\w+)")
# The password may hold @, / and quotes; a port and its path are no password, nor is what follows a
# quote's end in JSON.
URL_USER = re.compile(
    r"(?<=://)(?:[^\s/:@\['\"]*:(?!\d{1,5}(?:[/?#'\"\s]|$))(?:(?!://|[\"'][,:}\])])\S)*|[^\s/:@'\"]+)(?=@)"
)
QUERY = re.compile(r"(?<=[?&])([\w.-]+)=([^\s&#'\"]+)")
ASSIGNMENT = re.compile(
    r"(?<![?&\w.-])([\w.-]+)(=|['\"]\s*:\s*)(?!['\"]?\$\{)(\"[^\"]*\"|'[^']*'|[^\s,;]+)"
)
HEADER = re.compile(
    r"\b((?:proxy-)?authorization|(?:set-)?cookie|(?:x-)?[\w-]*api-key|x-[\w-]*(?:token|secret|signature))"
    r"(['\"]?\s*[:,]\s*['\"]?)((?:(?:basic|bearer|token|digest|negotiate)\s+)?(?:\S+=\S+;\s*)*[^\s'\",]+)",
    re.IGNORECASE,
)

NEEDED = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH_TOKEN")
"""What a worker cannot do without: to load a private model on its own node, and to speak with
Ray.
"""


# -- what counts as a secret -----------------------------------------------------------------------


class Named(Enum):
    """What a name says of its value."""

    ordinary = 0
    key = 1  # a secret, unless the value is plain
    password = 2  # a secret; where a value is looked for in text, one word or a path is passed over


@lru_cache(maxsize=4096)
def named(name: str) -> Named:
    """What the name of a variable, an option, a header or a parameter of a URL says of its
    value.
    """
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    words = [word for word in re.split(r"[\W_]+", apart) if word]
    snake = "_".join(words)
    if not words or LABELS.fullmatch(words[-1]):
        return Named.ordinary
    if words[-1] in ("pass", "pwd") or any(PASSWORDS.fullmatch(word) for word in words):
        return Named.password
    if SPECIAL_TOKENS.fullmatch(snake):
        return Named.ordinary
    if any(KEYS.fullmatch(word) for word in words) or TOKENS.search(snake):
        return Named.key
    return Named.ordinary


def is_path(value: str) -> bool:
    """Whether this is a path or URL without secrets: it exists, or is made of words and short
    numbers.
    """
    if os.path.isabs(value) and os.path.exists(value):
        return True
    return (
        PATH.match(value) is not None
        and digits(value) <= 8
        and all(PATH_WORD.fullmatch(word) for word in re.split(r"[\W_]+", value))
        and not URL_USER.search(value)
    )


def is_plain(value: str) -> bool:
    """Whether this is too ordinary for a key: a path, words, a special token, a number of at most
    four digits, a short text.
    """
    if len(value) < SHORTEST or is_path(value):
        return True
    words = re.split(r"[\W_]+", value)
    return (
        digits(value) <= 4
        and all(WORD.fullmatch(word) for word in words)
        and not URL_USER.search(value)
    )


def digits(value: str) -> int:
    """How many digits a text has: words and dates have few, where several groups of four are a
    code.
    """
    return sum(character.isdigit() for character in value)


def is_shown(value: str) -> bool:
    """Whether this is never hidden, even as a password: a single word, or a path."""
    return WORD.fullmatch(value) is not None or is_path(value)


def variable_is_secret(name: str, value: str) -> bool:
    """Whether an environment variable holds a secret."""
    match named(name):
        case Named.ordinary:
            return False
        case Named.password:
            return name not in ("PWD", "OLDPWD") and value != "" and not is_path(value)
        case Named.key:
            return not is_plain(value)


def setting_is_secret(key: str, value: str) -> bool:
    """Whether the setting of this (dotted) key holds a secret: by its last name, among `options` by
    any of them.
    """
    *outer, name = key.split(".")
    free = outer[outer.index("options") + 1 :] if "options" in outer else []
    meaning = max((named(part) for part in (*free, name)), key=lambda n: n.value)
    if meaning is Named.password:
        return re.fullmatch(r"\d{0,4}(\.\d+)?", value) is None  # pass=1 counts something
    return meaning is Named.key and not is_plain(value)


class Secret(str):
    """A setting that came from a variable of the environment: a secret whatever its key, also in
    the worker that it is sent to.
    """


def referred(written: Any, resolved: Any) -> Any:
    """`resolved`, in which each text that refers to a variable, ${oc.env:NAME} in `written`, is a
    Secret, unless the variable's value is a single word or a path; the other variables' values are
    remembered.
    """
    if isinstance(written, Mapping):
        return {key: referred(part, resolved[key]) for key, part in written.items()}
    if isinstance(written, list):
        return [referred(part, value) for part, value in zip(written, resolved, strict=True)]
    if not isinstance(written, str) or not isinstance(resolved, str):
        return resolved
    values = {name: os.environ.get(name, "") for name in REFERENCE.findall(written)}
    hidden = [
        value
        for name, value in values.items()
        if variable_is_secret(name, value) or not is_shown(value)
    ]
    remember(hidden)
    return Secret(resolved) if hidden else resolved


def is_secret(value: Any, key: str) -> bool:
    """Whether a leaf of the settings holds a secret: a Secret, a text or number of such a key, or a
    header in one text.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        return False
    if isinstance(value, Secret) or setting_is_secret(key, str(value)):
        return True
    header = HEADER.match(value) if isinstance(value, str) else None
    return header is not None and not is_plain(header[3])


def rebuilt(value: Any, leaf: Callable[[Any, str], Any], key: str = "") -> Any:
    """A copy of nested mappings, lists and dataclasses with leaf(value, dotted key) in the place of
    each leaf.

    In the pair [NAME, VALUE] of a list of headers, and in {name: NAME, value: VALUE}, NAME is the
    last part of VALUE's key.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        title = next((value[n] for n in ("name", "key", "header") if n in value), None)
        called = {"value": str(title)} if isinstance(title, str) else {}
        return {
            name: rebuilt(part, leaf, ".".join(filter(None, (key, called.get(name, str(name))))))
            for name, part in value.items()
        }
    if isinstance(value, list | tuple):
        pair = len(value) == 2 and isinstance(value[0], str) and named(value[0])
        if pair and pair is not Named.ordinary:
            return [value[0], rebuilt(value[1], leaf, f"{key}.{value[0]}")]
        return [rebuilt(part, leaf, key) for part in value]
    return leaf(value, key)


def secrets_in(value: Any, key: str = "") -> list[str]:
    """The secrets in nested mappings, lists and dataclasses."""
    secrets: list[str] = []

    def collect(leaf: Any, name: str) -> None:
        if is_secret(leaf, name):
            secrets.append(str(leaf))

    rebuilt(value, collect, key)
    return secrets


# -- the values that are masked --------------------------------------------------------------------

_remembered: set[str] = set()


def remember(values: Iterable[str]) -> None:
    """Values that this process masks wherever they stand, beside those of its environment."""
    _remembered.update(values)


@lru_cache(maxsize=4096)
def variable_secrets(name: str, value: str) -> tuple[str, ...]:
    """What is secret in an environment variable: all of it, the password of a URL, or fields of a
    JSON object.
    """
    secrets = [value] if variable_is_secret(name, value) else []
    for user in URL_USER.findall(value):
        password = user.partition(":")[2] or user
        secrets += [password, unquote(password)]
    if value.lstrip().startswith("{"):
        with suppress(ValueError):  # no JSON
            secrets += secrets_in(json.loads(value), "options")
    return tuple(secrets)


@lru_cache(maxsize=1024)
def spellings(secret: str) -> tuple[str, ...]:
    """Regular expressions for a secret as it may be written; none for what is too short or one
    word.
    """
    whole = {secret.strip(), re.sub(r"^\w+\s+(?=\S+$)", "", secret.strip())}  # "Bearer abc", "abc"
    lines = re.split(r"[\r\n]|\\r|\\n", secret)
    if len(lines) > 1:
        whole |= {line.strip() for line in lines if not line.strip().startswith("-----")}
    texts: set[str] = set()
    runs: set[str] = set()
    for text in whole:
        if len(text) < SHORTEST or is_shown(text):
            continue
        data = text.encode(errors="surrogateescape")
        quoted = {quote(data), quote(data, safe=""), quote_plus(data)}
        texts |= {text, repr(text)[1:-1], repr(data)[2:-1], html.escape(text)}
        texts |= {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
        texts |= quoted | {re.sub(r"%..", lambda m: m[0].lower(), form) for form in quoted}
        runs |= {base64_middle(data, offset) for offset in range(3)}
    run = r"[A-Za-z0-9+/_-]"
    return (
        *(re.escape(form) for form in texts),
        *(
            rf"(?<!{run}){run}*?{middle.replace('+', '[+-]').replace('/', '[/_]')}{run}*=*"
            for middle in runs
        ),
    )


def base64_middle(data: bytes, offset: int) -> str:
    """The characters of base64 that `data` alone decides where it begins at byte `offset` of
    three.
    """
    encoded = base64.b64encode(bytes(offset) + data).decode()
    return encoded[-(-offset * 8 // 6) : (offset + len(data)) * 8 // 6]


@lru_cache(maxsize=16)
def pattern_of(secrets: frozenset[str]) -> re.Pattern | None:
    """Matches every spelling of the secrets, longer ones first, since one may hold another; None of
    none.
    """
    forms = {form for secret in secrets for form in spellings(secret)}
    return re.compile("|".join(sorted(forms, key=len, reverse=True))) if forms else None


# -- masking ---------------------------------------------------------------------------------------


def text(value: str) -> str:
    """`value` with secrets masked, as the head of this file promises."""
    known = {s for name, v in os.environ.items() for s in variable_secrets(name, v)}
    if (pattern := pattern_of(frozenset(known | _remembered))) is not None:
        value = pattern.sub(MASK, value)
    value = URL_USER.sub(MASK, value)
    value = QUERY.sub(lambda m: f"{m[1]}={MASK}" if setting_is_secret(m[1], m[2]) else m[0], value)
    value = HEADER.sub(lambda m: m[0] if is_plain(m[3]) else f"{m[1]}{m[2]}{MASK}", value)
    return ASSIGNMENT.sub(_masked_assignment, value)


def _masked_assignment(match: re.Match) -> str:
    """NAME=VALUE, or "NAME": VALUE, with the quotes of VALUE kept."""
    name, sign, value = match.groups()
    mark = value[0] if value[0] in "'\"" else ""
    bare = value.strip(mark) if mark else value
    if bare in ("", MASK) or not setting_is_secret(name, bare):
        return match[0]
    return f"{name}{sign}{mark}{MASK}{mark}"


def tree(value: Any, *, references: bool = False) -> Any:
    """A copy of nested mappings and lists in which secrets are masked, by key and by value.

    Args:
        references: keep texts that refer to a variable, ${oc.env:NAME}, as they are; for settings
            that are not resolved yet.
    """

    def leaf(part: Any, key: str) -> Any:
        unresolved = references and isinstance(part, str) and REFERENCE.search(part)
        if is_secret(part, key) and not unresolved:
            return MASK
        return text(part) if isinstance(part, str) else part

    return rebuilt(value, leaf)


def agree(one: Any, other: Any) -> bool:
    """Whether two settings may be the same where parts of either are masked, which depends on the
    environment of the day.
    """
    if one == other:
        return True
    return any(
        MASK in masked
        and re.fullmatch(re.escape(masked).replace(re.escape(MASK), ".*"), full, re.DOTALL)
        for masked, full in ((str(one), str(other)), (str(other), str(one)))
    )


# -- processes -------------------------------------------------------------------------------------


def worker_variables() -> dict[str, str]:
    """Empties, for a worker's environment, each secret variable of this process that it does not
    need.
    """
    return {
        name: ""
        for name, value in os.environ.items()
        if is_withheld(name, value) and name not in NEEDED
    }


def drop_variables(*, needed: tuple[str, ...] = ()) -> dict[str, str]:
    """Take secret variables out of this process's environment; returns them."""
    return {
        name: os.environ.pop(name)
        for name, value in list(os.environ.items())
        if is_withheld(name, value) and name not in needed
    }


def is_withheld(name: str, value: str) -> bool:
    """Whether a process that runs foreign code goes without this variable: also where a variable
    named like a key holds words, which are not masked anywhere but may be a pass phrase. A path is
    no secret.
    """
    if variable_is_secret(name, value):
        return True
    return named(name) is Named.key and value != "" and not is_path(value)


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
    """What this process logs, its libraries included, goes to stderr from warnings on, with secrets
    masked.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
