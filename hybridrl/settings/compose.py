"""From conf/ and the command line to validated settings, or to one sentence about what is wrong.

Nothing here or in run.py imports torch or ray, so that a typo is reported within a second.
"""

import difflib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from hybridrl.core import redact
from hybridrl.core.errors import ConfigError
from hybridrl.settings.algorithm import ScheduleConfig
from hybridrl.settings.checks import check_settings
from hybridrl.settings.held_out import HeldOutSetConfig
from hybridrl.settings.hydra_internals import (
    adds_existing_key,
    first_line,
    is_unknown_choice,
    is_unknown_key,
    is_unquoted_list,
    parsed,
    unparsed_override,
)
from hybridrl.settings.models import TeacherConfig
from hybridrl.settings.rewards import RewardFunctionConfig
from hybridrl.settings.run import RunSettings, SinkConfig
from hybridrl.settings.sources import SourceConfig
from hybridrl.settings.synonyms import synonym_of

PACKAGE = Path(__file__).parent.parent
CONF_DIRS = (PACKAGE / "conf", PACKAGE.parent / "conf")


def conf_dir() -> Path:
    """The folder of YAML files: inside the wheel, or beside the package in a checkout."""
    for path in CONF_DIRS:
        if path.is_dir():
            return path
    raise ConfigError(f"no conf folder at {' or '.join(map(str, CONF_DIRS))}; reinstall hybridrl")


@cache
def typed_schema() -> DictConfig:
    """Every key, type and default. It is made once, since that takes longer than any other part of
    reading the settings; callers must not change it.
    """
    return OmegaConf.structured(RunSettings)


@cache
def register_schema() -> None:
    """Register every key and default with Hydra; conf/config.yaml starts from them.

    The node is a plain tree, so that +teachers.NAME.path=... can add an entry; to_settings checks
    the types.
    """
    tree = OmegaConf.to_container(typed_schema(), enum_to_str=True)
    ConfigStore.instance().store(name="schema", node=OmegaConf.create(tree))


def load_config(overrides: Sequence[str] = ()) -> RunSettings:
    """Compose conf/config.yaml with command-line overrides and check everything.

    Raises:
        ConfigError: one sentence with field, value, rule and remedy.
    """
    register_schema()
    GlobalHydra.instance().clear()
    with (
        one_sentence(overrides, of=(Exception,)),
        initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"),
    ):
        composed = compose("config", overrides=list(overrides))
    settings = to_settings(composed, overrides)
    check_unmasked(settings)
    return settings


def to_settings(composed: DictConfig, overrides: Sequence[str] = ()) -> RunSettings:
    """The typed settings of a composed config.

    Args:
        overrides: only for clearer error messages.

    Raises:
        ConfigError: as load_config.
    """
    with one_sentence(overrides, of=(Exception,)):
        unresolved = OmegaConf.to_container(composed)
        check_secrets(unresolved)
        unresolved = spelled_out(unresolved, RunSettings)
        composed = OmegaConf.create(unresolved)
        settings = OmegaConf.to_object(OmegaConf.merge(typed_schema(), composed))
        assert isinstance(settings, RunSettings)
        for written_entries, entries in (
            (unresolved["reward"]["functions"], settings.reward.functions),
            (unresolved["tracking"].get("sinks", {}), settings.tracking.sinks),
        ):
            for name, entry in entries.items():
                as_written = written_entries[name]
                if isinstance(as_written, Mapping):  # otherwise it is a reference to another entry
                    entry.options = redact.referred(as_written.get("options"), entry.options)
        for name, teacher in settings.teachers.items():
            as_written = unresolved["teachers"][name]
            if isinstance(as_written, Mapping):
                teacher.api_key = redact.referred(as_written.get("api_key"), teacher.api_key)
        check_finite(asdict(settings))
        check_settings(settings)
    return settings


