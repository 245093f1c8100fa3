"""Reward functions, the pool that runs them, and the worker that combines their outcomes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridrl.core.errors import ConfigError, RewardError
from hybridrl.launch.preparation import preflight
from hybridrl.rewards.check import loaded_rewards
from hybridrl.rewards.countdown import countdown
from hybridrl.rewards.load import load_reward
from hybridrl.rewards.maths import math
from hybridrl.rewards.pool import Failure, FailureKind, Outcome, RewardCall, RewardPool
from hybridrl.rewards.worker import RewardWorker
from hybridrl.settings.choices import OnError
from hybridrl.settings.compose import load_config
from hybridrl.settings.rewards import RewardConfig, RewardFunctionConfig
from hybridrl.types import RolloutBatch
from tests.support.batches import text_batch

# A reward file with every kind of misbehaviour, which only the completion "x" triggers.
USER_FILE = """
import ctypes, multiprocessing, os, re, resource, signal, subprocess, sys, time

def length(completions, prompts, **columns):
    return [float(len(c)) for c in completions]

def scaled(completions, factor=1.0):
    return [factor * len(c) for c in completions]

def last_id(completion_ids, target):
    return [ids[-1] + t for ids, t in zip(completion_ids, target)]

def num_prompt_tokens(prompt_ids):
    return [float(len(ids)) for ids in prompt_ids]

def hangs(completions):
    for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    while "x" in completions:
        time.sleep(1000)
    return [1.0] * len(completions)

def loops(completions):
    while "x" in completions:
        pass
    return [1.0] * len(completions)

def backtracks(completions):
    if "x" in completions:
        re.match(r"(a+)+$", "a" * 60 + "b")
    return [1.0] * len(completions)

def starts_others(completions, note):
    subprocess.Popen(["sleep", "1000"])
    subprocess.Popen(["sh", "-c", "sleep 1000 & wait"])
    forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
    forked.start()
    with open(note[0], "w") as file:
        file.write(str(os.getsid(0)))
    re.match(r"(a+)+$", "a" * 60 + "b")

def core_limits(completions):
    hard_limit = resource.getrlimit(resource.RLIMIT_CORE)[1]
    return [float(hard_limit) for _ in completions]

def crashes(completions):
    if "x" in completions:
        ctypes.string_at(0)
    return [1.0] * len(completions)

class OwnError(Exception):
    def __init__(self, a, b):
        super().__init__(a)

def raises(completions):
    if "x" in completions:
        raise OwnError("no verdict", 1)
    return [1.0] * len(completions)

def exits(completions):
    if "x" in completions:
        sys.exit(3)
    return [1.0] * len(completions)

def odd(completions):
    values = {"nan": float("nan"), "inf": float("inf"), "none": None, "str": "1", "huge": 1e300}
    return [values.get(c, True) for c in completions]

def short(completions):
    return [1.0] * (len(completions) - ("x" in completions))

def no_list(completions):
    return 1.0

def secrets(completions):
    return [float(sum(name in os.environ for name in c.split())) for c in completions]

def heavy_imports(completions):
    heavy = ("torch", "transformers", "ray", "hydra", "pytest")
    return [float(sum(name in sys.modules for name in heavy)) for _ in completions]

def pid(completions):
    return [os.getpid() for _ in completions]

class Built:
    def __init__(self, base):
        self.base = base
        self.calls = 0

    def __call__(self, completions, base=None):
        self.calls += 1
        return [self.base + 10 * self.calls + (base is not None)] * len(completions)

