"""Secrets: what counts as one, and how it is removed from everything that a run writes.

A secret comes from the environment. The driver masks its value in everything that it writes;
workers and the processes that run reward functions do not need it and start without it.
These are the rules:

- A secret is the value of an environment variable whose name says so (WANDB_API_KEY, DB_PASSWORD),
  the value that an option takes from any variable by ${oc.env:NAME}, and, inside of a variable, the
  password of a URL or a field of a JSON object that is named like a secret.
- A plain value is not a secret: a path, a word, words such as `not-needed`, a special token. Under
  a name with "password" or "secret", and by ${oc.env:NAME}, several words are a secret too; a
  single word and a path never are.
- A secret of at least SHORTEST characters is masked wherever it occurs, also as its repr, in JSON,
  HTML or a URL, as a single line of several, and inside of base64, as in `Authorization: Basic`.
- Masked whatever their value: the user and password of a URL, the signature and key of a URL's
  query, headers that authorise, and what follows the name of an option or variable that says so,
  unless it is plain.

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
"""Characters; a shorter value is too likely an ordinary word to be masked wherever it occurs."""

PASSWORDS = re.compile(r".*(password|passwd|passphrase|secret)s?")
KEYS = re.compile(
    r".*api_?keys?|keys?|token|credentials?|pat|auth|authorization|bearer|cookies?|sig|signature"
)
TOKENS = re.compile(r"(api|access|auth|bearer|github|gitlab|hf|hub|refresh|service|wandb)_tokens")
"""Names in the plural which mean a secret; any other plural is a number of tokens."""
SPECIAL_TOKENS = re.compile(
    r"(eos|bos|pad|unk|sep|cls|mask|stop|start|end|think|special|image|answer|sort)_(token|key)"
)
LABELS = re.compile(
    r"path|file|dir|prefix|suffix|name|type|kind|format|mode|algorithm|version|column|field|"
    r"function|fn|length|len|size|weight|count|samples|limit|ttl|timeout|host|port|region|sock"
)
"""Last words of names whose value describes a secret but is not one, e.g. S3_KEY_PREFIX."""

LETTERS = r"(?:[A-Z]{1,15}|(?=[A-Za-z]{1,15}(?![A-Za-z]))[A-Za-z]?[a-z]+(?:[A-Z][a-z]+)*)"
WORD = re.compile(rf"(?:{LETTERS}|[a-z]{{1,14}}\d|\d{{1,4}})?")
PATH_WORD = re.compile(rf"{LETTERS}?\d{{0,4}}")
PATH = re.compile(r"(/|~|\.\.?/|\w+://)")

REFERENCE = re.compile(r"\$\{oc\.env:\s*(\w+)")
# A password may hold @, / and quotes. A port with its path is not a password, and neither is what
# follows a closing quote in JSON.
URL_USER = re.compile(
    r"(?<=://)(?:[^\s/:@\['\"]*:(?!\d{1,5}(?:[/?#'\"\s]|$))(?:(?!://|[\"'][,:}\])])\S)*"
    r"|[^\s/:@'\"]+)(?=@)"
)
QUERY = re.compile(r"(?<=[?&])([\w.-]+)=([^\s&#'\"]+)")
ASSIGNMENT = re.compile(
    r"(?<![?&\w.-])([\w.-]+)(=|['\"]\s*:\s*)(?!['\"]?\$\{)(\"[^\"]*\"|'[^']*'|[^\s,;]+)"
)
HEADER = re.compile(
    r"\b((?:proxy-)?authorization|(?:set-)?cookie|(?:x-)?[\w-]*api-key"
    r"|x-[\w-]*(?:token|secret|signature))"
    r"(['\"]?\s*[:,]\s*['\"]?)"
    r"((?:(?:basic|bearer|token|digest|negotiate)\s+)?(?:\S+=\S+;\s*)*[^\s'\",]+)",
    re.IGNORECASE,
)

NEEDED = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH_TOKEN")
"""Secrets that workers need: to load a private model on their node, and to connect to Ray."""


# -- what counts as a secret -----------------------------------------------------------------------


class Named(Enum):
    """What a name implies about its value."""

    ordinary = 0
    key = 1  # a secret, unless the value is plain
    password = 2  # a secret; as part of a longer text, a single word or a path is not masked


@lru_cache(maxsize=4096)
def named(name: str) -> Named:
    """What the name of a variable, option, header or URL parameter implies about its value."""
    separated = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    words = [word for word in re.split(r"[\W_]+", separated) if word]
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
    """Whether a value is a path or URL without secrets.

    It exists, or consists of words and short numbers.
    """
    if os.path.isabs(value) and os.path.exists(value):
        return True
    return (
        PATH.match(value) is not None
        and digits(value) <= 8
        and all(PATH_WORD.fullmatch(word) for word in re.split(r"[\W_]+", value))
        and not URL_USER.search(value)
    )


def has_password(value: str) -> bool:
    """Whether a text has a URL with a user and a password, which are not masked yet.

    Example: True of "http://me:pw@host", False of "http://host:80" and of "http://***@host".
    """
    return any(":" in found.group() for found in URL_USER.finditer(value))


def is_plain(value: str) -> bool:
    """Whether a value is too ordinary to be a key.

    Plain are a path, words, a special token, a number of at most four digits, and a short text.
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
    """The number of digits in a text: few in words and dates, many in codes."""
    return sum(character.isdigit() for character in value)


