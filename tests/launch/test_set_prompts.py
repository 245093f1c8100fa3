"""Named held-out sets: their problems, the errors before the start of a run, and warnings."""

import json
import logging
from pathlib import Path

import pytest

from hybridrl.core.errors import ConfigError, DataError
from hybridrl.launch.preparation import preflight
from hybridrl.launch.set_prompts import held_out_sets, set_problems
from hybridrl.run_dir.inputs import digests
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings

BASE = (
    "run.dir=unused",
    "experiment=quickstart",
    "data.num_train=64",
    "data.num_heldout=4",
    "tracking.wandb=disabled",
)


def settings_of(*overrides: str) -> RunSettings:
    return load_config([*BASE, *overrides])


def write_rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_set_of_rows_has_its_own_columns_and_uids(tmp_path: Path):
    file = write_rows(
        tmp_path / "rows.jsonl",
        {"question": "1 2=3:", "numbers": [1, 2], "target": 3},
        {"question": "2 2=4:", "numbers": [2, 2], "target": 4},
    )
    given = f"{{path: {file}, columns: {{prompt: question}}, num_problems: 1, samples: 4}}"
    [easy] = held_out_sets(settings_of(f"+eval.sets.easy={given}"))
    assert [(p.uid, p.text, p.columns["target"]) for p in easy.prompts] == [
        ("easy-000001", "1 2=3:", 3)
    ]
    assert (easy.name, easy.samples, easy.reward) == ("easy", 4, None)
    assert easy.temperature == 1.0, "several samples are drawn at algorithm.temperature"


def test_a_generated_set_has_options_of_its_own_and_one_sample_is_greedy():
    given = "{task: countdown, options: {num_numbers: 2}, num_problems: 3}"
    [small] = held_out_sets(settings_of(f"+eval.sets.small={given}"))
    assert [p.uid for p in small.prompts] == ["small-000000", "small-000001", "small-000002"]
    assert all(len(p.columns["numbers"]) == 2 for p in small.prompts)
    assert small.temperature == 0.0


def test_a_set_may_be_the_path_of_its_rows(tmp_path: Path):
    rows = write_rows(tmp_path / "hard.jsonl", {"prompt": "1+1=", "answer": "2"})
    assert settings_of(f"+eval.sets.hard={rows}").eval.sets["hard"].path == str(rows)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_generated_set_needs_no_question_beside_its_own(seed: int):
    """The generator has 19 questions with these options, and all are held out; training on it would
    be refused.
    """
    options = "dataset: prime_factorization, options: {min_value: 2, max_value: 20}"
    given = f"+eval.sets.small={{task: reasoning_gym, num_problems: 300, {options}}}"
    problems = set_problems(settings_of(given, f"run.seed={seed}"), "small")
    assert len(problems) == 19 == len({p.prompt for p in problems})


def test_a_set_without_usable_problems_is_refused_and_named(tmp_path: Path):
    missing = tmp_path / "missing.jsonl"
    with pytest.raises(DataError, match=rf"^eval\.sets\.a: {missing}: "):
        preflight(settings_of(f"+eval.sets.a.path={missing}"))
    many = "+eval.sets.a={task: countdown, options: {num_numbers: 2, max_number: 2}}"
    with pytest.raises(ConfigError, match=r"^eval\.sets\.a, read as data\.\*: data\.num_heldout="):
        set_problems(settings_of(many), "a")


def test_a_set_that_lacks_a_column_of_its_reward_function_is_refused(tmp_path: Path):
    file = write_rows(tmp_path / "rows.jsonl", {"prompt": "1 2=3:"})
    with pytest.raises(ConfigError, match=r"`numbers` is not a column .* \(as of a-000001"):
        preflight(settings_of(f"+eval.sets.a.path={file}"))
    own = tmp_path / "own.py"
    own.write_text("def score(completions, **columns): return [0.5] * len(completions)\n")
    judged = ("+reward.functions.own={function: '" + f"{own}:score" + "', weight: 0}",)
    _, _, [a] = preflight(
        settings_of(*judged, f"+eval.sets.a={{path: {file}, reward: own}}", f"run.dir={tmp_path}/r")
    )
    assert a.reward == "own"


def test_a_set_whose_reward_function_does_not_take_a_row_is_refused(tmp_path: Path):
    """If the set names no function, each row is judged by the function that takes it."""
    own = tmp_path / "own.py"
    own.write_text("def score(completions, **columns): return [0.5] * len(completions)\n")
    functions = tuple(
        f"+reward.functions.{kind}={{function: '{own}:score', weight: 0, route: {{kind: {kind}}}}}"
        for kind in ("math", "code")
    )
    rows = [{"prompt": "1 2=3:", "kind": kind} for kind in ("math", "code")]
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(ConfigError) as caught:
        preflight(settings_of(*functions, f"+eval.sets.a={{path: {file}, reward: math}}"))
    assert str(caught.value).startswith(
        "eval.sets.a.reward=math: reward.functions.math.route={'kind': 'math'} does not take "
        "a-000002; leave such rows out"
    )


def test_without_a_reward_function_the_rows_of_a_set_need_what_the_run_learns_from(tmp_path: Path):
    pairs = ("algorithm=simpo", "+data.options.responses=pair", "~reward.functions.countdown")
    alone = write_rows(tmp_path / "alone.jsonl", {"prompt": "1 2=3:", "completion": "1+2"})
    with pytest.raises(ConfigError) as caught:
        held_out_sets(settings_of(*pairs, f"+eval.sets.a.path={alone}"))
    assert str(caught.value) == (
        "eval.sets.a: nothing can be measured on it, because there is no reward function, and the "
        f"run learns from 2 responses to each prompt but {alone}:1 has 1; give rows that have them"
    )
    row = {"prompt": "1 2=3:", "chosen": "1+2", "rejected": "1-2"}
    ranked = write_rows(tmp_path / "ranked.jsonl", row)
    [a] = held_out_sets(settings_of(*pairs, f"+eval.sets.a.path={ranked}"))
    assert len(a.prompts[0].responses) == 2


def test_problems_of_a_set_that_are_trained_on_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    settings = settings_of(f"run.dir={tmp_path}/r")
    prompts, _, _ = preflight(settings)
    columns = {"numbers": [1, 2], "target": 3}
    texts = (prompts[5].text, "1 2=3:")
    file = write_rows(tmp_path / "rows.jsonl", *({"prompt": text, **columns} for text in texts))
    with caplog.at_level(logging.WARNING):
        preflight(settings_of(f"run.dir={tmp_path}/r", f"+eval.sets.a.path={file}"))
    assert "eval.sets.a: 1 of 2 prompts are training prompts too, a-000001 the first" in caplog.text


def test_the_problems_of_a_set_are_among_the_inputs_of_a_run(tmp_path: Path):
    settings = settings_of()
    assert digests(settings, [], [], {}).keys() == {"data", "model.path", "teachers.main.path"}
    [a] = held_out_sets(settings_of("+eval.sets.a={task: countdown, num_problems: 2}"))
    whole = digests(settings, [], [], {"a": a.prompts})
    part = digests(settings, [], [], {"a": a.prompts[:1]})
    assert whole["eval.sets.a"] != part["eval.sets.a"] and whole["data"] == part["data"]
