"""The console and the report for each kind of method, and the comparison of runs."""

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from hybridrl.core.errors import DataError, RunDirectoryError
from hybridrl.data.problem import Problem
from hybridrl.data.prompts import tokenize
from hybridrl.models.tiny import tiny_tokenizer
from hybridrl.policy.statistics import heldout_metrics
from hybridrl.report.comparison import (
    AXES,
    METRICS,
    chart_of,
    differing_settings,
    equal_budgets,
    final_numbers,
    group_runs,
    load_runs,
    short_names,
    write_comparison,
)
from hybridrl.report.picture import draw_chart
from hybridrl.report.run_report import measure as measured
from hybridrl.report.run_report import summarize, write_report
from hybridrl.settings.run import DataConfig
from hybridrl.tracking.console import ConsoleSink
from hybridrl.tracking.jsonl import JsonlSink, read_samples, write_token_samples
from hybridrl.types import FinishReason, RunInfo, Sample, TokenSample

SFT = {
    "model": {"path": "builtin:countdown-student"},
    "teachers": {"main": {"path": "builtin:countdown-teacher"}},
    "algorithm": {
        "imitation_weight": {"kind": "constant", "value": 0.0},
        "reward_weight": {"kind": "constant", "value": 0.0},
        "data_fraction": 1.0,
        "nll_weight": 1.0,
        "pair": {"loss": "none"},
    },
    "data": {"task": "jsonl", "path": "/somewhere/arithmetic.jsonl"},
    "reward": {"functions": {"math": {"function": "math", "weight": 1.0}}},
}
DPO = SFT | {"algorithm": SFT["algorithm"] | {"pair": {"loss": "dpo"}, "nll_weight": 0.0}}


def run_info(run_dir: Path, first_step: int = 0) -> RunInfo:
    return RunInfo(
        run_dir=str(run_dir),
        name="demo",
        total_steps=2,
        first_step=first_step,
        config={},
    )


def write_run(
    run_dir: Path, rows: Sequence[Mapping[str, float]], config: Mapping[str, object]
) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "config.yaml").write_text(json.dumps(config))


SFT_ROWS = [
    {"train/step": 0, "eval/loss": 0.75},
    {"train/step": 1, "nll/token": 0.625, "schedule/lambda": 0.0, "time/step_s": 2.0},
    {"train/step": 2, "nll/token": 0.5, "eval/loss": 0.25, "schedule/lambda": 0.0}
    | {"grad/sparse_norm": 0.5, "time/step_s": 2.0},
]
DPO_ROWS = [
    {"train/step": 0, "eval/loss": 0.7, "eval/pair_accuracy": 0.5, "eval/pair_margin": 0.0},
    {"train/step": 1, "pair/loss": 0.625, "pair/accuracy": 0.75, "pair/margin": 0.25}
    | {"nll/token": 3.0, "schedule/lambda": 0.0, "time/step_s": 2.0},
    {"train/step": 2, "pair/loss": 0.5, "pair/accuracy": 1.0, "pair/margin": 0.5}
    | {"eval/loss": 0.6, "eval/pair_accuracy": 0.875, "eval/pair_margin": 0.125},
]


def console_text(tmp_path: Path, rows: Sequence[Mapping[str, float]]) -> str:
    out = io.StringIO()
    console = ConsoleSink(out)
    console.start(run_info(tmp_path))
    for row in rows:
        console.log(row)
    return out.getvalue()


def test_the_console_of_fine_tuning_shows_its_loss_and_no_reward_weight(tmp_path):
    text = console_text(tmp_path, SFT_ROWS)
    assert "step 1/2  nll/token 0.6250" in text and "lambda" not in text
    assert "step 0  held-out loss 0.7500\n" in text
    assert "step 2  held-out loss 0.2500 (start 0.7500)\n" in text


def test_the_console_of_a_pair_loss_shows_loss_accuracy_and_margin(tmp_path):
    text = console_text(tmp_path, DPO_ROWS)
    assert "step 1/2  loss 0.6250  pairs ranked right 75.0 %  margin 0.250  2.0 s" in text
    assert "held-out loss 0.6000 (start 0.7000), 87.5 % of pairs ranked right, margin 0.125" in text