not_callable = 3
"""


@pytest.fixture(scope="module")
def user_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user") / "rewards.py"
    path.write_text(USER_FILE)
    return path


@pytest.fixture(scope="module")
def pool(user_file: Path) -> Iterator[RewardPool]:
    variables = dict.fromkeys(("SOME_API_KEY", "hf_token", "PLAIN_SETTING"), "1")
    os.environ.update(variables)
    names = [
        line.split("(")[0].removeprefix("def ")
        for line in USER_FILE.splitlines()
        if line.startswith("def ")
    ]
    calls = {name: RewardCall(function=f"{user_file}:{name}", options={}) for name in names}
    pool = RewardPool(calls, processes=1, timeout_s=2.0, max_timeouts=0.5)
    yield pool
    pool.close()
    for name in variables:
        del os.environ[name]


def kinds(outcomes: list[Outcome]) -> list[float | str | None]:
    return [o.kind.value if isinstance(o, Failure) else o for o in outcomes]


# -- countdown -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("3*9-7", 1.0),
        (" 3 * 9 - 7\n", 1.0),
        ("((9)*3)-7", 1.0),
        ("I think <answer>3*9-7</answer> it is", 1.0),
        ("3*9+7", 0.0),  # wrong value
        ("20", 0.0),  # no given number
        ("9+9+9-7", 0.0),  # 9 three times, 3 never
        ("3*9-7+3-3", 0.0),  # 3 three times
        ("27-7", 0.0),
        ("3*9-", 0.0),
        ("(3*9-7", 0.0),
        ("3*9-7)", 0.0),
        ("3*9-7=20", 0.0),
        ("3 9-7", 0.0),
        ("-7+3*9", 0.0),  # no sign
        ("3*9-7.0", 0.0),
        ("\u0663*9-7", 0.0),  # an Arabic 3
        ("", 0.0),
        ("__import__('os').abort()", 0.0),
        ("(" * 100_000 + "3*9-7" + ")" * 100_000, 0.0),
        ("(" * 90 + "3*9-7" + ")" * 90, 0.0),
        ("9**9**9", 0.0),
    ],
)
def test_countdown_gives_one_only_to_an_expression_of_the_given_numbers(
    completion: str, reward: float
) -> None:
    assert countdown([completion], numbers=[[3, 7, 9]], target=[20]) == [reward]


@pytest.mark.parametrize(
    ("numbers", "target", "sentence"),
    [
        ("[3, 7, 9]", 20, "numbers='\\[3, 7, 9\\]': must be a list of numbers"),
        ([3, 7, 9], "20", "target='20': must be a number"),
        ([3, 7, 9], None, "target=None: must be a number"),
    ],
)
def test_countdown_refuses_numbers_that_are_text_as_in_a_csv_file(
    numbers: object, target: object, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        countdown(["3*9-7"], [numbers], [target])


def test_countdown_needs_every_number() -> None:
    assert countdown(["4*5", "4*5*1"], numbers=[[4, 5, 1]] * 2, target=[20, 20]) == [0.0, 1.0]


def test_countdown_uses_a_number_as_often_as_it_is_given() -> None:
    assert countdown(["5+5", "5+5"], numbers=[[5, 5], [5]], target=[10, 10]) == [1.0, 0.0]


def test_countdown_divides_exactly() -> None:
    completions = ["1/49*49", "8/(3-8/3)", "7/2", "1/(2-2)"]
    numbers = [[49, 1, 49], [3, 3, 8, 8], [7, 2], [1, 2, 2]]
    assert countdown(completions, numbers, [1, 24, 3, 0]) == [1, 1, 0, 0]


def test_countdown_works_from_left_to_right() -> None:
    assert countdown(["9-4-3", "24/4/3"], [[9, 4, 3], [24, 4, 3]], [2, 2]) == [1.0, 1.0]


# -- math, reasoning-gym ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("so it is $\\frac{2}{4}$", "1/2", 1.0),
        ("so it is \\boxed{0.5}", "\\frac{1}{2}", 1.0),
        ("The answer is 0.5", "$\\frac{1}{2}$", 1.0),
        ("$\\boxed{(x+1)^2}$", "x^2+2x+1", 1.0),
        ("The answer is 2", "1/2", 0.0),
        ("I do not know", "1/2", 0.0),
        ("42", "42", 1.0),
    ],
)
def test_math_accepts_equal_forms(completion: str, answer: str, reward: float) -> None:
    assert math([completion], answer=[answer]) == [reward]


def test_math_refuses_an_empty_reference() -> None:
    with pytest.raises(ValueError, match="answer=''"):
        math(["1"], answer=[""])


def test_builtin_functions_run_in_a_child() -> None:
    calls = {name: RewardCall(function=name, options={}) for name in ("math", "reasoning_gym")}
    pool = RewardPool(calls, processes=1, timeout_s=30, max_timeouts=0.5)
    entry = {"answer": "-4", "metadata": {"difficulty": {"num_terms": [2, 6]}}}
    completions = ["4 - 1 - 7 = -4", "<answer>-4</answer>", "it is 4", "no number"]
    columns: dict[str, list[Any]] = {
        "completions": completions,
        "reasoning_gym_dataset": ["chain_sum"] * 4,
        "reasoning_gym_entry": [entry] * 4,
        "answer": ["-4"] * 4,
    }
    try:
        assert pool.call("reasoning_gym", columns) == [1.0, 1.0, 0.0, 0.0]
        assert pool.call("math", columns)[2:] == [0.0, 0.0]
    finally:
        pool.close()


# -- the pool --------------------------------------------------------------------------------------


def test_a_user_function_receives_the_keywords_that_it_names(pool: RewardPool) -> None:
    columns: dict[str, list[Any]] = {
        "completions": ["a", "bc"],
        "prompts": ["p", "q"],
        "completion_ids": [[1], [2, 3]],
        "target": [10, 20],
    }
    assert pool.call("length", columns) == [1.0, 2.0]
    assert pool.call("last_id", columns) == [11.0, 23.0]


def test_options_are_arguments_and_take_precedence_over_a_column_of_the_same_name(
    user_file: Path,
) -> None:
    scaled = {"scaled": RewardCall(function=f"{user_file}:scaled", options={"factor": 3.0})}
    pool = RewardPool(scaled, processes=1, timeout_s=5, max_timeouts=0.5)
    try:
        assert pool.call(
            "scaled", {"completions": ["a", "bc"], "factor": [7, 7], "prompts": ["p", "q"]}
        ) == [3.0, 6.0]
    finally:
        pool.close()


def test_a_class_is_built_once_from_its_options_and_called_with_columns(user_file: Path) -> None:
    built = {"built": RewardCall(function=f"{user_file}:Built", options={"base": 1})}
    pool = RewardPool(built, processes=1, timeout_s=5, max_timeouts=0.5)
    try:
        assert pool.call("built", {"completions": ["a"]}) == [11.0]
        assert pool.call("built", {"completions": ["a"], "prompts": ["p"], "base": [5]}) == [
            22.0
        ], "a column may have an option's name"
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("hangs", FailureKind.timeout),
        ("loops", FailureKind.timeout),
        ("backtracks", FailureKind.timeout),
        ("crashes", FailureKind.died),
        ("raises", FailureKind.raised),
        ("exits", FailureKind.raised),
        ("short", FailureKind.invalid),
    ],
)
def test_only_the_sequence_that_causes_a_failure_fails_and_the_pool_works_on(
    pool: RewardPool, name: str, kind: FailureKind
) -> None:
    assert kinds(pool.call(name, {"completions": ["a", "x", "b"]})) == [1.0, kind, 1.0]
    assert pool.call(name, {"completions": ["a", "b"]}) == [1.0, 1.0]


def of_session(note: Path) -> list[int]:
    """The running processes of the session whose number a reward function wrote to `note`."""
    pids = []
    session = note.read_text()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = stat.read_text().rpartition(") ")[2].split()[:4]
        except OSError:  # it has ended meanwhile
            continue
        if number == session and state != "Z":
            pids.append(int(stat.parent.name))
    return pids


def all_ended(note: Path) -> bool:
    """Whether all processes of the session end within 10 s.

    Init may need some time to reap processes whose parent was killed too.
    """
    end = time.monotonic() + 10
    while of_session(note) and time.monotonic() < end:
        time.sleep(0.02)
    return not of_session(note)


def test_a_killed_owners_processes_end_even_while_a_call_in_c_holds_the_interpreter(
    user_file: Path, tmp_path: Path
) -> None:
    note = tmp_path / "session"
    script = tmp_path / "owner.py"
    script.write_text(
        "import os, signal, threading, time\n"
        "from pathlib import Path\n"
        "from hybridrl.rewards.pool import RewardCall, RewardPool\n"
        f"note = Path({str(note)!r})\n"
        "def end():\n"
        "    while not note.is_file() or not note.read_text():\n"
        "        time.sleep(0.02)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"calls = {{'r': RewardCall(function={f'{user_file}:starts_others'!r}, options={{}})}}\n"
        "pool = RewardPool(calls, processes=1, timeout_s=60, max_timeouts=0.5)\n"
        "threading.Thread(target=end).start()\n"
        "pool.call('r', {'completions': ['a'], 'note': [str(note)]})\n"
    )
    root = Path(__file__).parent.parent.parent
    process = subprocess.run(
        [sys.executable, script],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        timeout=60,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    assert all_ended(note)


def test_a_child_writes_no_core_file_and_cannot_raise_the_limit(pool: RewardPool) -> None:
    assert pool.call("core_limits", {"completions": ["a"]}) == [0.0]


def test_relative_paths_of_a_file_and_in_it_start_at_the_folder_of_the_run(
    user_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(
        "def f(completions):\n    return [float(open('table.txt').read())] * len(completions)\n"
    )
    Path("table.txt").write_text("7")
    pool = RewardPool(
        {"f": RewardCall(function="own.py:f", options={})},
        processes=1,
        timeout_s=5,
        max_timeouts=0.5,
    )
    try:
        assert pool.call("f", {"completions": ["a"]}) == [7.0]
    finally:
        pool.close()


def test_a_function_that_always_hangs_is_not_called_beyond_the_share_that_may_time_out(
    user_file: Path,
) -> None:
    pool = RewardPool(
        {"hangs": RewardCall(function=f"{user_file}:hangs", options={})},
        processes=2,
        timeout_s=0.5,
        max_timeouts=0.25,
    )
    try:
        outcomes = pool.call("hangs", {"completions": ["x"] * 8})
        assert kinds(outcomes) == ["timeout"] * 8
        texts = [o.text for o in outcomes if isinstance(o, Failure)]
        skipped = ["not run: more than 25% of the batch" in text for text in texts]
        # Two run at once: after the first round 2 have timed out, after the second 4 > 0.25 * 8.
        assert skipped == [False] * 4 + [True] * 4
        assert pool.call("hangs", {"completions": ["x", "b", "b", "b"]})[1:] == [1.0, 1.0, 1.0]
    finally:
        pool.close()


def test_a_call_that_fails_for_all_its_responses_is_reported_once_before_each_is_scored_alone(
    user_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = {"raises": RewardCall(function=f"{user_file}:raises", options={})}
    pool = RewardPool(calls, processes=1, timeout_s=5, max_timeouts=0.5)
    try:
        for _ in range(2):
            outcomes = pool.call("raises", {"completions": ["x", "b", "b"]})
            assert kinds(outcomes) == ["raised", 1.0, 1.0]
    finally:
        pool.close()
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("reward.functions.raises failed in its call for 3 responses: raised: ")
    assert line.endswith("these responses, and those of later failed calls, are scored one by one")


def test_no_task_is_started_after_the_time_budget_of_a_call(user_file: Path) -> None:
    calls = {"hangs": RewardCall(function=f"{user_file}:hangs", options={})}
    pool = RewardPool(calls, processes=1, timeout_s=0.5, max_timeouts=1.0, budget_s=0.0)
    try:
        outcomes = pool.call("hangs", {"completions": ["b", "x", "b"]})
        texts = [o.text for o in outcomes if isinstance(o, Failure)]
        assert (
            texts == ["not run: more than 100% of the batch had timed out, or 0 s had passed"] * 3
        )
        assert pool.call("hangs", {"completions": ["b", "b", "b"]}) == [1.0, 1.0, 1.0], (
            "the first task of a call is always run"
        )
    finally:
        pool.close()


def test_anything_but_a_finite_number_is_invalid_and_none_stays_none(
    pool: RewardPool,
) -> None:
    outcomes = pool.call("odd", {"completions": ["nan", "inf", "none", "str", "huge", "fine"]})
    assert kinds(outcomes) == ["invalid", "invalid", None, "invalid", "invalid", 1.0]
    assert kinds(pool.call("no_list", {"completions": ["a", "b"]})) == ["invalid", "invalid"]


def test_a_failure_holds_the_text_of_the_exception(pool: RewardPool) -> None:
    outcomes = pool.call("raises", {"completions": ["x"]})
    assert outcomes == [Failure(kind=FailureKind.raised, text="OwnError: no verdict")]


def test_a_child_killed_between_calls_is_replaced(pool: RewardPool) -> None:
    (before,) = pool.call("pid", {"completions": ["a"]})
    assert isinstance(before, float)
    os.kill(int(before), signal.SIGKILL)
    (after,) = pool.call("pid", {"completions": ["a"]})
    assert after not in (before, float(os.getpid()))


def test_two_children_share_a_batch_in_order(user_file: Path) -> None:
    calls = {"length": RewardCall(function=f"{user_file}:length", options={})}
    pool = RewardPool(calls, processes=2, timeout_s=5, max_timeouts=0.5)
    try:
        assert pool.call(
            "length", {"completions": ["a", "bb", "ccc"], "prompts": ["", "", ""]}
        ) == [1.0, 2.0, 3.0]
    finally:
        pool.close()


def test_a_child_has_no_secret_and_imports_no_heavy_package(pool: RewardPool) -> None:
    names = ["SOME_API_KEY hf_token", "PLAIN_SETTING"]
    assert pool.call("secrets", {"completions": names}) == [0.0, 1.0]
    assert pool.call("heavy_imports", {"completions": ["a"]}) == [0.0]


def test_a_child_does_not_run_the_main_script(user_file: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "from hybridrl.rewards.pool import RewardCall, RewardPool\n"
        "print('runs as', __name__, flush=True)\n"
        f"calls = {{'r': RewardCall(function={f'{user_file}:length'!r}, options={{}})}}\n"
        "RewardPool(calls, processes=1, timeout_s=5, max_timeouts=0.5).close()\n"
    )
    root = Path(__file__).parent.parent.parent
    process = subprocess.run(
        [sys.executable, script],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert (process.stdout, process.returncode) == ("runs as __main__\n", 0)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (
            "countdwon",
            r"reward\.functions\.r\.function=countdwon: must be one of countdown, .*; did you "
            r"mean countdown\?",
        ),
        (
            "nowhere/file.py:f",
            r"reward\.functions\.r\.function=nowhere/file\.py:f: there is no file "
            r"/.*/nowhere/file\.py; give a path",
        ),
        (
            "{file}:nothing",
            r"reward\.functions\.r\.function=.*: .* has no nothing; name a function that the file "
            r"defines",
        ),
        (
            "{file}:not_callable",
            r"reward\.functions\.r\.function=.*: not_callable must be callable; name",
        ),
        (
            "{file}:Built",
            r"reward\.functions\.r\.function=.*: building it raised TypeError: .* missing .* "
            r"'base'; correct its options",
        ),
    ],
)
def test_a_function_that_cannot_be_loaded_is_a_config_error(
    function: str, sentence: str, user_file: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_reward("r", function.format(file=user_file), {})


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "1 / 0",
            r"reward\.functions\.r\.function=.*: running .*own\.py raised ZeroDivisionError: .*; "
            r"correct the file",
        ),
        (
            "import os; os._exit(1)",
            r"reward\.functions\.r\.function=.*: loading the reward functions ended their "
            r"process \(the process ended with exit code 1\); run the file by itself",
        ),
        (
            "import os; os.kill(os.getpid(), 9)",
            r"\(the process ended with exit code -9: it was killed, as when memory runs out\); run",
        ),
    ],
)
def test_an_error_of_loading_reaches_the_owner_of_the_child_process(
    source: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(source)
    function = RewardFunctionConfig(function=f"{tmp_path}/own.py:f")
    config = RewardConfig(functions={"r": function})
    with pytest.raises(ConfigError, match=sentence), loaded_rewards(config):
        pass


def test_functions_that_load_for_too_long_are_refused_with_the_setting_that_gives_them_longer(
    tmp_path: Path,
) -> None:
    (tmp_path / "own.py").write_text("import time\ntime.sleep(600)")
    function = f"{tmp_path}/own.py:f"
    limit = r"a process with all reward functions must load within {} s; import less, or raise "
    settings = [
        "experiment=quickstart",
        f"run.dir={tmp_path}/run",
        "data.num_train=5",
        f"reward.functions.countdown.function={function}",
        "deadlines.start_s=0.5",
    ]
    with pytest.raises(ConfigError, match=limit.format(0.5) + r"deadlines\.start_s"):
        preflight(load_config(settings))
    config = RewardConfig(functions={"r": RewardFunctionConfig(function=function)})
    with pytest.raises(ConfigError, match=limit.format(0.45)):  # the worker's deadline is 0.5 s
        RewardWorker(config, "a", watch_only=False, start_s=0.5, load=lambda *_, **__: Letters())


def test_an_option_that_the_function_does_not_take_is_a_config_error(user_file: Path) -> None:
    options = {"factor": 2.0, "facto": 2.0}
    with pytest.raises(
        ConfigError, match=r"reward\.functions\.r\.options\.facto: .* takes no such argument"
    ):
        load_reward("r", f"{user_file}:scaled", options)


def test_a_valid_function_and_no_function_at_all_pass_the_check() -> None:
    with loaded_rewards(
        RewardConfig(functions={"a": RewardFunctionConfig(function="countdown")})
    ) as pool:
        assert pool is not None and pool.signatures.keys() == {"a"}
    with loaded_rewards(RewardConfig()) as pool:
        assert pool is None


# -- the worker ------------------------------------------------------------------------------------


class Letters:
    """A tokenizer whose token ids are code points; 0 is the special end token."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(i) for i in token_ids if i or not skip_special_tokens)