INITIAL = "initial"
"""A teacher's path that means the student before training, frozen."""
EXAMPLES = {
    ScheduleConfig: "{key}=0.5 or '{key}={{kind: linear, value: 0, end: 1}}'",
    TeacherConfig: "{key}=PATH, {key}=initial (the start model) or '{key}={{path: PATH, weight: "
    "0.5}}'",
    RewardFunctionConfig: "{key}=FILE.py:FUNCTION or '{key}={{function: FILE.py:FUNCTION, weight: "
    "0.5}}'",
    SourceConfig: "{key}=FILE or '{key}={{path: FILE, heldout_path: FILE, weight: 2}}'",
    HeldOutSetConfig: "{key}=FILE or '{key}={{path: FILE, samples: 8}}'",
    SinkConfig: "{key}=FILE.py:CLASS or '{key}={{sink: FILE.py:CLASS, options: {{NAME: VALUE}}}}'",
}
"""How an entry of each type is written."""


def spelled_out(value: Any, hint: Any, key: str = "") -> Any:
    """Settings with short forms written in full.

    Short forms are a number for a constant schedule, the path of a teacher or `initial`, the path
    of a source of data or of a held-out set, the name of a reward function or of a sink, and one
    value for a list of one.

    Args:
        hint: the type of the setting `key` in the schema.

    Raises:
        ConfigError: a single value stands for a section, or for names and values; shows the right
            form.
    """
    if isinstance(value, str) and ("${" in value or value == MISSING):
        return value
    if get_origin(hint) is list:
        return [value] if isinstance(value, str | int | float) else value
    if hint is ScheduleConfig and isinstance(value, int | float) and not isinstance(value, bool):
        return {"value": value}
    if hint is TeacherConfig and isinstance(value, str):
        return {} if value == INITIAL else {"path": value}
    if hint is RewardFunctionConfig and isinstance(value, str):
        return {"function": value}
    if hint in (SourceConfig, HeldOutSetConfig) and isinstance(value, str):
        return {"path": value}
    if hint is SinkConfig and isinstance(value, str):
        return {"sink": value}
    entries = get_args(hint)[1] if get_origin(hint) is dict else None
    if not is_dataclass(hint) and entries is None:
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}={value}: {_right_form(hint, entries, key)}")
    hints = get_type_hints(hint) if entries is None else dict.fromkeys(value, entries)
    return {
        name: spelled_out(part, hints.get(name), f"{key}.{name}" if key else str(name))
        for name, part in value.items()
    }


def _right_form(hint: Any, entries: Any, key: str) -> str:
    """How to write a section, or names and values, for which a single value was given."""
    if hint in EXAMPLES:
        return f"cannot be read; write {EXAMPLES[hint].format(key=key)}"
    if entries in EXAMPLES:
        return f"has an entry for each name; write {EXAMPLES[entries].format(key=f'+{key}.NAME')}"
    if entries is not None:
        return f"holds names and values; write +{key}.NAME=VALUE or '{key}={{NAME: VALUE}}'"
    return f"a section, not a value; set {key}.NAME=..."


def check_finite(tree: Any, key: str = "") -> None:
    """Refuse a number that is NaN or infinite, which no setting can use.

    Raises:
        ConfigError: names the setting.
    """
    parts: Mapping[Any, Any] = tree if isinstance(tree, Mapping) else {}
    if isinstance(tree, list):
        parts = dict(enumerate(tree))
    for name, part in parts.items():
        check_finite(part, f"{key}.{name}" if key else str(name))
    if isinstance(tree, float) and not math.isfinite(tree):
        raise ConfigError(f"{key}={tree}: must be a finite number")