def test_the_report_of_fine_tuning_has_a_loss_curve_and_names_the_file(tmp_path):
    write_run(tmp_path, SFT_ROWS, SFT)
    page = write_report(tmp_path).read_text()
    assert "Loss on given responses" in page and "Weights of the two goals" not in page
    assert (
        "countdown-student was trained for 2 steps on arithmetic.jsonl "
        "to write the responses that the data gives (their likelihood)." in page
    )
    assert "loss on the held-out data&#x27;s responses went from 0.750 to 0.250." in page
    assert "The reward math was only measured: it has no part in the gradient." in page
    assert "to imitate" not in page and "jsonl problems" not in page and "to earn" not in page


def test_the_report_of_a_pair_loss_has_its_curves_and_what_it_ranked(tmp_path):
    write_run(tmp_path, DPO_ROWS, DPO)
    page = write_report(tmp_path).read_text()
    assert "Pairs ranked right" in page
    assert "prefer the chosen response of each pair in the data over the rejected one" in page
    assert "ranked 50.0 % of the held-out pairs correctly at first, 87.5 % at the end." in page


def test_several_data_sources_are_named_with_their_shares():
    config = {"data": {"task": "countdown", "sources": {"math": {"weight": 3.0}, "sums": {}}}}
    text = " ".join(summarize(measured([{"train/step": 1}]), config))
    assert "math (75%), sums (25%)" in text and "countdown" not in text


@pytest.mark.parametrize(
    ("weight", "reward_weight", "sentence"),
    [
        (1.0, 2.0, "to earn the reward of its own answers (math)"),
        (0.0, 2.0, "The reward math was only measured"),
        (1.0, 0.0, "The reward math was only measured"),
    ],
)
def test_a_reward_is_earned_only_where_both_weights_are_above_zero(weight, reward_weight, sentence):
    config = {
        "algorithm": {"reward_weight": {"kind": "constant", "value": reward_weight}},
        "reward": {"functions": {"math": {"weight": weight}}},
    }
    text = " ".join(summarize(measured([{"train/step": 1}]), config))
    assert sentence in text and (("earn" in text) == (weight * reward_weight > 0))


def test_the_goal_says_which_divergence_and_which_support():
    config = {
        "teachers": {"main": {"path": "org/big-teacher"}},
        "algorithm": {"divergence": "forward_kl", "support": "topk"},
    }
    text = summarize(measured([{"train/step": 1}]), config)[0]
    expected = (
        "imitate big-teacher token by token (forward KL divergence on the most likely tokens)"
    )
    assert expected in text


def sample(uid: str, response: str, reward: float, step: int) -> Sample:
    return Sample(
        step=step,
        uid=uid,
        prompt=f"<|im_start|>user\n{uid}?<|im_end|>\n",
        response=response,
        reward=reward,
        finish_reason=FinishReason.stop,
        question=f"{uid}?",
        answer="42",
    )


def test_samples_are_shown_without_template_tokens_with_references_and_the_most_changed_first(
    tmp_path,
):
    sink = JsonlSink()
    sink.start(run_info(tmp_path))
    sink.log({"train/step": 0})
    sink.log({"train/step": 2})
    sink.samples([sample("same", "a", 1.0, 0), sample("text", "a", 1.0, 0)])
    sink.samples([sample("same", "a", 1.0, 2), sample("text", "b", 1.0, 2)])
    sink.close(0)
    page = write_report(tmp_path).read_text()
    assert "im_start" not in page and page.count("reference answer") == 2 and ">42<" in page
    assert page.index("text?") < page.index("same?")


@pytest.mark.parametrize(
    ("weights", "parts", "reward", "verdict"),
    [
        ({"math": 1.0, "code": 1.0}, {"math": 1.0, "code": math.nan}, 1.0, "right"),
        ({"math": 1.0, "code": 1.0}, {"math": 1.0, "code": 0.0}, 1.0, "partly"),
        ({"math": 0.0}, {"math": 1.0}, 0.0, "right"),
        ({"math": 0.0}, {"math": 0.0}, 0.0, "wrong"),
        ({"math": 2.0, "code": 1.0}, {}, 3.0, "right"),
    ],
)
def test_an_answer_is_right_if_it_has_all_that_the_functions_that_apply_to_it_give(
    tmp_path, weights, parts, reward, verdict
):
    """Functions that do not take its prompt give NaN; if all weights are 0, the first one
    decides.
    """
    sink = JsonlSink()
    sink.start(run_info(tmp_path))
    sink.log({"train/step": 0})
    sink.samples([replace(sample("a", "1", reward, 0), parts=parts)])
    sink.close(0)
    functions = {name: {"weight": weight} for name, weight in weights.items()}
    (tmp_path / "config.yaml").write_text(json.dumps({"reward": {"functions": functions}}))
    page = write_report(tmp_path).read_text()
    assert f'<td class="answer {verdict}">' in page