Open = Callable[..., RewardWorker]


@pytest.fixture
def open_worker(user_file: Path) -> Iterator[Open]:
    workers: list[RewardWorker] = []

    def build(
        on_error: OnError = OnError.drop_group, watch_only: bool = False, **weights: float
    ) -> RewardWorker:
        functions = {
            name: RewardFunctionConfig(
                function=name if name == "countdown" else f"{user_file}:{name}", weight=weight
            )
            for name, weight in weights.items()
        }
        config = RewardConfig(
            functions=functions, timeout_s=5.0, on_error=on_error, error_value=-3.0
        )
        worker = RewardWorker(
            config, "letters", watch_only=watch_only, load=lambda path, revision, eos: Letters()
        )
        workers.append(worker)
        return worker

    yield build
    for worker in workers:
        worker.close()


def rollouts(*responses: str) -> RolloutBatch:
    """A batch with two responses per prompt; every prompt has the numbers [3, 7] and target 21."""
    columns = {"numbers": [3, 7], "target": 21}
    return text_batch(responses, group_size=2, text="3 7=21:", columns=columns)


def test_the_worker_sums_the_functions_by_weight(open_worker: Open) -> None:
    rewards = open_worker(countdown=1.0, length=0.5).score(
        rollouts("3*7", "21", "7*3", "7"), [1.0, 0.5]
    )
    assert rewards.uids == ("p0", "p1")
    assert rewards.part_names == ("countdown", "length")
    assert rewards.parts.tolist() == [[1, 0, 1, 0], [3, 2, 3, 1]]
    assert rewards.values.tolist() == [2.5, 1.0, 2.5, 0.5]
    assert rewards.values.dtype == rewards.parts.dtype == np.float32
    assert not rewards.errors.any()
    assert rewards.keep.all()


