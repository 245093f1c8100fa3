"""From conf/ and the command line to validated settings, or to one sentence that says what is wrong.

Nothing here or in config.py imports torch or ray, so a typo costs a second, not a cluster.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Sweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from hybridrl import redact
from hybridrl.config import RewardFunctionConfig, RunSettings, TeacherConfig
from hybridrl.errors import ConfigError

CONF_DIRS = (Path(__file__).parent / "conf", Path(__file__).parent.parent / "conf")


def conf_dir() -> Path:
    """The folder of YAML files: inside the wheel, or beside the package in a checkout."""
    for path in CONF_DIRS:
        if path.is_dir():
            return path
    raise ConfigError(f"no conf folder at {' or '.join(map(str, CONF_DIRS))}: reinstall hybridrl")


def register_schema() -> None:
    """Tell Hydra every key and default; conf/config.yaml names this first in its defaults.

    The node is a plain tree, so that +teachers.NAME.path=... can add an entry; types are checked by to_settings.
    """
    tree = OmegaConf.to_container(OmegaConf.structured(RunSettings), enum_to_str=True)
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
    return to_settings(composed, overrides)


def to_settings(composed: DictConfig, overrides: Sequence[str] = ()) -> RunSettings:
    """The typed settings of a composed config; `overrides` only make its errors clearer.

    Raises:
        ConfigError: as load_config.
    """
    with one_sentence(overrides, of=(Exception,)):
        check_secrets(OmegaConf.to_container(composed))
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunSettings), composed))
        assert isinstance(settings, RunSettings)
        written = OmegaConf.to_container(composed.reward.functions)
        for name, function in settings.reward.functions.items():
            if isinstance(written[name], Mapping):  # else it is a reference to another one
                function.options = redact.referred(written[name].get("options"), function.options)
        check_finite(asdict(settings))
    return settings


def check_finite(tree: Any, key: str = "") -> None:
    """Raise ConfigError for a number that is NaN or infinite: no setting means anything by it, and a deadline would be none."""
    parts = (
        tree.items()
        if isinstance(tree, Mapping)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for name, part in parts:
        check_finite(part, f"{key}.{name}" if key else str(name))
    if isinstance(tree, float) and not math.isfinite(tree):
        raise ConfigError(f"{key}={tree}: must be a finite number")


def check_secrets(tree: Any, key: str = "") -> None:
    """Raise ConfigError for a secret that is written out instead of referred to by ${oc.env:NAME}."""
    if isinstance(tree, Mapping):
        for name, part in tree.items():
            check_secrets(part, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for part in tree:
            check_secrets(part, key)
    elif redact.is_secret(tree, key) and tree != redact.MASK and "${" not in str(tree):
        raise ConfigError(
            f"{key}: a secret must not be written out, where the shell's history and every list of processes keep it; "
            f"set an environment variable NAME_TOKEN and write {key}='${{oc.env:NAME_TOKEN}}'"
        )


def check_overrides(overrides: Sequence[str]) -> None:
    """As check_secrets, of the command line alone: Hydra writes a sweep's overrides down before it composes anything.

    Raises:
        ConfigError: a secret is written out, or an override is none.
    """
    with one_sentence(overrides, of=(Exception,)):
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            value = override.value()
            if isinstance(value, ChoiceSweep):
                check_overrides(
                    [
                        f"{override.get_key_element()}={choice}"
                        for choice in override.sweep_string_iterator()
                    ]
                )
            elif not isinstance(value, Sweep):  # of numbers, or of files of conf/
                check_secrets(value, override.key_or_group)


@contextmanager
def one_sentence(
    overrides: Sequence[str],
    of: tuple[type[Exception], ...] = (HydraException, OmegaConfBaseException),
) -> Iterator[None]:
    """What Hydra or OmegaConf raises inside becomes a ConfigError of one sentence.

    Args:
        of: Exception, where nothing but settings is at work: for some input both let errors of Python's own through.
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
        told = _sentence(error, overrides)
        raise ConfigError(
            "".join(c if c.isprintable() else repr(c)[1:-1] for c in told)
        ) from error  # a line break as \n


def to_yaml(settings: RunSettings) -> str:
    """The resolved settings as YAML, as written to run.dir/config.yaml; secrets are masked."""
    return OmegaConf.to_yaml(OmegaConf.create(_literal(redact.tree(_named(asdict(settings))))))


def from_yaml(text: str) -> RunSettings:
    """The inverse of to_yaml. Nothing is looked up: what the text says is all that it can say.

    Raises:
        ConfigError: it is no YAML, or holds no settings of this version, or refers to something outside of it.
    """
    saved_tree(text)
    with one_sentence((), of=(Exception,)):
        return to_settings(OmegaConf.create(text))


