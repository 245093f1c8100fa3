"""Checks of the named held-out sets."""

import re

from hybridrl.core.errors import ConfigError
from hybridrl.settings.held_out import HELDOUT, HeldOutSetConfig
from hybridrl.settings.run import RunSettings

TAKEN = (HELDOUT, "train", "accuracy_teacher", "accuracy_source")
"""Words with which the uids of other prompts begin, or which the names of other metrics contain."""

GENERATED = ("countdown", "reasoning_gym")
"""The tasks whose problems are generated."""


def check_sets(settings: RunSettings) -> None:
    """Each held-out set has a usable name, one source, and something that measures it."""
    for name, held_out in settings.eval.sets.items():
        key = f"eval.sets.{name}"
        _check_name(name)
        _check_source(key, held_out)
        _check_sampling(key, held_out)
        _check_judge(key, held_out, settings)


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise ConfigError(
            f"eval.sets.{name}: the name of a set must be one word of letters, digits and _ that "
            "begins with a letter; it names metrics and files"
        )
    if name in TAKEN:
        raise ConfigError(
            f"eval.sets.{name}: {', '.join(TAKEN)} have another meaning; choose another name"
        )


def _check_source(key: str, held_out: HeldOutSetConfig) -> None:
    path = held_out.path
    task = held_out.task
    if path and task:
        raise ConfigError(
            f"{key}.path={path}: cannot be combined with {key}.task={task}, as a set has one "
            "source; leave one of them out"
        )
    if not (path or task):
        raise ConfigError(
            f"{key}: has no problems; give {key}.path, a file of rows, or {key}.task, "
            f"{' or '.join(GENERATED)}"
        )
    if task and task not in GENERATED:
        raise ConfigError(
            f"{key}.task={task}: must be {' or '.join(GENERATED)}; for rows give {key}.path"
        )
    if task == "reasoning_gym" and not held_out.dataset:
        raise ConfigError(
            f"{key}.task=reasoning_gym: needs {key}.dataset, the generator's name, e.g. chain_sum"
        )
    unread = {
        "columns": held_out.columns and not path,
        "revision": held_out.revision and not path,
        "dataset": held_out.dataset and task != "reasoning_gym",
        "options": held_out.options and not task,
    }
    for part in (part for part, is_unread in unread.items() if is_unread):
        source = f"path={path}" if path else f"task={task}"
        raise ConfigError(
            f"{key}.{part}={getattr(held_out, part)}: {key}.{source} does not read it; leave it out"
        )
    for name, row_key in held_out.columns.items():
        if not (row_key is None or (isinstance(row_key, str) and row_key)):
            raise ConfigError(
                f"{key}.columns.{name}={row_key!r}: must be the name of a key in the rows, or null "
                "to leave it out"
            )


def _check_sampling(key: str, held_out: HeldOutSetConfig) -> None:
    for part in ("num_problems", "samples"):
        value = getattr(held_out, part)
        if value < 1:
            raise ConfigError(f"{key}.{part}={value}: must be at least 1")
    temperature = held_out.temperature
    if temperature is not None and not temperature >= 0:
        raise ConfigError(
            f"{key}.temperature={temperature}: must not be negative; 0 always takes the most "
            "likely token"
        )
    if temperature == 0 and held_out.samples > 1:
        raise ConfigError(
            f"{key}.samples={held_out.samples}: at {key}.temperature=0 all responses to a prompt "
            "are equal; set samples=1, or raise the temperature"
        )


def _check_judge(key: str, held_out: HeldOutSetConfig, settings: RunSettings) -> None:
    functions = settings.reward.functions
    if held_out.reward is not None and held_out.reward not in functions:
        raise ConfigError(
            f"{key}.reward={held_out.reward}: there is no such function; reward.functions has "
            f"{', '.join(functions) or 'none'}"
        )
    if not functions and not settings.algorithm.data_fraction:
        raise ConfigError(
            f"{key}: nothing can be measured on it, because the run has no reward function and "
            "does not learn from data; add +reward.functions.NAME.function=..., or leave the set "
            "out"
        )