def test_the_response_alone_is_scored_without_special_tokens(open_worker: Open) -> None:
    rewards = open_worker(last_id=1.0).score(rollouts("a", "b"), [1.0])
    # The ids end with the end token, 0, whatever the text is.
    assert rewards.values.tolist() == [21.0, 21.0]


def test_the_tokens_of_the_prompt_are_a_column(open_worker: Open) -> None:
    rewards = open_worker(num_prompt_tokens=1.0).score(rollouts("a", "bcd"), [1.0])
    assert rewards.values.tolist() == [2.0, 2.0]


def test_the_worker_measures_how_much_a_response_repeats_itself(open_worker: Open) -> None:
    rewards = open_worker().score(rollouts("abcabcabc", "ab"), [])
    # Of seven 4-grams, the end token included, abca, bcab and cabc occur twice.
    assert rewards.repeated[0] == np.float32(3 / 7)
    assert np.isnan(rewards.repeated[1]), "three tokens have no 4-gram"
    assert rewards.compressed[0] > 1, "zlib's header is longer than nine letters"


def test_without_a_function_every_reward_is_zero(open_worker: Open) -> None:
    worker = open_worker()
    rewards = worker.score(rollouts("a", "b"), [])
    assert rewards.part_names == () and rewards.parts.shape == (0, 2)
    assert rewards.values.tolist() == [0.0, 0.0]
    worker.ping()