def test_samples_of_an_earlier_version_are_read_and_show_their_prompt(tmp_path):
    (tmp_path / "samples").mkdir()
    row = {"step": 0, "uid": "a", "prompt": "1+1=", "response": "2", "reward": 1.0}
    line = json.dumps(row | {"finish_reason": "stop"}) + "\n"
    (tmp_path / "samples/step_000000.jsonl").write_text(line)
    assert read_samples(tmp_path)[0][0].answer is None
    write_run(tmp_path, [{"train/step": 0}], {})
    assert "<pre>1+1=</pre>" in write_report(tmp_path).read_text()


def test_a_prompt_keeps_what_a_person_reads_and_the_reference_answer():
    problem = Problem(
        uid="a", prompt="7 9=63:", columns={"answer": 63}, row="a.jsonl:1", responses=("7*9",)
    )
    tokenizer = tiny_tokenizer()
    config = DataConfig()
    (prompt,) = tokenize([problem], tokenizer, config, 50)
    assert (prompt.question, prompt.answer) == ("7 9=63:", "63")
    (prompt,) = tokenize([replace(problem, columns={})], tokenizer, config, 50)
    assert prompt.answer == "7*9"
    (prompt,) = tokenize([replace(problem, columns={}, responses=())], tokenizer, config, 50)
    assert prompt.answer is None


# -- comparison ------------------------------------------------------------------------------------


def two_runs(tmp_path: Path) -> list[Path]:
    for name, last, lr in (("sft", 0.5, 1e-3), ("dpo", 0.75, 1e-4)):
        rows = [
            {"train/step": 0, "eval/accuracy": 0.25},
            {"train/step": 2, "eval/accuracy": last, "reward/mean": last, "kl/token": 0.125},
        ]
        write_run(tmp_path / name, rows, {"run": {"dir": name}, "train": {"lr": lr, "steps": 2}})
    return [tmp_path / "sft", tmp_path / "dpo"]


def test_a_comparison_draws_each_metric_with_one_curve_per_run(tmp_path):
    groups = group_runs(load_runs(two_runs(tmp_path)))
    curves = chart_of(METRICS[0], groups, AXES[0]).drawing.curves
    assert [curve.label for curve in curves] == ["sft", "dpo"]
    assert [curve.y.tolist() for curve in curves] == [[0.25, 0.5], [0.25, 0.75]]
    drawn = [m.key for m in METRICS if chart_of(m, groups, AXES[0]) is not None]
    assert drawn == ["eval/accuracy", "reward/mean", "kl/token"]


def write_seeds(tmp_path: Path) -> list[Path]:
    """Write three runs: a-0 and a-1 differ in their seed; b needs twice the time for half the
    tokens.
    """
    for name, seed, lr, last, tokens, seconds in (
        ("a-0", 0, 1e-3, 0.5, 100, 1.0),
        ("a-1", 1, 1e-3, 0.75, 100, 3.0),
        ("b", 0, 1e-4, 0.5, 50, 4.0),
    ):
        step = {"train/tokens": tokens, "time/step_s": seconds}
        rows = [
            {"train/step": 0, "eval/accuracy": 0.25},
            {"train/step": 1, **step},
            {"train/step": 2, **step, "eval/accuracy": last},
        ]
        config = {"run": {"dir": name, "seed": seed}, "train": {"lr": lr}}
        write_run(tmp_path / name, rows, config)
    return [tmp_path / name for name in ("a-0", "a-1", "b")]


def test_runs_that_differ_in_their_seed_alone_are_one_curve_with_a_band(tmp_path):
    groups = group_runs(load_runs(write_seeds(tmp_path)))
    assert [group.name for group in groups] == ["a-* (2 seeds)", "b"]
    mean, single = chart_of(METRICS[0], groups, AXES[0]).drawing.curves
    assert mean.y.tolist() == [0.25, 0.625]
    assert (mean.low.tolist(), mean.high.tolist()) == ([0.25, 0.5], [0.25, 0.75])
    assert single.low is None
    assert final_numbers(groups, METRICS)[1:] == [
        [
            "Held-out accuracy (eval/accuracy), first to last",
            "25.0 % to 62.5 % (50.0 % to 75.0 %)",
            "25.0 % to 50.0 %",
        ],
        ["wall time of the steps", "4.0 s (2.0 s to 6.0 s)", "8.0 s"],
    ]
    assert differing_settings(groups) == [
        ["run.seed", "0, 1", "0"],
        ["train.lr", "0.001", "0.0001"],
    ]


