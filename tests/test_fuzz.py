"""Random overrides, data files and reward functions work or end in a typed error."""

import json
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hydra.errors import HydraException
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

import hybridrl
from hybridrl.core.errors import ConfigError, DataError
from hybridrl.data.problem_sources import load_problems
from hybridrl.data.prompts import tokenize
from hybridrl.models.tiny import tiny_tokenizer
from hybridrl.rewards.child import RewardCall
from hybridrl.rewards.pool import Failure, FailureKind, RewardPool
from hybridrl.settings.compose import from_yaml, known_keys, load_config, to_yaml
from hybridrl.settings.run import DataConfig

derandomized = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # no shrinking, which takes minutes
    suppress_health_check=list(HealthCheck),
)

PACKAGE = Path(hybridrl.__file__).parent
LOADED = load_config(["experiment=quickstart", "run.dir=x"])

# -- settings --------------------------------------------------------------------------------------

VALUES = [
    "",
    "0",
    "1",
    "-1",
    "2.5",
    "1e400",
    "nan",
    "inf",
    "true",
    "null",
    "x",
    "[]",
    "[1,2]",
    "[a,null]",
    "{}",
    "{a:1}",
    "{kind:linear}",
    "'a b'",
    "'${run.dir}'",
    "'${nowhere}'",
    "'${oc.env:NO_SUCH_VARIABLE}'",
    "'\\${x}'",
    "'${'",
    "a=b",
    "a,b",
    "[",
    "{",
    "'",
    "\\",
    "9" * 20,
    "???",
    "!!python/object/apply:os.getcwd []",
    "../../x",
    "\u00e9\u2028",
    "{_target_:os.getcwd}",
    "[[1],[2]]",
    "{a:{b:[1,{c:2}]}}",
    "*x",
    "&x 1",
]
KEYS = [
    *known_keys(),
    "teachers.main.path",
    "teachers.b",
    "reward.functions.countdown",
    "reward.functions.f.options",
    "algorithm",
    "experiment",
    "hydra.job.name",
    "hydra",
    "_target_",
    "data.options._target_",
    "train.stepz",
    "",
    ".",
    "a..b",
    "train.betas.0",
    "@x",
    "a@b",
]

override = st.builds(
    lambda mark, key, sign, value: f"{mark}{key}{sign}{value}",
    st.sampled_from(["", "", "", "+", "++", "~"]),
    st.sampled_from(KEYS) | st.text(max_size=8),
    st.sampled_from(["=", "=", "=", "=", "", " = "]),
    st.sampled_from(VALUES) | st.text(max_size=12) | st.floats().map(str) | st.integers().map(str),
)


@settings(derandomized, max_examples=100)
@example(["deadlines.start_s=a\nb"])  # the message must show the override on one line
@example(["run.resume='a\nb'"])
@given(st.lists(override, min_size=1, max_size=2))
def test_any_override_works_or_is_one_sentence(overrides: list[str]):
    try:
        loaded = load_config(["experiment=quickstart", "run.dir=x", *overrides])
    except ConfigError as error:
        assert str(error) and "\n" not in str(error)
        assert is_refusal(error.__cause__), "an error of our own checks is no answer"
    else:
        assert from_yaml(to_yaml(loaded)) == loaded


def is_refusal(cause: BaseException | None) -> bool:
    """Whether an error was raised on purpose, by one of our checks or by a library for settings."""
    if cause is None or isinstance(cause, (ConfigError, HydraException, OmegaConfBaseException)):
        return True
    *_, innermost = traceback.extract_tb(cause.__traceback__)
    return PACKAGE not in Path(innermost.filename).parents


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "'nan'"])
@pytest.mark.parametrize(
    "key",
    [
        "deadlines.rollout_s",
        "algorithm.reward_weight.end",
        "rollout.max_logprob_gap",
        "train.lr_end",
    ],
)
def test_numbers_of_the_settings_must_be_finite(key: str, value: str):
    with pytest.raises(ConfigError, match=rf"{key}=.*(must be|needs)"):
        load_config(["experiment=quickstart", "run.dir=x", f"{key}={value}"])


odd_text = st.text(alphabet=st.sampled_from("${}\\ab:'\"#\n*&-? "), max_size=12)


@settings(derandomized, max_examples=10)
@given(st.lists(odd_text, min_size=20, max_size=20))
def test_any_text_survives_the_written_settings(texts: list[str]):
    """Twenty texts are tested at a time, because each reading of settings takes a fifth of a
    second.
    """
    changed = replace(LOADED, tracking=replace(LOADED.tracking, tags=texts))
    assert from_yaml(to_yaml(changed)) == changed


@settings(derandomized, max_examples=200)
@given(st.text(max_size=40) | st.sampled_from(VALUES).map(lambda value: f"train: {value}"))
def test_any_text_that_is_not_settings_is_refused_in_one_sentence(text: str):
    with pytest.raises(ConfigError) as caught:  # run.dir and model.path have no default
        from_yaml(text)
    assert str(caught.value) and "\n" not in str(caught.value)


# -- data ------------------------------------------------------------------------------------------