def test_drop_group_removes_the_siblings_and_gives_no_value(open_worker: Open) -> None:
    rewards = open_worker(raises=2.0).score(rollouts("a", "b", "x", "c"), [2.0])
    assert rewards.errors.tolist() == [False, False, True, False]
    assert rewards.keep.tolist() == [True, True, False, False]
    assert np.array_equal(rewards.values, [2, 2, np.nan, 2], equal_nan=True)
    assert np.array_equal(rewards.parts, [[1, 1, np.nan, 1]], equal_nan=True)


def test_value_gives_the_failed_sequence_the_error_value(open_worker: Open) -> None:
    rewards = open_worker(OnError.value, raises=2.0, length=1.0).score(
        rollouts("a", "b", "x", "c"), [2.0, 1.0]
    )
    assert rewards.values.tolist() == [3.0, 3.0, -3.0, 3.0]
    assert rewards.errors.tolist() == [False, False, True, False]
    assert rewards.keep.all()


def test_fail_names_the_problem_the_function_and_the_kind_of_failure(open_worker: Open) -> None:
    with pytest.raises(
        RewardError,
        match=r"reward\.functions\.raises failed on p1: raised: OwnError: no verdict; 1 of 4",
    ):
        open_worker(OnError.fail, raises=1.0).score(rollouts("a", "b", "x", "c"), [1.0])