def test_groups_whose_runs_have_the_same_first_letters_have_different_names(tmp_path):
    """Two learning rates with two seeds each, in the folders of the jobs of a sweep."""
    for number in range(4):
        config = {"run": {"dir": f"s-{number}", "seed": number % 2}, "train": {"lr": number // 2}}
        write_run(tmp_path / f"s-{number}", [{"train/step": 0, "eval/accuracy": 0.5}], config)
    groups = group_runs(load_runs([tmp_path / f"s-{number}" for number in range(4)]))
    assert [group.name for group in groups] == ["s-0 + s-1", "s-2 + s-3"]


def test_runs_without_settings_are_no_group(tmp_path):
    paths = write_seeds(tmp_path)[:2]
    for path in paths:
        (path / "config.yaml").unlink()
    assert [group.name for group in group_runs(load_runs(paths))] == ["a-0", "a-1"]


def test_the_horizontal_axis_is_steps_or_sums_of_tokens_or_of_seconds(tmp_path):
    groups = group_runs(load_runs(write_seeds(tmp_path)))
    places = {
        axis.name: [c.x.tolist() for c in chart_of(METRICS[0], groups, axis).drawing.curves]
        for axis in AXES
    }
    # The two seeds took 2 and 6 seconds, so their mean is at 4.
    assert places == {
        "steps": [[0, 2], [0, 2]],
        "tokens": [[0, 200], [0, 100]],
        "seconds": [[0, 4], [0, 8]],
    }


def test_values_at_equal_cost_are_those_at_what_all_have_reached(tmp_path):
    groups = group_runs(load_runs(write_seeds(tmp_path)))
    # After half of its 200 tokens the first group is half way from 25 % to 62.5 %; after 4 of its 8
    # seconds the other one is half way from 25 % to 50 %.
    assert equal_budgets(groups, METRICS) == [
        ["Held-out accuracy at step 2", "62.5 % (50.0 % to 75.0 %)", "50.0 %"],
        ["Held-out accuracy at 100 tokens", "43.8 % (37.5 % to 50.0 %)", "50.0 %"],
        ["Held-out accuracy after 4.0 s of steps", "62.5 % (50.0 % to 75.0 %)", "37.5 %"],
    ]


def test_a_run_that_did_not_measure_tokens_is_named_and_left_out_of_that_axis(tmp_path):
    paths = write_seeds(tmp_path)[1:]
    write_run(paths[1], [{"train/step": 1, "eval/accuracy": 0.5}], {"run": {"dir": "b"}})
    chart = chart_of(METRICS[0], group_runs(load_runs(paths)), AXES[1])
    assert [curve.label for curve in chart.drawing.curves] == ["a-1"]
    assert chart.caption.endswith("Not measured: b.")


def test_a_comparison_does_not_change_the_report_of_the_first_run(tmp_path):
    first, second = two_runs(tmp_path)
    report = write_report(first)
    before = report.read_bytes()
    path = write_comparison([first, second])
    assert path == first / "comparison.html" and (first / "comparison.png").is_file()
    assert report.read_bytes() == before
    page = path.read_text()
    assert "<tr><th>steps</th><td>2</td><td>2</td></tr>" in page
    assert "<tr><th>train.lr</th><td>0.001</td><td>0.0001</td></tr>" in page
    assert "train.steps" not in page and "run.dir</th>" not in page


def test_settings_that_one_run_lacks_are_named(tmp_path):
    first, second = two_runs(tmp_path)
    config = {"train": {"lr": 1e-3, "steps": 2}, "algorithm": {"gamma": 1}}
    (second / "config.yaml").write_text(json.dumps(config))
    assert differing_settings(group_runs(load_runs([first, second]))) == [
        ["algorithm.gamma", "-", "1"]
    ]


def test_runs_of_equal_directory_names_have_different_short_names(tmp_path):
    paths = [tmp_path / "exp1/run", tmp_path / "exp2/run", tmp_path / "exp1/other"]
    assert short_names(paths) == ["exp1/run", "exp2/run", "other"]
    with pytest.raises(DataError, match="given twice"):
        short_names([paths[0], tmp_path / "exp2/../exp1/run"])


@pytest.mark.parametrize(
    "name", ["$HOME", "cost$^$2", "_a", "a\nb", "a\udcffb", "\x1b[2J", "\N{SNOWMAN}"]
)
def test_a_run_of_any_name_is_reported_and_compared(tmp_path, name: str):
    for run_dir in (tmp_path / name, tmp_path / "other"):
        write_run(run_dir, SFT_ROWS, SFT | {"teachers": {name: {"path": name}}})
    assert write_report(tmp_path / name).is_file()
    assert write_comparison([tmp_path / name, tmp_path / "other"]).is_file()


def test_a_run_whose_name_begins_with_an_underscore_is_in_the_legend(tmp_path):
    for name in ("_a", "b"):
        write_run(tmp_path / name, [{"train/step": 1, "reward/mean": 0.5}], {})
    axes = Figure().add_subplot()
    groups = group_runs(load_runs([tmp_path / "_a", tmp_path / "b"]))
    draw_chart(axes, chart_of(METRICS[3], groups, AXES[0]))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [" _a", "b"]


def test_a_report_replaces_a_link_in_its_place_and_does_not_change_the_target_of_the_link(tmp_path):
    target = tmp_path / "bashrc"
    target.write_text("unchanged")
    runs = [tmp_path / "a", tmp_path / "b"]
    for run_dir in runs:
        write_run(run_dir, SFT_ROWS, SFT)
    for kind in ("report", "comparison"):
        for name in (f"{kind}.html", f"{kind}.png", f".{kind}.html"):
            (runs[0] / name).symlink_to(target)
    for page in (write_report(runs[0]), write_comparison(runs)):
        assert page.read_text().startswith("<!doctype html>") and not page.is_symlink()
    assert target.read_text() == "unchanged"


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "samples/step_000001.jsonl"])
@pytest.mark.parametrize("special", [lambda path: path.symlink_to("/dev/zero"), os.mkfifo])
def test_a_link_or_a_special_file_in_place_of_a_file_of_the_run_is_refused(
    tmp_path, name: str, special
):
    write_run(tmp_path, SFT_ROWS, SFT)
    (tmp_path / "samples").mkdir()
    (tmp_path / name).unlink(missing_ok=True)
    special(tmp_path / name)
    with pytest.raises(RunDirectoryError, match=rf"{name}: is (a link|not a file)"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        [],
        "x",
        {},
        {"train/step": None},
        {"train/step": "1"},
        {"train/step": -1},
        {"train/step": 0.5},
        {"train/step": float("inf")},
        {"train/step": 10**400},
        {"train/step": 1, "eval/accuracy": "high"},
        {"train/step": 1, "eval/accuracy": [0.5]},
        {"train/step": 1, "eval/accuracy": True},
        {"train/step": 1, "eval/accuracy": 10**400},
        {"train/step": 1, "time/step_s": {"a": 1}},
    ],
)
def test_rows_of_other_types_are_named_by_file_and_line(tmp_path, row):
    write_run(tmp_path, [{"train/step": 0, "eval/accuracy": 0.5}, row], SFT)
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: .*; repair or remove the line"):
        write_report(tmp_path)