def saved_tree(text: str) -> dict[str, Any]:
    """The plain content of a saved config.yaml, of this or another version; it may have been written by anybody.

    Raises:
        ConfigError: it is no mapping in YAML; or it holds what to_yaml never writes: a reference like ${oc.env:NAME}, which
            would bring a secret of this machine into the settings, or a YAML alias, with which a few lines fill the memory.
    """
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ConfigError(
                "holds a YAML alias (*NAME), which no run writes; write the value out"
            )
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"no YAML: {str(error).splitlines()[0]}") from error
    except (ValueError, RecursionError) as error:  # a date or a number out of range, deep nesting
        raise ConfigError(f"no YAML: {error}".splitlines()[0]) from error
    if not isinstance(tree, dict):
        raise ConfigError("no mapping of settings")
    _check_references(tree)
    return tree


def _check_references(tree: Any, key: str = "") -> None:
    """Raise ConfigError for a ${ that is not escaped, wherever it stands."""
    if isinstance(tree, Mapping):
        for name, part in tree.items():
            _check_references(part, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for part in tree:
            _check_references(part, key)
    elif isinstance(tree, str) and re.search(r"(?<!\\)(\\\\)*\$\{", tree):
        raise ConfigError(f"{key}: holds a reference ${{...}}, which no run writes")


def _named(tree: Any) -> Any:
    """Enum members by name, as OmegaConf reads them."""
    if isinstance(tree, Mapping):
        return {key: _named(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_named(value) for value in tree]
    return tree.name if isinstance(tree, Enum) else tree


def _literal(tree: Any) -> Any:
    """With the ${ of resolved text escaped, so that it is no reference when it is read again."""
    if isinstance(tree, Mapping):
        return {key: _literal(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_literal(value) for value in tree]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", tree) if isinstance(tree, str) else tree


def known_keys(schema: type = RunSettings, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, for did-you-mean."""
    keys = []
    for name, hint in get_type_hints(schema).items():
        key = f"{prefix}{name}"
        keys.append(key)
        nested = (
            hint
            if is_dataclass(hint)
            else next((a for a in get_args(hint) if is_dataclass(a)), None)
        )
        if nested is not None and is_dataclass(hint):
            keys += known_keys(nested, f"{key}.")
    return keys


def _sentence(error: Exception, overrides: Sequence[str]) -> str:
    """One sentence from Hydra's several lines, with the nearest known key or choice."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    text = next(iter(str(error).splitlines()), type(error).__name__)
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        key, near = cause.full_key, f"{cause.full_key}."
        given = next(
            (
                o.lstrip("+~")
                for o in overrides
                if o.lstrip("+~").split("=")[0] == key or o.lstrip("+~").startswith(near)
            ),
            key,
        )
        reason = str(cause).splitlines()[0]
        if isinstance(cause, ConfigKeyError) or "not in" in reason:
            return _no_such_setting(given, given.partition("=")[0])
        return f"{given}: {reason}"
    if "Could not append" in str(error) and (
        doubled := next((o for o in overrides if o.startswith("+") and o[1:] in str(error)), None)
    ):
        return (
            f"{doubled}: there is a {doubled[1:].partition('=')[0]} already; write it without the +"
        )
    if "Could not find" in text:
        for override in overrides:
            group, _, choice = override.lstrip("+").partition("=")
            folder = conf_dir() / group
            if folder.is_dir() and not (folder / f"{choice}.yaml").is_file():
                names = sorted(p.stem for p in folder.glob("*.yaml"))
                near = difflib.get_close_matches(choice, names, n=1)
                return f"{group}={choice}: no such choice; " + (
                    f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(names)}"
                )
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key and key in text and key not in known_keys():
            return _no_such_setting(override, key)
        if is_dataclass(get_type_hints(RunSettings).get(key)) and not (conf_dir() / key).is_dir():
            return f"{override}: a section, not a value; set {key}.NAME=..."
    bad = getattr(error, "override", None)
    return f"{bad}: not KEY=VALUE as Hydra reads it, {text}" if bad else text


def _no_such_setting(given: str, key: str) -> str:
    """For a key that does not exist: how to add it where names are free, else the nearest known one."""
    known = known_keys()
    for section, schema in {
        "teachers": TeacherConfig,
        "reward.functions": RewardFunctionConfig,
    }.items():
        if key.startswith(f"{section}."):
            entry = ".".join(key.split(".")[: section.count(".") + 2])
            known = [f"{entry}.{f.name}" for f in fields(schema)]
    if key in known or ".options." in key or key.startswith("data.columns."):
        return f"{given}: not in the config so far; write +{given} to add it"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"{given}: no such setting" + (
        f"; did you mean {near[0]}?" if near else "; see hybridrl train --help"
    )