texts = st.sampled_from(
    ["", " ", "1 2=3:", "3*", "\ud800", "\u2028", "\0", "9" * 60, "x"]
) | st.text(max_size=6)
scalars = texts | st.none() | st.booleans() | st.integers() | st.floats()
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
message = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "tool"]) | anything,
        "content": texts | anything,
    },
    optional={"name": anything},
)
chat = st.lists(message, max_size=3)
row = st.dictionaries(
    st.sampled_from(
        ["prompt", "completion", "messages", "chosen", "rejected", "uid", "_target_", "completions"]
    )
    | texts,
    texts | chat | anything,
    max_size=4,
)
broken = st.text(max_size=20) | st.sampled_from(
    ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "NaN"]
)
line = row.map(json.dumps) | anything.map(json.dumps) | broken


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "rows.jsonl"


TOKENIZER = tiny_tokenizer()
TOKENIZER.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"


@settings(derandomized, max_examples=500)
@given(
    st.lists(line, min_size=1, max_size=2).map(
        lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")
    )
    | st.binary(max_size=30),
    st.booleans(),
)
def test_any_file_of_rows_becomes_prompts_or_an_error_that_names_the_row(
    file: Path, content: bytes, templated: bool
):
    file.write_bytes(content)
    config = DataConfig(
        task="jsonl", path=str(file), heldout_path=str(file), chat_template=templated
    )
    try:
        problems = load_problems(config, seed=0)[0]
        prompts = tokenize(problems, TOKENIZER, config, max_prompt_tokens=48)
    except DataError as error:
        assert str(error).startswith(str(file))
    else:
        assert prompts
        assert all(p.uid.startswith("train-00000") and p.input_ids for p in prompts)


def test_a_line_separator_that_json_allows_in_a_string_does_not_end_a_row(file: Path):
    file.write_text('{"prompt": "1 2=3:", "note": "a\u2028b"}\r\n{"prompt": "4"}', encoding="utf-8")
    config = DataConfig(task="jsonl", path=str(file), heldout_path=str(file))
    rows = load_problems(config, seed=0)[0]
    assert [(p.prompt, p.columns) for p in rows] == [("1 2=3:", {"note": "a\u2028b"}), ("4", {})]


# -- rewards ---------------------------------------------------------------------------------------

ODD = """
import json
from decimal import Decimal
from fractions import Fraction
import numpy as np

class Liar(float):
    def __abs__(self): raise RuntimeError("no")
class Mute:
    def __repr__(self): raise RuntimeError("no")
class Uncountable(list):
    def __len__(self): raise RuntimeError("no")
def stops():
    yield 1.0
    raise ValueError("midway")

VALUES = {
    "nan": float("nan"), "inf": float("inf"), "huge": 1e300, "int": 10**400,
    "fraction": Fraction(1, 3), "decimal": Decimal(1), "complex": 1j, "numpy": np.float32(0.5),
    "bool": True, "none": None, "text": "1", "liar": Liar(1.0), "mute": Mute(), "list": [1.0],
    "surrogate": "\\ud800",
}
RAISED = {
    "exit": SystemExit, "stop": StopIteration, "interrupt": KeyboardInterrupt,
    "memory": MemoryError, "mute": Mute, "x": ValueError,
}
WHOLES = {
    "scalar": 1.0, "none": None, "dict": {"a": 1}, "text": "1", "stops": stops,
    "uncountable": Uncountable([1.0]), "array": np.ones(1), "matrix": np.ones((1, 2)),
    "mute": Mute(), "type": dict,
}

def odd(completions):
    kind, name = json.loads(completions[0])
    if kind == "value":
        return [VALUES[name]] * len(completions)
    if kind == "number":
        return [name] * len(completions)
    if kind == "raise":
        raise RAISED[name](name)
    whole = WHOLES[name]
    return whole() if callable(whole) and not isinstance(whole, type) else whole
"""
VALUE_NAMES = [
    "nan",
    "inf",
    "huge",
    "int",
    "fraction",
    "decimal",
    "complex",
    "numpy",
    "bool",
    "none",
    "text",
    "liar",
    "mute",
    "list",
    "surrogate",
]
WHOLE_NAMES = [
    "scalar",
    "none",
    "dict",
    "text",
    "stops",
    "uncountable",
    "array",
    "matrix",
    "mute",
    "type",
]
RAISED_NAMES = ["exit", "stop", "interrupt", "memory", "mute", "x"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardPool]:
    path = tmp_path_factory.mktemp("rewards") / "odd.py"
    path.write_text(ODD)
    calls = {"odd": RewardCall(function=f"{path}:odd", options={})}
    pool = RewardPool(calls, processes=1, timeout_s=20.0, max_timeouts=0.5)
    yield pool
    pool.close()


@settings(derandomized, max_examples=300)
@given(
    st.tuples(st.just("value"), st.sampled_from(VALUE_NAMES))
    | st.tuples(st.just("number"), anything)
    | st.tuples(st.just("whole"), st.sampled_from(WHOLE_NAMES))
    | st.tuples(st.just("raise"), st.sampled_from(RAISED_NAMES))
)
def test_any_behaviour_of_a_reward_function_is_a_finite_number_or_a_failure(
    pool: RewardPool, behaviour: tuple[str, object]
):
    (outcome,) = pool.call("odd", {"completions": [json.dumps(behaviour)]})
    if isinstance(outcome, Failure):
        assert outcome.kind in (FailureKind.raised, FailureKind.invalid) and outcome.text
    else:
        assert outcome is None or abs(outcome) <= 3.4e38