def check_secrets(tree: Any, key: str = "") -> None:
    """Refuse a secret that is written out instead of referred to by ${oc.env:NAME}.

    Raises:
        ConfigError: names the setting.
    """

    def check(value: Any, name: str) -> None:
        if isinstance(value, str) and "${" not in value and redact.has_password(value):
            raise ConfigError(
                f"{name}: a password must not be written into an address, where the shell's "
                "history and every list of processes keep it; set an environment variable NAME_URL "
                f"and write {name}='${{oc.env:NAME_URL}}'"
            )
        if redact.is_secret(value, name) and value != redact.MASK and "${" not in str(value):
            raise ConfigError(
                f"{name}: a secret must not be written out, where the shell's history and every "
                "list of processes keep it; set an environment variable NAME_TOKEN and write "
                f"{name}='${{oc.env:NAME_TOKEN}}'"
            )

    redact.rebuilt(tree, check, key)


def check_unmasked(settings: RunSettings) -> None:
    """Refuse a secret that was masked when these settings were written, as in a run's config.yaml.

    Raises:
        ConfigError: names the setting.
    """

    def check(value: Any, key: str) -> None:
        if value == redact.MASK or (isinstance(value, str) and f"://{redact.MASK}@" in value):
            raise ConfigError(
                f"{key}={value}: a secret was masked here when the settings were written; add "
                f"{key}='${{oc.env:NAME}}' to the command, with the variable that holds it"
            )

    redact.rebuilt(settings, check)


def check_flags(flags: Sequence[str]) -> None:
    """Refuse a setting, of hybridrl or another system, that is written as a flag, as --lr=1e-5.

    Raises:
        ConfigError: names the flag and the setting.
    """
    keys = known_keys()
    for flag in flags:
        name, equals, value = flag.lstrip("-").partition("=")
        key = name.replace("-", "_")
        if not flag.startswith("--"):
            continue
        if key in keys:
            raise ConfigError(
                f"{flag}: a setting is written without dashes: {key}={value if equals else '...'}"
            )
        if synonym_of(key) or any(own.endswith(f".{key}") for own in keys):
            raise ConfigError(f"{_no_such_setting(flag, key)}; a setting is written KEY=VALUE")


def check_overrides(overrides: Sequence[str]) -> None:
    """Check the command line for secrets, before Hydra writes the overrides of a sweep to disk.

    Raises:
        ConfigError: a secret is written out, or an override is not KEY=VALUE.
    """
    with one_sentence(overrides, of=(Exception,)):
        for override in parsed(overrides):
            if (choices := override.choices()) is not None:
                check_overrides(choices)
            elif not override.is_range:
                check_secrets(override.value(), override.key)


@contextmanager
def one_sentence(
    overrides: Sequence[str],
    of: tuple[type[Exception], ...] = (HydraException, OmegaConfBaseException),
) -> Iterator[None]:
    """Turn exceptions of Hydra and OmegaConf into a ConfigError of one sentence.

    Args:
        of: the types to catch; Exception where the body only reads settings, since for some input
            both libraries raise Python's own exceptions.
    """
    try:
        yield
    except ConfigError:
        raise
    except MissingMandatoryValue as error:
        key = error.full_key or "?"
        raise ConfigError(
            f"{key} is not set: it has no default; add {key}=... to the command"
        ) from error
    except of as error:
        sentence = _sentence(error, overrides)
        # Escape unprintable characters, e.g. a line break as \n.
        escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence)
        raise ConfigError(escaped) from error


def to_yaml(settings: RunSettings) -> str:
    """The resolved settings as YAML for run.dir/config.yaml, with secrets masked."""
    return OmegaConf.to_yaml(OmegaConf.create(_literal(redact.tree(_named(asdict(settings))))))


