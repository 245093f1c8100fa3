"""Problems of the reasoning_gym library, which a child process draws."""

import json
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import reasoning_gym

from hybridrl.core.errors import ConfigError
from hybridrl.data import reasoning_gym_tasks
from hybridrl.data.problem_sources import load_problems
from hybridrl.settings.run import DataConfig


def small(dataset: str, **options: object) -> DataConfig:
    return DataConfig(
        num_train=200, num_heldout=50, task="reasoning_gym", dataset=dataset, options=options
    )


def test_reasoning_gym_problems_carry_the_input_of_the_scorer() -> None:
    config = small("chain_sum", max_terms=3)
    train, heldout = load_problems(config, seed=0)
    assert not {p.prompt for p in train} & {p.prompt for p in heldout}
    assert load_problems(config, seed=1)[1] == heldout and load_problems(config, seed=1)[0] != train
    columns = train[0].columns
    scorer = reasoning_gym.get_score_answer_fn(columns["reasoning_gym_dataset"])
    assert scorer(columns["answer"], columns["reasoning_gym_entry"]) == 1.0
    assert json.dumps(columns)
    with pytest.raises(ConfigError, match=r"data\.dataset=chain_summ"):
        load_problems(small("chain_summ"), seed=0)


@pytest.mark.parametrize(
    "dataset",
    [
        "isomorphic_strings",  # draws from a list of the letters in a set
        "list_functions",  # draws from the global random generator
    ],
)
def test_a_seed_names_the_same_reasoning_gym_problems_in_every_process(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the working directory that has the name of a module of Python is not imported."""
    (tmp_path / "timeit.py").write_text("raise AssertionError\n")
    monkeypatch.chdir(tmp_path)
    config = small(dataset)
    assert load_problems(config, seed=3) == load_problems(config, seed=3)
    assert load_problems(config, seed=4)[1] == load_problems(config, seed=3)[1]


def test_reasoning_gym_entries_come_from_the_child_process_as_the_library_gives_them() -> None:
    """The scorer of rearc gives 1.0 to the right answer only if the grid in the entry is a tuple
    of tuples.
    """
    _, heldout = load_problems(small("rearc"), seed=0)
    entries = [p.columns["reasoning_gym_entry"] for p in heldout]
    size, seed = len(entries), reasoning_gym_tasks.HELDOUT_SEED
    assert entries == list(reasoning_gym.create_dataset("rearc", size=size, seed=seed))
    scorer = reasoning_gym.get_score_answer_fn("rearc")
    assert [scorer(entry["answer"], entry) for entry in entries] == [1.0] * size


def test_the_types_in_a_reasoning_gym_entry_are_kept_as_json() -> None:
    entry = {"metadata": {(1, 2): [None, Fraction(3, 4)], 5: {}, "grid": ((1.5,), ())}}
    text = json.dumps(reasoning_gym_tasks.marked(entry))
    assert json.loads(text, object_hook=reasoning_gym_tasks.restored) == entry


def test_drawing_that_takes_too_long_or_ends_its_process_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = small("chain_sum")
    with monkeypatch.context() as patch:
        patch.setattr(reasoning_gym_tasks, "DRAW_S", 0.0)
        with pytest.raises(ConfigError, match=r"chain_sum, .*: drawing 250 problems takes more th"):
            load_problems(config, seed=0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match=r"ended its process \(exit code 1\); lower data\.num_t"):
        load_problems(config, seed=0)
