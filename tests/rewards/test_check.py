"""Each reward function is compared with the columns of the data before any worker starts."""

import logging
from pathlib import Path

import pytest

from hybridrl.core.errors import ConfigError
from hybridrl.launch.preparation import preflight
from hybridrl.rewards.check import check_columns, check_judged, check_taken, loaded_rewards
from hybridrl.settings.compose import load_config
from hybridrl.settings.rewards import RewardConfig, RewardFunctionConfig
from hybridrl.types import Prompt

USER_FILE = """
def needs(completions, answer, level):
    return [1.0] * len(completions)

def may_use(completions, answer=None, **columns):
    return [1.0] * len(completions)

def verl(data_source, solution_str, ground_truth, extra_info=None):
    return 1.0

def openrlhf(queries, prompts, labels):
    return 1.0

def trl_messages(completions, prompts, **kwargs):
    return [float(p[-1]["content"] != c[0]["content"]) for p, c in zip(prompts, completions)]

def strict(completions):
    return [float(c.split("<answer>")[1]) for c in completions]

def wants_none(completions, level):
    return [float(x is None) for x in level]
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(USER_FILE)
    return path


def prompt(uid: str, **columns: object) -> Prompt:
    return Prompt(uid=uid, input_ids=(5, 6), text="3 7=21:", columns=columns)


def check(
    user_file: Path,
    function: str,
    *prompts: Prompt,
    heldout: tuple[Prompt, ...] = (),
    **options: object,
) -> None:
    configured = RewardFunctionConfig(function=f"{user_file}:{function}", options=options)
    config = RewardConfig(functions={"r": configured})
    with loaded_rewards(config) as pool:
        assert pool is not None
        check_columns(pool, config, prompts, heldout)


def test_a_column_that_the_data_lacks_is_named_with_the_columns_of_the_data(
    user_file: Path,
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"reward\.functions\.r\.function=.*:needs: its argument `level` is not a column of "
        r"the data, whose columns are answer, question \(as of train-000000, the first row\); name "
        r"the data's key for it with '\+data\.columns=\{level: KEY\}'",
    ):
        check(user_file, "needs", prompt("train-000000", answer="21", question="?"))


def test_the_held_out_data_must_have_the_column_too(user_file: Path) -> None:
    both = prompt("train-000000", answer="21", level=1)
    check(user_file, "needs", both, heldout=(both,))
    with pytest.raises(ConfigError, match=r"`level` is not a column .* \(as of heldout-000000"):
        check(user_file, "needs", both, heldout=(prompt("heldout-000000", answer="21"),))


def test_defaults_options_and_columns_of_other_rows_satisfy_a_function(user_file: Path) -> None:
    check(user_file, "may_use", prompt("train-000000"))
    check(user_file, "needs", prompt("train-000000", answer="21"), level=3)
    check(user_file, "needs", prompt("a", answer="21"), prompt("b", answer="21", level=1))


def test_a_column_that_a_batch_lacks_is_passed_as_none(user_file: Path) -> None:
    configured = RewardFunctionConfig(function=f"{user_file}:wants_none")
    with loaded_rewards(RewardConfig(functions={"r": configured})) as pool:
        assert pool is not None
        assert pool.call("r", {"completions": ["a", "b"]}) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (
            "verl",
            r"`data_source` .*; it scores one response at a time; write def score\(completions",
        ),
        ("openrlhf", r"`queries` .*; prompts are passed as the list `prompts`"),
        (
            "trl_messages",
            r"it reads lists of messages, and raised TypeError: .*; completions and prompts are "
            r"texts here, .*: write `completion`",
        ),
    ],
)
def test_a_function_for_another_framework_is_refused_with_a_remedy(
    user_file: Path, function: str, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check(user_file, function, prompt("train-000000", ground_truth="21"))


def test_a_function_that_raises_on_the_response_of_the_check_is_a_warning(
    user_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check(user_file, "strict", prompt("train-000000"))
    warning = "reward.functions.r failed on train-000000 with the response 'The answer is 42.'"
    assert warning in caplog.text


def test_preflight_compares_rewards_and_data(tmp_path: Path, user_file: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "3 7=21:", "solution": "3*7"}\n')
    settings = load_config(
        [
            "experiment=quickstart",
            f"run.dir={tmp_path}/run",
            "data.task=records",
            f"data.path={rows}",
            f"data.heldout_path={rows}",
            f"reward.functions.countdown.function={user_file}:needs",
        ]
    )
    with pytest.raises(
        ConfigError, match=r"`answer` is not a column .*, whose columns are solution"
    ):
        preflight(settings)


# -- routes ----------------------------------------------------------------------------------------


def routed(**routes: dict[str, object] | None) -> RewardConfig:
    """A config with one function for each route; None: a function of weight 0 without a route."""
    return RewardConfig(
        functions={
            name: RewardFunctionConfig(
                function="math", route=route or {}, weight=0.0 if route is None else 1.0
            )
            for name, route in routes.items()
        }
    )


OF_A = prompt("a/train-000001", data_source="a", level=3)
OF_B = prompt("b/train-000001", data_source="b")


def test_a_row_that_no_function_scores_is_named_with_its_columns() -> None:
    for_a = routed(exact={"data_source": "a"})
    check_judged(for_a, [OF_A])
    with pytest.raises(
        ConfigError,
        match=r"^reward\.functions\.exact\.route: no function takes b/train-000001, whose columns "
        "are data_source: 'b', so nothing would score its responses; add a function",
    ):
        check_judged(for_a, [OF_A, OF_B])
    check_judged(routed(exact={"data_source": "a"}, code={"data_source": "b"}), [OF_A, OF_B])
    check_judged(RewardConfig(), [OF_A, OF_B])  # without any function nothing is scored


def test_a_function_that_is_only_reported_scores_no_row_beside_one_with_a_weight() -> None:
    with pytest.raises(ConfigError, match=r"^reward\.functions\.exact\.route: no .* b/train-"):
        check_judged(routed(exact={"data_source": "a"}, reported=None), [OF_A, OF_B])
    check_judged(routed(reported=None), [OF_A, OF_B])


def test_a_route_that_takes_no_row_is_refused_with_the_values_that_the_data_has() -> None:
    check_taken("teachers.main", {"data_source": "b"}, [OF_A, OF_B])
    with pytest.raises(
        ConfigError,
        match=r"^teachers\.main\.route=\{'data_source': 'c'\}: matches no row of the data; the "
        r"data's values of data_source are 'a', 'b'; correct it",
    ):
        check_taken("teachers.main", {"data_source": "c"}, [OF_A, OF_B])
    with pytest.raises(ConfigError, match="no row has the column domain; correct it"):
        check_taken("reward.functions.r", {"domain": "a"}, [OF_A, OF_B])


def test_a_function_needs_columns_only_of_the_rows_that_its_route_takes(user_file: Path) -> None:
    function = f"{user_file}:wants_none"  # needs `level`, which the rows of b lack
    for route, missing in (({"data_source": "a"}, False), ({}, True)):
        config = RewardConfig(
            functions={"r": RewardFunctionConfig(function=function, route=dict(route))}
        )
        with loaded_rewards(config) as pool:
            assert pool is not None
            if not missing:
                check_columns(pool, config, [OF_A, OF_B], [OF_A])
                continue
            with pytest.raises(
                ConfigError,
                match=r"its argument `level` is not a column of the data source b, whose columns "
                r"are data_source \(as of b/train-000001, the first row\); name the data's key for "
                r"it with '\+data\.sources\.b\.columns=\{level: KEY\}'",
            ):
                check_columns(pool, config, [OF_A, OF_B], [])


def test_routes_are_checked_before_any_worker_starts(tmp_path: Path) -> None:
    sources = "+data.sources={a: {task: countdown, weight: 3}, b: {task: countdown}}"
    common = ["experiment=quickstart", f"run.dir={tmp_path}/run", "data.num_train=5", sources]
    only_a = "+reward.functions.countdown.route={data_source: a}"
    with pytest.raises(ConfigError, match="no function takes b/train-000000"):
        preflight(load_config([*common, only_a]))
    nowhere = "+teachers.main.route={data_source: c}"
    with pytest.raises(ConfigError, match=r"^teachers\.main\.route=.*: matches no row of the data"):
        preflight(load_config([*common, nowhere]))
    prompts, *_ = preflight(load_config(common))
    assert [p.uid for p in prompts[::5]] == ["a/train-000000", "b/train-000000"]