def jobs_of_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job of a sweep, in Hydra's order: the last override varies fastest.

    Raises:
        ConfigError: an override is not KEY=VALUE, or is an interval, which has no list of values.
    """
    with one_sentence(overrides):
        points = []
        for text, override in zip(overrides, parsed(overrides), strict=True):
            try:
                points.append(override.points())
            except ValueError as error:
                raise ConfigError(f"{text}: {error}; list them as KEY=A,B") from error
    return [list(job) for job in itertools.product(*points)]


def masked_yaml(text: str) -> str:
    """YAML as Hydra prints it, with secrets masked; references ${oc.env:NAME} remain."""
    try:
        printed = OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException):
        return redact.text(text)
    if not isinstance(printed, Mapping) or not printed:
        return redact.text(text)
    return OmegaConf.to_yaml(OmegaConf.create(redact.tree(printed, references=True)))


def from_yaml(text: str) -> RunSettings:
    """The inverse of to_yaml; nothing outside of the text is read.

    Raises:
        ConfigError: it is not YAML, holds no settings of this version, or refers to something
            outside of it.
    """
    saved_tree(text)
    with one_sentence((), of=(Exception,)):
        composed = OmegaConf.create(text)
        assert isinstance(composed, DictConfig), "saved_tree checks it"
        return to_settings(composed)


def saved_tree(text: str) -> dict[str, Any]:
    """The plain content of a saved config.yaml of any version, which may be untrusted.

    Raises:
        ConfigError: it is not a mapping in YAML; or it holds something that to_yaml never writes: a
            reference like ${oc.env:NAME}, which would read a secret of this machine, or a YAML
            alias, with which a few lines can fill the memory.
    """
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ConfigError(
                "holds a YAML alias (*NAME), which no run writes; write the value out"
            )
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"is not YAML: {str(error).splitlines()[0]}") from error
    except (ValueError, RecursionError) as error:  # a date or a number out of range, deep nesting
        raise ConfigError(f"is not YAML: {error}".splitlines()[0]) from error
    if not isinstance(tree, dict):
        raise ConfigError("is not a mapping of settings")
    _check_references(tree)
    return tree


def _check_references(tree: Any, key: str = "") -> None:
    """Raise ConfigError for a ${ that is not escaped, anywhere in the tree."""
    if isinstance(tree, Mapping):
        for name, part in tree.items():
            _check_references(part, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for part in tree:
            _check_references(part, key)
    elif isinstance(tree, str) and re.search(r"(?<!\\)(\\\\)*\$\{", tree):
        raise ConfigError(f"{key}: holds a reference ${{...}}, which no run writes")


def _named(tree: Any) -> Any:
    """The tree with enum members as their names, which OmegaConf reads."""
    if isinstance(tree, Mapping):
        return {key: _named(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_named(value) for value in tree]
    return tree.name if isinstance(tree, Enum) else tree


def _literal(tree: Any) -> Any:
    """The tree with every ${ escaped, so that it is not a reference when it is read."""
    if isinstance(tree, Mapping):
        return {key: _literal(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_literal(value) for value in tree]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", tree) if isinstance(tree, str) else tree


def known_keys(schema: type = RunSettings, prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    keys = []
    for name, hint in get_type_hints(schema).items():
        key = f"{prefix}{name}"
        keys.append(key)
        if isinstance(hint, type) and is_dataclass(hint):
            keys += known_keys(hint, f"{key}.")
    return keys


def _sentence(error: Exception, overrides: Sequence[str]) -> str:
    """One sentence from Hydra's several lines, with the nearest known key or choice."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    text = first_line(error)
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        override = _override_of(cause.full_key, overrides)
        if is_unknown_key(cause):
            return _no_such_setting(override, override.partition("=")[0])
        reason = str(cause).splitlines()[0]
        return f"{override}: {reason}"
    if adds_existing_key(error) and (
        repeated := next((o for o in overrides if o.startswith("+") and o[1:] in str(error)), None)
    ):
        key = repeated[1:].partition("=")[0]
        return f"{repeated}: there is a {key} already; write it without the +"
    if is_unknown_choice(error):
        for override in overrides:
            group, _, choice = override.lstrip("+").partition("=")
            folder = conf_dir() / group
            if folder.is_dir() and not (folder / f"{choice}.yaml").is_file():
                names = sorted(p.stem for p in folder.glob("*.yaml"))
                near = difflib.get_close_matches(choice, names, n=1)
                must = f"it must be one of {', '.join(names)}"
                remedy = f"did you mean {near[0]}?" if near else must
                return f"{group}={choice}: no such choice; {remedy}"
    if (bad := unparsed_override(error)) is not None:
        return f"{bad}: not KEY=VALUE as Hydra reads it{_how_to_quote(bad)}"
    if is_unquoted_list(error):
        bad = next((o for o in overrides if o in str(error)), text)
        key, _, values = bad.partition("=")
        return (
            f"{bad}: commas separate the values of a sweep (-m); write a list as "
            f"{key}=[{values}], text as {quoted(bad)}"
        )
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key and key in text and key not in known_keys():
            return _no_such_setting(override, key)
        if is_dataclass(get_type_hints(RunSettings).get(key)) and not (conf_dir() / key).is_dir():
            return f"{override}: a section, not a value; set {key}.NAME=..."
    return text


def _override_of(key: str, overrides: Sequence[str]) -> str:
    """The override that sets `key` or a part of it, without + or ~; the key itself if none does."""
    for override in overrides:
        text = override.lstrip("+~")
        if text.split("=")[0] == key or text.startswith(f"{key}."):
            return text
    return key


def _how_to_quote(override: str) -> str:
    """What to do with an override that Hydra cannot parse."""
    _, equals, value = override.partition("=")
    if not equals:
        return ""
    if re.match(r"\[|\{\s*[\w.]+\s*:", value):  # a list, or names and values
        forms = """'...{NAME: "TEXT"}' or '...["TEXT"]'"""
        return f"; quote the texts in it that have special characters: {forms}"
    return f"; write text with special characters as {quoted(override)}"


def quoted(override: str) -> str:
    """KEY=VALUE for a shell and Hydra, where VALUE is any text.

    VALUE is in Hydra's quotes inside of the shell's.

    Example: data.system_prompt=Be brief, please -> 'data.system_prompt="Be brief, please"'
    """
    key, _, value = override.partition("=")
    word = f"{key}={hydra_text(value)}"
    if "'" not in word:
        return f"'{word}'"
    return '"' + re.sub(r'([\\"$`])', r"\\\1", word) + '"'


def hydra_text(value: str) -> str:
    """Any text in Hydra's quotes, as the VALUE of an override."""
    # Hydra reads a backslash literally, except before a quote.
    inner = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + (m[2] and '\\"'), value)
    return f'"{inner}"'


def _no_such_setting(override: str, key: str) -> str:
    """The message for a key that does not exist.

    It says how to add the key where a user chooses the names, else names the nearest key.
    """
    keys = known_keys()
    for section, schema in {
        "teachers": TeacherConfig,
        "reward.functions": RewardFunctionConfig,
        "data.sources": SourceConfig,
        "eval.sets": HeldOutSetConfig,
        "tracking.sinks": SinkConfig,
    }.items():
        if key.startswith(f"{section}."):
            entry = ".".join(key.split(".")[: section.count(".") + 2])
            keys = [entry, *(f"{entry}.{f.name}" for f in fields(schema))]
    free_sections = (
        ".options.",
        ".chat_template_kwargs.",
        ".columns.",
        ".route.",
        ".engine.",
    )
    if key in keys or any(section in key for section in free_sections):
        return f"{override}: not in the config so far; write +{override} to add it"
    if (synonym := synonym_of(key)) is not None:
        if synonym.ours is None:
            return f"{override}: not supported: {synonym.note}"
        note = f" ({synonym.note})" if synonym.note else ""
        return f"{override}: no such setting; did you mean {synonym.ours}?{note}"
    last = key.rpartition(".")[2]
    same = [name for name in keys if name.rpartition(".")[2] == last]
    near = same if len(same) == 1 else difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    remedy = f"did you mean {near[0]}?" if near else "see hybridrl train --help"
    return f"{override}: no such setting; {remedy}"
