"""Problems from a generator of the reasoning-gym library, e.g. chain_sum.

Some of the library's generators depend on the hashes of strings, which Python randomizes in each
process, or draw from the global random generator. So that a seed names the same problems in every
process, a child process (`python -m hybridrl.data.reasoning_gym_tasks`) with fixed hashes, which
seeds that generator too, draws them.
"""

import json
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from fractions import Fraction
from typing import Any

from hybridrl.core.child_module import ChildFailed, answer_of
from hybridrl.core.errors import ConfigError
from hybridrl.data.problem import Problem

HELDOUT_SEED = 20_240_229

DRAW_S = 3600.0
"""Time limit of the child process. Most generators draw 100000 problems in less than a minute."""


def load(
    dataset: str, options: dict[str, Any], num_train: int, num_heldout: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """Training problems drawn with `seed`, and fixed held-out problems; all questions differ.

    A question that is drawn again is left out, so there may be fewer of either. With num_train=0
    there are no training problems. The columns are reasoning_gym_dataset, reasoning_gym_entry (the
    input of the library's scorer) and answer.

    Raises:
        ConfigError: the library lacks the dataset or an option, no training question differs from
            the held-out ones, or drawing takes too long or ends its process.
    """
    draws = [(num_heldout, HELDOUT_SEED)]
    if num_train:
        # The library seeds entry i with seed + i, so the seeds of consecutive runs must be far
        # apart.
        draws.append((num_train, random.Random(f"reasoning_gym train {seed}").getrandbits(30)))
    drawn = _drawn(dataset, options, draws)
    heldout = _problems(dataset, drawn[0], "heldout", frozenset())
    if not num_train:
        return [], heldout
    questions = frozenset(p.columns["reasoning_gym_entry"]["question"] for p in heldout)
    train = _problems(dataset, drawn[1], "train", questions)
    if not train:
        raise ConfigError(
            f"data.num_train={num_train}: {dataset} gave no question beside the held-out ones; "
            "widen data.options"
        )
    return train, heldout


def _problems(
    dataset: str, entries: Sequence[dict[str, Any]], split: str, without: frozenset[str]
) -> list[Problem]:
    seen = set(without)
    problems = []
    for i, entry in enumerate(entries):
        if entry["question"] in seen:
            continue
        seen.add(entry["question"])
        columns = {
            "reasoning_gym_dataset": dataset,
            "reasoning_gym_entry": entry,
            "answer": entry["answer"],
        }
        row = f"reasoning_gym {dataset} {split} entry {i}"
        problems.append(
            Problem(uid=f"{split}-{i:06d}", prompt=entry["question"], columns=columns, row=row)
        )
    return problems


def _drawn(
    dataset: str, options: Mapping[str, Any], draws: Sequence[tuple[int, int]]
) -> list[list[dict[str, Any]]]:
    """The library's entries of each draw, from a child process.

    Args:
        draws: the number of entries and the seed of each.

    Raises:
        ConfigError: as load.
    """
    given = {"dataset": dataset, "options": dict(options), "draws": draws}
    field = f"data.dataset={dataset}, data.options={options}"
    total = sum(num for num, _ in draws)
    remedy = "lower data.num_train or change data.options"
    try:
        text = answer_of(
            "hybridrl.data.reasoning_gym_tasks",
            given,
            timeout_s=DRAW_S,
            variables={"PYTHONHASHSEED": "0"},
        )
    except TimeoutError as error:
        raise ConfigError(
            f"{field}: drawing {total} problems takes more than {DRAW_S:g} s; {remedy}"
        ) from error
    except ChildFailed as error:
        raise ConfigError(
            f"{field}: drawing {total} problems ended its process ({error}); {remedy}"
        ) from error
    answer = json.loads(text, object_hook=restored)
    if isinstance(answer, str):
        raise ConfigError(f"{field}: reasoning_gym refuses them: {answer}")
    return answer


def restored(marked: dict[str, list[Any]]) -> Any:
    """The inverse of marked for one object of JSON."""
    [(kind, values)] = marked.items()
    if kind == "fraction":
        return Fraction(*values)
    return tuple(values) if kind == "tuple" else dict(values)


# -- in the child process --------------------------------------------------------------------------


def _draw(
    dataset: str, options: Mapping[str, Any], draws: Sequence[tuple[int, int]]
) -> list[list[dict[str, Any]]] | str:
    """The library's entries of each draw, or why it refuses the dataset or the options."""
    import reasoning_gym  # takes seconds

    entries = []
    try:
        for num, seed in draws:
            random.seed(seed)
            entries.append(
                list(reasoning_gym.create_dataset(dataset, size=num, seed=seed, **options))
            )
    except Exception as error:  # generators raise various exceptions for wrong options
        return str(error)
    return entries


def marked(value: Any) -> Any:
    """`value` with tuples, dicts and fractions in a form in which JSON keeps their types and those
    of the keys, since some scorers distinguish (1, 2) from [1, 2].

    Example: marked({1: (2, 3)}) == {"dict": [[1, {"tuple": [2, 3]}]]}.
    """
    if isinstance(value, dict):
        return {"dict": [[marked(key), marked(entry)] for key, entry in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [marked(entry) for entry in value]}
    if isinstance(value, Fraction):
        return {"fraction": [value.numerator, value.denominator]}
    if isinstance(value, list):
        return [marked(entry) for entry in value]
    return value


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        answer = _draw(**json.load(sys.stdin))
    print(json.dumps(marked(answer)))
