"""A run whose steps teach nothing warns, and names the setting to change."""

import io
import math
from pathlib import Path

import numpy as np
import pytest

from hybridrl.controller.metrics import reward_metrics
from hybridrl.report.run_report import write_report
from hybridrl.tracking.console import ConsoleSink
from hybridrl.tracking.jsonl import JsonlSink
from hybridrl.tracking.symptoms import Watch, watch
from hybridrl.types import Rewards, RunInfo

LEARNS = {
    "rollout/truncated_frac": 0.5,
    "rollout/length_mean": 7.0,
    "rollout/eos_frac": 0.5,
    "reward/mean": 0.3,
    "reward/stderr": 0.1,
    "schedule/lambda": 1.0,
    "train/grad_norm": 0.2,
}
CUT = {"rollout/truncated_frac": 0.51}
EMPTY = {"rollout/length_mean": 1.0, "rollout/eos_frac": 1.0}
EQUAL = {"reward/mean": 0.0, "reward/stderr": 0.0}
STILL = {"train/grad_norm": 0.0}
PREEMPTED = {"engine/rollout/preemptions": 3.0}


def row(step: int, *changes: dict[str, float]) -> dict[str, float]:
    metrics: dict[str, float] = {"train/step": step, **LEARNS}
    for change in changes:
        metrics |= change
    return metrics


def info(folder: Path, first_step: int = 0) -> RunInfo:
    return RunInfo(
        run_dir=str(folder),
        name="demo",
        total_steps=9,
        first_step=first_step,
        config={},
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([CUT], "most responses were cut at rollout.max_new_tokens (raise it and rollout.max_mod"),
        ([EMPTY], "most responses were empty (check in the report how a prompt ends, and set"),
        ([EQUAL], "all rewards were equal (check in the report how reward.functions score the"),
        ([STILL], "the gradient was 0 (raise algorithm.imitation_weight, algorithm.reward_wei"),
        (
            [PREEMPTED],
            "responses were begun again because an engine's KV cache was full (lower "
            "rollout.max_num_seqs, or raise rollout.kv_cache_bytes or rollout.gpu_memory_util",
        ),
        (
            [{"engine/scorer-main/preemptions": 1.0}],
            "responses were begun again because an engine's KV cache was full (lower",
        ),
    ],
)
def test_a_step_that_teaches_nothing_or_is_slow_is_told_once_with_the_setting_to_change(
    changes: list[dict[str, float]], expected: str
) -> None:
    seen = Watch()
    assert seen.see(row(1)) is None
    sentence = seen.see(row(2, *changes))
    assert sentence is not None and sentence.startswith(f"in step 2 {expected}")
    assert seen.see(row(3, *changes)) is None
    assert expected.split(" (")[0] + " in 2 of 3 steps (" in (seen.summary() or "")


@pytest.mark.parametrize(
    "harmless",
    [
        row(1),
        {"train/step": 1},  # imitation alone has no reward
        row(1, EQUAL, {"schedule/lambda": 0.0}),  # a reward that is only watched
        row(
            1, {"reward/mean": math.nan, "reward/stderr": math.nan}
        ),  # there is only one response, or none was scored
        row(1, {"rollout/length_mean": 1.0, "rollout/eos_frac": 0.0}),  # one token requested
        row(0, CUT, EQUAL, STILL),  # an evaluation
        row(1, {"engine/rollout/preemptions": 0.0, "engine/rollout/waiting": 9.0}),
    ],
)
def test_a_step_that_may_teach_something_is_not_told(harmless: dict[str, float]) -> None:
    seen = Watch()
    assert seen.see(harmless) is None and seen.summary() is None


def test_several_symptoms_are_one_sentence_with_the_cause_first() -> None:
    seen = Watch()
    first = seen.see(row(1, STILL, EQUAL))
    assert first is not None and first.index("rewards were equal") < first.index("gradient was 0")
    later = seen.see(row(2, CUT, STILL))
    assert later is not None and "cut" in later and "gradient" not in later
    assert watch([row(1, CUT), row(2, STILL)]).summary().count(" in 1 of 2 steps (") == 2


def test_a_single_odd_step_of_many_is_not_in_the_summary() -> None:
    assert watch([row(1, CUT), *(row(s) for s in range(2, 12))]).summary() is None
    assert watch([row(1, CUT), *(row(s) for s in range(2, 11))]).summary() is not None


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3])
def test_equal_rewards_are_seen_in_what_a_step_logs_of_them(value: float) -> None:
    rewards = Rewards(
        uids=("a", "b"),
        values=np.full(8, value, np.float32),
        parts=np.full((1, 8), value, np.float32),
        part_names=("m",),
        errors=np.zeros(8, bool),
        keep=np.ones(8, bool),
        compressed=np.ones(8, np.float32),
        repeated=np.zeros(8, np.float32),
    )
    logged = {"train/step": 1, "schedule/lambda": 1.0, **reward_metrics([rewards])}
    assert "all rewards were equal" in (Watch().see(logged) or "")
    rewards.values[0] += 0.01
    assert Watch().see({**logged, **reward_metrics([rewards])}) is None


def test_the_console_warns_at_the_step_and_at_the_end_and_the_report_at_its_top(
    tmp_path: Path,
) -> None:
    out = io.StringIO()
    console = ConsoleSink(out)
    rows = JsonlSink()
    for sink in (rows, console):
        sink.start(info(tmp_path))
        for logged in (row(0), row(1, CUT), row(2, CUT)):
            sink.log(logged)
        sink.close(0)
    lines = [line for line in out.getvalue().splitlines() if line.startswith("warning: ")]
    summary = (
        "most responses were cut at rollout.max_new_tokens in 2 of 2 steps (raise it and "
        "rollout.max_model_len)"
    )
    assert len(lines) == 2 and lines[1] == f"warning: {summary}"
    page = write_report(tmp_path).read_text()
    assert page.index(f"Warning: {summary}.") < page.index('class="summary"')


def test_a_resumed_run_counts_the_steps_before_it_and_warns_of_nothing_twice(
    tmp_path: Path,
) -> None:
    rows = JsonlSink()
    rows.start(info(tmp_path))
    rows.log(row(1, CUT))
    rows.close(0)
    out = io.StringIO()
    console = ConsoleSink(out)
    console.start(info(tmp_path, first_step=1))
    console.log(row(2, CUT))
    console.log(row(3))
    assert "warning" not in out.getvalue()
    console.close(0)
    assert (
        "warning: most responses were cut at rollout.max_new_tokens in 2 of 3 steps"
        in out.getvalue()
    )