def token_sample(step: int, log_ratios: tuple[float, ...]) -> TokenSample:
    return TokenSample(
        step=step,
        uid="a",
        prompt="<b>?",
        teacher="main",
        tokens=("<i>", "7"),
        log_ratios=log_ratios,
        reward=1.0,
    )


def test_the_tokens_of_the_first_and_the_last_step_have_colours_and_numbers(tmp_path):
    write_run(tmp_path, SFT_ROWS, SFT)
    assert "Token by token" not in write_report(tmp_path).read_text()
    (tmp_path / "samples").mkdir()
    for step, ratios in ((1, (1.5, -3.0)), (2, (9.0, 9.0)), (3, (0.0, 4.0))):
        write_token_samples(tmp_path, [token_sample(step, ratios)])
    page = write_report(tmp_path).read_text()
    # Half of three nats is half of the full colour, which is 70 %.
    assert (
        '<span style="background:rgb(213 94 0 / 35%)" '
        'title="&#x27;&lt;i&gt;&#x27;: log pi - log q = +1.500">&lt;i&gt;</span>' in page
    )
    assert 'background:rgb(0 114 178 / 70%)" title="&#x27;7&#x27;: log pi - log q = -3.000' in page
    assert "teacher main, mean -0.750 a token, reward 1" in page
    assert "<h3>Step 1</h3>" in page and "<h3>Step 3</h3>" in page and "+9.000" not in page
    assert "<i>7" not in page and "&lt;b&gt;?" in page


