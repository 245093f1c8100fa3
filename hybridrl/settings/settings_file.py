"""A YAML file of settings as the base of a run.

It is a user's own (`train --config FILE`), or the config.yaml of an earlier run. Hydra composes it
like a file of conf/experiment, so overrides of the command line take precedence over it.
"""

import difflib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hybridrl.core.errors import ConfigError
from hybridrl.core.files import read_text
from hybridrl.settings.compose import conf_dir, load_config, one_sentence, saved_tree
from hybridrl.settings.hydra_internals import parsed
from hybridrl.settings.run import RunSettings

GROUPS = ("experiment", "algorithm", "schedule")
"""The folders of conf/. A file chooses one of their files by name, e.g. `algorithm: grpo`."""

NAME = "settings-file"
"""The name under which Hydra finds the file among the experiments."""


def load_settings(overrides: Sequence[str], file: Path | None = None) -> RunSettings:
    """The settings of a command.

    The overrides take precedence over the user's file; without a file, over the settings of the run
    that the command continues; and in a new run, over those of conf/.

    Args:
        overrides: KEY=VALUE, as on the command line.
        file: a YAML file of the user's settings; None: there is none.

    Raises:
        ConfigError: one sentence about the first setting that is wrong.
        RunDirectoryError, OSError: as saved_config, of a run that is continued.
    """
    with ExitStack() as stack:
        base: list[str] = []
        if file is not None:
            base = stack.enter_context(own_file(file.expanduser()))
        elif (saved := continued_run(overrides)) is not None:
            base = stack.enter_context(saved_config(saved))
            overrides = [forced(override) for override in overrides]
        return load_config([*base, *overrides])


@contextmanager
def own_file(path: Path) -> Iterator[list[str]]:
    """The Hydra overrides that make a user's file the base of the settings, inside of the context.

    The file is a mapping of settings, as the command line names them but nested. A key of GROUPS
    with a name as its value selects that file of conf/. A file with a `defaults` list of its own is
    passed to Hydra unchanged.

    Example: a file of these three lines trains the quickstart with another method and learning
    rate.

        experiment: quickstart
        algorithm: grpo
        train: {lr: 2.0e-4}

    Raises:
        ConfigError: the file cannot be read, is not a mapping, or selects a file of conf/ that does
            not exist.
    """
    tree = read_mapping(path)
    if "defaults" not in tree:
        selected = {key for key in GROUPS if isinstance(tree.get(key), str | None)}
        settings = {key: part for key, part in tree.items() if key not in selected}
        tree = {"defaults": defaults_of(tree, path)} | settings
    with _searched(tree) as overrides:
        yield overrides


@contextmanager
def saved_config(path: Path) -> Iterator[list[str]]:
    """The Hydra overrides that make a run's config.yaml the base of the settings.

    They are valid inside of the context. The file may have come from elsewhere with its run
    directory, so it is treated as data: it cannot read an environment variable or configure Hydra.

    Raises:
        ConfigError: the file holds something that a run does not write.
        RunDirectoryError: it is a link or a special file.
        OSError: it cannot be read.
    """
    try:
        tree = saved_tree(read_text(path) or "")
    except ConfigError as error:
        raise ConfigError(
            f"{path}: {error}; do not trust this file, or name the settings yourself"
        ) from error
    if unknown := sorted(tree.keys() - {f.name for f in fields(RunSettings)}):
        raise ConfigError(
            f"{path}: {unknown[0]} is not a setting of this version of hybridrl; name the "
            "settings yourself, e.g. experiment=quickstart"
        )
    with _searched(tree) as overrides:
        # The presets in conf/config.yaml would add entries that the run did not have.
        yield ["~algorithm", "~schedule", *overrides]


@contextmanager
def _searched(tree: Mapping[str, Any]) -> Iterator[list[str]]:
    """A folder on Hydra's search path with the tree as its only experiment."""
    with tempfile.TemporaryDirectory(prefix="hybridrl-settings-") as folder:
        file = Path(folder) / "experiment" / f"{NAME}.yaml"
        file.parent.mkdir()
        text = OmegaConf.to_yaml(OmegaConf.create(dict(tree)))
        file.write_text(f"# @package _global_\n{text}", encoding="utf-8")
        yield [f"hydra.searchpath=['file://{folder}']", f"experiment={NAME}"]


def read_mapping(path: Path) -> dict[str, Any]:
    """The file's settings with unresolved references.

    Raises:
        ConfigError: it cannot be read, or is not a YAML mapping.
    """
    try:
        tree = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); name an existing file of settings"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deeply; write fewer levels") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path}: is not a YAML file of settings: {first}") from error
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(
            f"{path}: must be a mapping of settings, e.g. 'train: {{lr: 1.0e-3}}'; write names and "
            "values"
        )
    return {str(key): part for key, part in tree.items()}


def defaults_of(tree: Mapping[str, Any], path: Path) -> list[Any]:
    """Hydra's defaults list for the groups that a file selects by name.

    Raises:
        ConfigError: a group has no file of that name.
    """
    defaults: list[Any] = []
    for group in GROUPS:
        choice = tree.get(group)
        if not isinstance(choice, str):
            continue
        names = sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))
        if choice not in names:
            near = difflib.get_close_matches(choice, names, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(names)}"
            raise ConfigError(f"{path}: {group}: {choice}: no such choice; {remedy}")
        defaults.append(choice if group == "experiment" else {f"override /{group}": choice})
    return [*defaults, "_self_"]


def continued_run(overrides: Sequence[str]) -> Path | None:
    """The config.yaml of the run that a command continues; None where it names settings itself.

    A command continues a run where run.dir holds one and no override selects a file of conf/.

    Raises:
        ConfigError: an override is not KEY=VALUE.
    """
    with one_sentence(overrides):
        given = parsed(overrides)
    if any(override.key in GROUPS for override in given):
        return None
    run_dirs = [
        override.value()
        for override in given
        if override.key == "run.dir" and not override.is_sweep
    ]
    run_dir = _resolved(run_dirs[-1]) if run_dirs else None
    if not run_dir:
        return None
    path = Path(run_dir).expanduser() / "config.yaml"
    return path if path.is_file() else None


def _resolved(value: Any) -> str | None:
    """A value of the command line as text, e.g. "7" for run.dir=7; None: it is null, or refers to
    something that does not exist here.
    """
    try:
        text = OmegaConf.create({"value": value})["value"]
    except OmegaConfBaseException:
        return None
    return None if text is None else str(text)


def forced(override: str) -> str:
    """+KEY=VALUE as ++KEY=VALUE, which may replace a value: the settings of a continued run already
    have the keys that its first command added.
    """
    return re.sub(r"^\+(?=[^+])", "++", override)
