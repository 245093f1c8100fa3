"""A reward function passed from Python is replaced by the file that workers load, or is refused."""

import functools
import importlib
import operator
import subprocess
import sys
from pathlib import Path

import pytest

from hybridrl.api import reward_overrides
from hybridrl.core.errors import ConfigError
from hybridrl.rewards.callables import reward_files
from hybridrl.rewards.countdown import countdown
from hybridrl.settings.settings_file import load_settings

MODULE = """
def score(completions):
    return [1.0] * len(completions)

class Checker:
    def __call__(self, completions):
        return [0.0] * len(completions)

    def method(self, completions):
        return [0.0] * len(completions)

def made():
    def inner(completions):
        return [0.0] * len(completions)
    return inner

checker = Checker()
nameless = lambda completions: [0.0] * len(completions)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file rewards_of_a_test.py in a folder whose name Hydra must quote."""
    folder = tmp_path / "it's, (mine)"
    folder.mkdir()
    (folder / "rewards_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("rewards_of_a_test")
    del sys.modules["rewards_of_a_test"]


def test_a_function_or_class_becomes_its_file_and_its_name_and_a_built_in_its_word(module) -> None:
    assert reward_files({"a": module.score, "b": module.Checker, "c": countdown}) == {
        "a": f"{module.__file__}:score",
        "b": f"{module.__file__}:Checker",
        "c": "countdown",
    }


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda m: m.nameless, r"is a lambda, which workers cannot load; write it in a separate"),
        (lambda m: m.made(), r"has no made\.<locals>\.inner at its top level .* define it there"),
        (lambda m: m.Checker.method, r"has no Checker\.method at its top level"),
        (lambda m: m.checker, r"not an object of Checker; give the function or class itself"),
        (lambda m: m.checker.method, r"not an object of method; give the function"),
        (lambda m: functools.partial(m.score), r"not an object of partial; .* its arguments as"),
        (lambda m: operator.add, r"not an object of builtin_function_or_method"),
        (lambda m: "rewards.py:score", r"not text; write \+reward\.functions\.mine=rewards\.py:"),
    ],
)
def test_what_workers_cannot_load_from_a_file_is_refused(module, function, sentence) -> None:
    with pytest.raises(ConfigError, match=rf"^rewards\['mine'\].*{sentence}"):
        reward_files({"mine": function(module)})


def test_a_function_that_the_module_has_replaced_since_it_was_imported_is_refused(module) -> None:
    old = module.score
    importlib.reload(module)
    with pytest.raises(ConfigError, match="import the module again if its file has changed"):
        reward_files({"mine": old})


def test_a_function_of_a_notebook_or_a_script_is_refused_with_the_remedy() -> None:
    code = (
        "import hybridrl\ndef score(completions): return [0.0]\n"
        "hybridrl.train(['experiment=quickstart', 'run.dir=x'], rewards={'mine': score})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "hybridrl.core.errors.ConfigError: rewards['mine']: score is defined in a notebook or in "
        "the script that runs, from which workers cannot load it; write it in a separate file, "
        "in a notebook by a cell that begins with `%%writefile my_rewards.py`, then import "
        "my_rewards"
    )


def test_the_function_is_a_setting_of_the_run_whatever_characters_its_path_has(module) -> None:
    overrides = [
        "experiment=quickstart",
        "run.dir=x",
        "+reward.functions.mine.weight=0.5",
        *reward_overrides({"mine": module.score}),
    ]
    mine = load_settings(overrides).reward.functions["mine"]
    assert (mine.function, mine.weight) == (f"{module.__file__}:score", 0.5)


def test_a_function_replaces_that_of_a_setting_with_the_same_name(module) -> None:
    overrides = ["experiment=quickstart", "run.dir=x"]
    before = load_settings(overrides).reward.functions
    after = load_settings([*overrides, *reward_overrides({"countdown": module.score})])
    assert before["countdown"].function == "countdown"
    assert after.reward.functions["countdown"].function == f"{module.__file__}:score"
