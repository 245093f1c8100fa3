"""A reward file is a Python module in its folder: it can import other files of the folder, and
processes that it starts can import it.
"""

import re
from pathlib import Path

import pytest

from hybridrl.core.errors import ConfigError
from hybridrl.rewards.check import loaded_rewards
from hybridrl.rewards.load import load_reward
from hybridrl.rewards.pool import Failure, Outcome, RewardCall, RewardPool
from hybridrl.settings.rewards import RewardConfig, RewardFunctionConfig

README = Path(__file__).parent.parent.parent / "hybridrl" / "rewards" / "README.md"


def scores(functions: dict[str, str], *completions: str) -> dict[str, list[Outcome]]:
    """The outcomes of each function on the completions."""
    calls = {name: RewardCall(function=path, options={}) for name, path in functions.items()}
    pool = RewardPool(calls, processes=1, timeout_s=30, max_timeouts=0.5)
    try:
        return {name: pool.call(name, {"completions": list(completions)}) for name in functions}
    finally:
        pool.close()


def test_the_function_of_the_readme_scores_with_a_column_of_the_data(tmp_path: Path) -> None:
    [code, *_] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "rewards.py").write_text(code)
    calls = {"own": RewardCall(function=f"{tmp_path}/rewards.py:score", options={})}
    pool = RewardPool(calls, processes=1, timeout_s=30, max_timeouts=0.5)
    try:
        columns = {"completions": [" 24", "25"], "answer": ["24", "24"], "level": [1, 2]}
        assert pool.call("own", columns) == [1.0, 0.0]
    finally:
        pool.close()


PARALLEL = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

def one(completion):
    return float(len(completion))

def pool(completions, start):
    with multiprocessing.get_context(start).Pool(2) as processes:
        return processes.map(one, completions)

def executor(completions, start):
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(start)) as processes:
        return list(processes.map(one, completions))
"""


@pytest.mark.parametrize(
    ("function", "start"),
    [("executor", "fork"), ("executor", "spawn"), ("executor", "forkserver"), ("pool", "spawn")],
)
def test_a_function_may_share_its_work_among_processes_of_its_own(
    tmp_path: Path, function: str, start: str
) -> None:
    (tmp_path / "parallel.py").write_text(PARALLEL)
    calls = {
        "r": RewardCall(function=f"{tmp_path}/parallel.py:{function}", options={"start": start})
    }
    pool = RewardPool(calls, processes=1, timeout_s=60, max_timeouts=0.5)
    try:
        assert pool.call("r", {"completions": ["a", "bb"]}) == [1.0, 2.0]
    finally:
        pool.close()


def test_a_file_imports_its_neighbours_at_loading_and_during_a_call(tmp_path: Path) -> None:
    (tmp_path / "words.py").write_text("LENGTH = 3\n")
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "__init__.py").write_text("LENGTH = 4\n")
    (tmp_path / "own.py").write_text(
        "import words\n"
        "def f(completions):\n"
        "    import later\n"
        "    return [words.LENGTH * later.LENGTH for _ in completions]\n"
    )
    assert scores({"r": f"{tmp_path}/own.py:f"}, "a") == {"r": [12.0]}


def test_a_file_runs_once_though_several_of_its_functions_are_used(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "runs = []\n"
        "def f(completions):\n    runs.append(1)\n    return [len(runs)] * len(completions)\n"
        "def g(completions):\n    return [10 + len(runs)] * len(completions)\n"
    )
    functions = {"f": f"{tmp_path}/own.py:f", "g": f"{tmp_path}/own.py:g"}
    assert scores(functions, "a") == {"f": [1.0], "g": [11.0]}


@pytest.mark.parametrize("name", ["math", "json", "hybridrl", "my-rewards", "rewards.v2"])
def test_a_file_may_have_another_modules_name_or_one_that_python_cannot_import(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / f"{name}.py").write_text(
        "import math, json\nfrom dataclasses import dataclass\n@dataclass\nclass Value:\n    "
        "value: float\ndef f(completions):\n    return [Value(math.floor(json.loads(c))).value "
        "for c in completions]\n"
    )
    assert scores({"r": f"{tmp_path}/{name}.py:f"}, "2.5") == {"r": [2.0]}


def test_two_files_of_one_name_in_different_folders_are_two_modules(tmp_path: Path) -> None:
    functions = {}
    for i, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text(f"def f(completions):\n    return [{i}]\n")
        functions[folder] = f"{tmp_path}/{folder}/own.py:f"
    assert scores(functions, "x") == {"a": [0.0], "b": [1.0]}


def test_neighbours_of_one_name_are_refused_where_a_file_would_import_the_wrong_one(
    tmp_path: Path,
) -> None:
    functions = {}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "words.py").write_text(f"NAME = {folder!r}\n")
        (tmp_path / folder / f"own_{folder}.py").write_text(
            "import words\ndef f(completions):\n    return [ord(words.NAME)]\n"
        )
        path = f"{tmp_path}/{folder}/own_{folder}.py:f"
        functions[folder] = RewardFunctionConfig(function=path)
    with (
        pytest.raises(
            ConfigError,
            match=r"reward\.functions\.b\.function=.*/b and .*/a both have words\.py, .*; rename "
            r"one",
        ),
        loaded_rewards(RewardConfig(functions=functions)),
    ):
        pass


ASYNC = """
import asyncio

async def one(completion):
    await asyncio.sleep(0)
    return float(len(completion))

async def together(completions):
    return await asyncio.gather(*(one(c) for c in completions))

class Client:
    loop = None
    async def __call__(self, completions):
        running = asyncio.get_running_loop()
        self.loop = self.loop or running
        return [float(self.loop is running)] * len(completions)

async def raises(completions):
    raise KeyError("no answer")
"""


def test_functions_may_be_async_and_share_an_event_loop_between_calls(tmp_path: Path) -> None:
    path = tmp_path / "waits.py"
    path.write_text(ASYNC)
    functions = {name: f"{path}:{name}" for name in ("together", "Client", "raises")}
    calls = {name: RewardCall(function=f, options={}) for name, f in functions.items()}
    pool = RewardPool(calls, processes=1, timeout_s=30, max_timeouts=0.5)
    try:
        assert pool.call("together", {"completions": ["a", "bb"]}) == [1.0, 2.0]
        assert pool.call("Client", {"completions": ["a"]}) == [1.0]
        assert pool.call("Client", {"completions": ["a"]}) == [1.0]
        (failure,) = pool.call("raises", {"completions": ["a"]})
        assert isinstance(failure, Failure) and failure.text == "KeyError: 'no answer'"
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "def f(completions, /): pass",
            r"its argument completions cannot be given by name; remove the /",
        ),
        ("class f: pass", r"an object of this class is called, but it has no __call__"),
        ("from builtins import dict as f", r"its arguments cannot be read"),
        ("raise SystemExit(3)", r"running .*own\.py raised SystemExit: 3; correct the file"),
        (
            "raise ValueError('\\x1b[2J\\nERROR forged' + 'y' * 10**8)",
            r"running .*own\.py raised ValueError: \\x1b\[2J\\nERROR forgedy+\.\.\. \(100000029 "
            r"characters\); correct",
        ),
        ("import nowhere", r"raised ModuleNotFoundError: No module named 'nowhere'; correct"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_short_sentence(
    tmp_path: Path, source: str, sentence: str
) -> None:
    (tmp_path / "own.py").write_text(source)
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_reward("r", f"{tmp_path}/own.py:f", {})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