@pytest.mark.parametrize(
    "change",
    [{"tokens": "ab"}, {"tokens": [1, 2]}, {"log_ratios": [0.5]}, {"teacher": 3}],
)
def test_tokens_of_other_types_are_named_by_file_and_line(tmp_path, change):
    write_run(tmp_path, SFT_ROWS, SFT)
    (tmp_path / "samples").mkdir()
    write_token_samples(tmp_path, [token_sample(1, (0.5, 0.5))])
    path = tmp_path / "samples/tokens_000001.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | change) + "\n")
    with pytest.raises(DataError, match=r"tokens_000001\.jsonl, line 1: "):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"step": "1"},
        {"uid": 1},
        {"prompt": None},
        {"prompt": ["a"]},
        {"response": {}},
        {"reward": "1"},
        {"finish_reason": "tired"},
        {"finish_reason": []},
        {"question": 3},
        {"answer": 4},
    ],
)
def test_samples_of_other_types_are_named_by_file_and_line(tmp_path, change):
    write_run(tmp_path, SFT_ROWS, SFT)
    good = {"step": 1, "uid": "a", "prompt": "1+1=", "response": "2", "reward": 1.0}
    good |= {"finish_reason": "stop"}
    (tmp_path / "samples").mkdir()
    path = tmp_path / "samples" / "step_000001.jsonl"
    path.write_text(f"{json.dumps(good)}\n{json.dumps(good | change)}\n")
    with pytest.raises(DataError, match=r"step_000001\.jsonl, line 2: "):
        write_report(tmp_path)
    path.rename(path.with_name("step_1 (copy).jsonl"))
    assert write_report(tmp_path).is_file(), "files of other names are not a run's"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ([], "is not a mapping of settings"),
        ({"teachers": [1]}, r"teachers is \[1\], not a section"),
        ({"teachers": {"a": 3}}, r"teachers\.a is 3, not a section"),
        ({"teachers": {"a": {"path": 3}}}, r"teachers\.a\.path is 3"),
        ({"reward": {"functions": "x"}}, r"reward\.functions is 'x', not a section"),
        ({"reward": {"functions": {"f": {"weight": "x"}}}}, r"reward\.functions\.f\.weight is 'x'"),
        (
            {"reward": {"functions": {"f": {"weight": None}}}},
            r"reward\.functions\.f\.weight is None",
        ),
        ({"algorithm": {"reward_weight": 2}}, r"algorithm\.reward_weight is 2, not a section"),
        ({"model": {"path": ["a"]}}, r"model\.path is \['a'\]"),
        ({"model": {"path": "${oc.env:HOME}"}}, r"model\.path: holds a reference"),
    ],
)
def test_settings_of_other_types_are_named(tmp_path, config, reason: str):
    write_run(tmp_path, SFT_ROWS, config)
    with pytest.raises(DataError, match=rf"config\.yaml: {reason}.*; correct the file") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)


def test_sections_that_are_null_or_missing_are_left_out(tmp_path):
    empty = {"teachers": {"a": None}, "reward": {"functions": {"f": None}}, "algorithm": None}
    write_run(tmp_path, SFT_ROWS, empty)
    assert write_report(tmp_path).is_file()
    (tmp_path / "config.yaml").unlink()
    assert write_report(tmp_path).is_file()


def test_a_directory_without_metrics_cannot_be_compared(tmp_path):
    first, _ = two_runs(tmp_path)
    with pytest.raises(DataError, match="nothing to compare"):
        write_comparison([first, tmp_path / "nothing"])


# -- held-out data ---------------------------------------------------------------------------------


def test_held_out_metrics_report_the_pair_loss_and_not_its_surrogate():
    assert heldout_metrics({"tokens": 4.0, "train/loss": 0.5, "kl/token": 0.25}) == {
        "eval/loss": 0.5,
        "eval/kl_token": 0.25,
    }
    pairs = {"tokens": 4.0, "train/loss": -3.0, "pair/loss": 0.625, "pair/accuracy": 0.75}
    assert heldout_metrics(pairs | {"pair/margin": 0.5}) == {
        "eval/loss": 0.625,
        "eval/pair_accuracy": 0.75,
        "eval/pair_margin": 0.5,
    }
    assert heldout_metrics({"tokens": 0.0, "train/loss": 0.0}) == {}
    assert math.isfinite(heldout_metrics({"tokens": 1.0, "train/loss": 0.0})["eval/loss"])
