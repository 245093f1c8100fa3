"""Problems from a generator of the reasoning-gym library, e.g. chain_sum."""

import random
from typing import Any

import reasoning_gym

from hybridrl.core.errors import ConfigError
from hybridrl.data.problem import Problem

HELDOUT_SEED = 20_240_229


def load(
    dataset: str, options: dict[str, Any], num_train: int, num_heldout: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """Training problems drawn with `seed`, and fixed held-out problems; all questions differ.

    With num_train=0 there are no training problems. The columns are reasoning_gym_dataset,
    reasoning_gym_entry (the input of the library's scorer) and answer.

    Raises:
        ConfigError: the library lacks the dataset or an option, or no training question differs
            from the held-out ones.
    """
    heldout = _draw(dataset, options, num_heldout, HELDOUT_SEED, "heldout", frozenset())
    if not num_train:
        return [], heldout
    questions = frozenset(p.columns["reasoning_gym_entry"]["question"] for p in heldout)
    # The library seeds entry i with seed + i, so the seeds of consecutive runs must be far apart.
    train_seed = random.Random(f"reasoning_gym train {seed}").getrandbits(30)
    train = _draw(dataset, options, num_train, train_seed, "train", questions)
    if not train:
        raise ConfigError(
            f"data.num_train={num_train}: {dataset} gave no question beside the held-out ones; "
            "widen data.options"
        )
    return train, heldout


def _draw(
    dataset: str, options: dict[str, Any], num: int, seed: int, split: str, without: frozenset[str]
) -> list[Problem]:
    try:
        entries = list(reasoning_gym.create_dataset(dataset, size=num, seed=seed, **options))
    except Exception as error:  # generators raise various exceptions for wrong options
        raise ConfigError(
            f"data.dataset={dataset}, data.options={options}: reasoning_gym refuses them: {error}"
        ) from error
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