@pytest.mark.parametrize("on_error", OnError)
def test_a_failure_of_a_function_of_weight_0_neither_stops_nor_drops_anything(
    open_worker: Open, on_error: OnError
) -> None:
    rewards = open_worker(on_error, length=1.0, raises=0.0).score(rollouts("a", "x"), [1.0, 0.0])
    assert rewards.values.tolist() == [1.0, 1.0]
    assert rewards.keep.all()
    assert not rewards.errors.any()
    assert np.array_equal(rewards.parts, [[1.0, 1.0], [1.0, np.nan]], equal_nan=True)


@pytest.mark.parametrize("on_error", OnError)
def test_where_rewards_are_only_watched_a_failure_neither_stops_nor_drops_anything(
    open_worker: Open, on_error: OnError
) -> None:
    rewards = open_worker(on_error, watch_only=True, length=1.0, raises=2.0).score(
        rollouts("a", "x"), [1.0, 2.0]
    )
    assert rewards.values.tolist() == [3.0, 1.0]
    assert rewards.keep.tolist() == [True, True]
    assert rewards.errors.tolist() == [False, True], "the error is still reported"
    assert np.array_equal(rewards.parts, [[1.0, 1.0], [1.0, np.nan]], equal_nan=True)


def test_the_weights_of_the_step_are_used_and_not_those_of_the_settings(open_worker: Open) -> None:
    worker = open_worker(length=1.0, raises=2.0)
    assert worker.score(rollouts("a", "bcd"), [10.0, 0.5]).values.tolist() == [10.5, 30.5]
    assert worker.score(rollouts("a", "x"), [1.0, 0.0]).errors.tolist() == [False, True], (
        "a function whose scheduled weight is 0 at this step can still cause an error"
    )


def test_samples_hold_text_and_reward_and_nan_where_it_failed(open_worker: Open) -> None:
    worker = open_worker(OnError.value, raises=1.0)
    batch = rollouts("a", "x")
    first, second = worker.samples(batch, worker.score(batch, [1.0]), step=4, count=9)
    assert (first.step, first.uid, first.prompt) == (4, "p0", "3 7=21:")
    assert (first.response, first.reward) == ("a", 1.0)
    assert second.response == "x"
    assert np.isnan(second.reward)


def test_samples_have_the_value_of_each_function_and_no_reward_without_one(
    open_worker: Open,
) -> None:
    batch = rollouts("a", "x")
    worker = open_worker(OnError.value, length=1.0, raises=2.0)
    first, second = worker.samples(batch, worker.score(batch, [1.0, 2.0]), step=4, count=9)
    assert (first.parts, first.reward) == ({"length": 1.0, "raises": 1.0}, 3.0)
    assert second.parts["length"] == 1.0 and np.isnan(second.parts["raises"])
    without = open_worker(OnError.value)
    [alone] = without.samples(batch, without.score(batch, []), step=4, count=1)
    assert alone.parts == {} and np.isnan(alone.reward)