def is_shown(value: str) -> bool:
    """Whether a value is never hidden, even as a password: a single word, or a path."""
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
    """Whether the setting with this dotted key holds a secret.

    The last part of the key decides; inside of `options`, any part does.
    """
    *outer, name = key.split(".")
    inside_options = outer[outer.index("options") + 1 :] if "options" in outer else []
    meaning = max((named(part) for part in (*inside_options, name)), key=lambda n: n.value)
    if meaning is Named.password:
        return re.fullmatch(r"\d{0,4}(\.\d+)?", value) is None  # pass=1 counts something
    return meaning is Named.key and not is_plain(value)


class Secret(str):
    """A setting that came from a variable of the environment.

    It is a secret whatever its key is, also in the worker that receives it.
    """


def referred(written: Any, resolved: Any) -> Any:
    """Mark the texts of `resolved` whose form in `written` refers to a variable, ${oc.env:NAME}.

    They become Secret and the variable's value is remembered, unless the value is a single word or
    a path.
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
    """Whether a leaf of the settings holds a secret.

    That is a Secret, a text or number whose key says so, or a whole header in one text.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        return False
    if isinstance(value, Secret) or setting_is_secret(key, str(value)):
        return True
    header = HEADER.match(value) if isinstance(value, str) else None
    return header is not None and not is_plain(header[3])


def rebuilt(value: Any, leaf: Callable[[Any, str], Any], key: str = "") -> Any:
    """A copy of nested mappings, lists and dataclasses with each leaf replaced.

    The new leaf is leaf(value, dotted key). In the pair [NAME, VALUE] of a list of headers, and in
    {name: NAME, value: VALUE}, NAME is the last part of VALUE's key.
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
    """Mask these values in this process from now on, in addition to those of its environment."""
    _remembered.update(values)


@lru_cache(maxsize=4096)
def variable_secrets(name: str, value: str) -> tuple[str, ...]:
    """The secrets in an environment variable.

    They are the whole value, the password of a URL, or fields of a JSON object.
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
    """Regular expressions for the forms in which a secret may be written.

    A secret that is too short or a single word has none.
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
    """The base64 characters that depend on `data` alone, which starts at byte `offset` of three."""
    encoded = base64.b64encode(bytes(offset) + data).decode()
    return encoded[-(-offset * 8 // 6) : (offset + len(data)) * 8 // 6]


@lru_cache(maxsize=16)
def pattern_of(secrets: frozenset[str]) -> re.Pattern[str] | None:
    """A pattern that matches every spelling of the secrets; None where there are none.

    Longer spellings come first, since one may contain another.
    """
    forms = {form for secret in secrets for form in spellings(secret)}
    return re.compile("|".join(sorted(forms, key=len, reverse=True))) if forms else None


# -- masking ---------------------------------------------------------------------------------------


def text(value: str) -> str:
    """`value` with secrets masked, by the rules at the top of this file."""
    of_environment = {s for name, v in os.environ.items() for s in variable_secrets(name, v)}
    if (pattern := pattern_of(frozenset(of_environment | _remembered))) is not None:
        value = pattern.sub(MASK, value)
    value = URL_USER.sub(MASK, value)
    value = QUERY.sub(lambda m: f"{m[1]}={MASK}" if setting_is_secret(m[1], m[2]) else m[0], value)
    value = HEADER.sub(lambda m: m[0] if is_plain(m[3]) else f"{m[1]}{m[2]}{MASK}", value)
    return ASSIGNMENT.sub(_masked_assignment, value)


def _masked_assignment(match: re.Match[str]) -> str:
    """NAME=VALUE or "NAME": VALUE with VALUE masked and its quotes retained."""
    name, sign, value = match.groups()
    quotes = value[0] if value[0] in "'\"" else ""
    unquoted = value.strip(quotes) if quotes else value
    if unquoted in ("", MASK) or not setting_is_secret(name, unquoted):
        return match[0]
    return f"{name}{sign}{quotes}{MASK}{quotes}"


def tree(value: Any, *, references: bool = False) -> Any:
    """A copy of nested mappings and lists in which secrets are masked, by key and by value.

    Args:
        references: leave texts that refer to a variable, ${oc.env:NAME}, unchanged; for settings
            that are not resolved yet.
    """

    def leaf(part: Any, key: str) -> Any:
        unresolved = references and isinstance(part, str) and REFERENCE.search(part)
        if is_secret(part, key) and not unresolved:
            return MASK
        return text(part) if isinstance(part, str) else part

    return rebuilt(value, leaf)


def agree(one: Any, other: Any) -> bool:
    """Whether two settings may be equal although parts of either are masked.

    What is masked depends on the environment at the time, so MASK matches any text.
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
    """The secret variables that a worker does not need, with empty values for its environment."""
    return {
        name: ""
        for name, value in os.environ.items()
        if is_withheld(name, value) and name not in NEEDED
    }


def drop_variables(*, needed: tuple[str, ...] = ()) -> dict[str, str]:
    """Remove secret variables from this process's environment and return them."""
    return {
        name: os.environ.pop(name)
        for name, value in list(os.environ.items())
        if is_withheld(name, value) and name not in needed
    }


def is_withheld(name: str, value: str) -> bool:
    """Whether a process that runs a user's code starts without this variable.

    Unlike variable_is_secret, this includes words under a name like that of a key: they are not
    masked anywhere but may be a pass phrase. A path is not withheld.
    """
    if variable_is_secret(name, value):
        return True
    return named(name) is Named.key and value != "" and not is_path(value)


@contextmanager
def without_secrets() -> Iterator[None]:
    """A context in which new processes inherit no secret variable, even in /proc/PID/environ."""
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
    """Send log records from level warning on, of libraries too, to stderr with secrets masked."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
