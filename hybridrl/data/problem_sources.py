"""Loads the problems of a run: those of its single source, or of each of data.sources."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import chain, zip_longest

from hybridrl.core.errors import ConfigError, DataError
from hybridrl.data import countdown_puzzles as countdown
from hybridrl.data import reasoning_gym_tasks, records
from hybridrl.data.problem import SOURCE, Problem
from hybridrl.settings.run import DataConfig
from hybridrl.settings.sources import GENERATORS, ProblemsConfig

log = logging.getLogger(__name__)


def load_problems(config: DataConfig, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems; the held-out ones are the same for every seed.

    With data.sources the uids begin with the name of the source, e.g. "math/train-000003". Training
    problems are in the order of the sources; of the held-out ones, the first of each source precede
    the second of each, and so on.

    Raises:
        ConfigError: a setting that the generator refuses.
        DataError: a file or row that cannot be used.
    """
    if not config.sources:
        alone = load_source(config, seed, config.num_train, config.num_heldout)
        warn_of_shared(
            *alone,
            trained_on=("data.path", config.path),
            held_out=("data.heldout_path", config.heldout_path),
        )
        return alone
    train: list[Problem] = []
    heldout: list[list[Problem]] = []
    loaded: dict[str, tuple[list[Problem], list[Problem]]] = {}
    for name, source in config.sources.items():
        with named_setting(f"data.sources.{name}"):
            own = load_source(source, seed, config.num_train, config.num_heldout)
        loaded[name] = own
        train += [of_source(name, problem) for problem in own[0]]
        heldout.append([of_source(name, problem) for problem in own[1]])
    for name, (_, own_heldout) in loaded.items():
        for other, (trained, _) in loaded.items():
            source = config.sources[name]
            trained_source = config.sources[other]
            warn_of_shared(
                trained,
                own_heldout,
                trained_on=(f"data.sources.{other}.path", trained_source.path),
                held_out=(f"data.sources.{name}.heldout_path", source.heldout_path),
            )
    in_turn = chain.from_iterable(zip_longest(*heldout))
    return train, [problem for problem in in_turn if problem is not None]


def load_source(
    source: ProblemsConfig, seed: int, num_train: int, num_heldout: int
) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems of one source, as load_problems.

    Args:
        num_train: number of training problems of a generator, 0: none. All rows are always read.
        num_heldout: largest number of held-out problems.

    Raises:
        ConfigError, DataError: as load_problems, about the settings of `data`.
    """
    if source.task in GENERATORS:
        train, heldout = _generated(source, seed, num_train, num_heldout)
        if 2 * len(train) < num_train:  # some repeated questions are usual
            log.warning(
                "data.num_train=%d: %s gave only %d different problems, over which an epoch "
                "passes; widen its options for more",
                num_train,
                source.dataset or source.task,
                len(train),
            )
        return train, heldout
    assert source.path is not None, "the settings check it"
    heldout = []
    if source.heldout_path is not None:
        heldout = records.load(source.heldout_path, "heldout", source.revision, source.columns)
        heldout = heldout[:num_heldout]
    return records.load(source.path, "train", source.revision, source.columns), heldout


def _generated(
    source: ProblemsConfig, seed: int, num_train: int, num_heldout: int
) -> tuple[list[Problem], list[Problem]]:
    if source.task == "countdown":
        return countdown.load(source.options, num_train, num_heldout, seed)
    assert source.dataset is not None, "the settings check it"
    return reasoning_gym_tasks.load(source.dataset, source.options, num_train, num_heldout, seed)


def of_source(name: str, problem: Problem) -> Problem:
    """The problem with the name of its source in its uid and in the column SOURCE."""
    columns = dict(problem.columns)
    if columns.get(SOURCE) is None:
        columns[SOURCE] = name
    return replace(problem, uid=f"{name}/{problem.uid}", columns=columns)


@contextmanager
def named_setting(key: str) -> Iterator[None]:
    """In errors of the `with` block about settings of `data`, name the section `key` instead.

    Example: with named_setting("data.sources.sums"), "data.options={}: ..." becomes
    "data.sources.sums.options={}: ...".
    """
    names = "|".join(field.name for field in fields(ProblemsConfig))
    try:
        yield
    except (ConfigError, DataError) as error:
        text = re.sub(rf"(?<![\w./])data\.({names})\b", rf"{key}.\1", str(error))
        raise type(error)(text) from error


def warn_of_shared(
    train: Sequence[Problem],
    heldout: Sequence[Problem],
    *,
    trained_on: tuple[str, str | None],
    held_out: tuple[str, str | None],
) -> None:
    """Log how many held-out prompts are training prompts too.

    Args:
        trained_on, held_out: the setting that names the rows, and its value.
    """

    def key(problem: Problem) -> str:
        return json.dumps(problem.prompt, sort_keys=True)

    train_keys = {key(problem) for problem in train}
    shared = [problem for problem in heldout if key(problem) in train_keys]
    if shared:
        log.warning(
            "%s=%s: %d of %d held-out prompts are in %s=%s too, %s the first; "
            "accuracy on them does not show what is learned beyond the training data: hold out "
            "other rows",
            *held_out,
            len(shared),
            len(heldout),
            *trained_on,
            shared[0].row,
        )
