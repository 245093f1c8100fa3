"""The gauges of a run, and the dashboard that reads them."""

import json
import re
from pathlib import Path

import pytest

from hybridrl.runtime.prometheus_sink import gauge_name
from hybridrl.settings.run import SinkConfig
from hybridrl.tracking.glossary import explain
from hybridrl.tracking.user_sinks import load_sink_class

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana.json"
METRICS = [
    "train/step",
    "reward/mean",
    "eval/accuracy",
    "kl/token",
    "entropy/token",
    "train/grad_norm",
    "train/lr",
    "rollout/length_mean",
    "rollout/length_p95",
    "rollout/truncated_frac",
    "policy/logprob_gap",
    "perf/tokens_per_s",
    "time/step_s",
    "time/rollout_s",
    "time/reward_s",
    "time/score_s",
    "time/learn_s",
    "time/sync_s",
    "time/eval_s",
    "time/save_s",
    "cluster/restarts",
]


@pytest.mark.parametrize(
    ("metric", "gauge"),
    [
        ("reward/mean", "hybridrl_reward_mean"),
        ("eval/hard/pass_at_4", "hybridrl_eval_hard_pass_at_4"),
        ("reward/my-judge/mean", "hybridrl_reward_my_judge_mean"),
    ],
)
def test_a_metric_has_a_name_that_prometheus_takes(metric: str, gauge: str):
    assert gauge_name(metric) == gauge
    assert re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", gauge)


def test_the_dashboard_asks_for_gauges_of_metrics_that_a_run_has():
    dashboard = json.loads(DASHBOARD.read_text())
    asked = {
        expression
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for expression in re.findall(r"ray_(\w+)\{", target["expr"])
    }
    assert asked == {gauge_name(metric) for metric in METRICS}
    assert all(explain(metric) is not None for metric in METRICS)
    run = next(v for v in dashboard["templating"]["list"] if v["name"] == "run")
    assert f"ray_{gauge_name('train/step')}" in run["query"]


def test_the_panels_of_the_dashboard_do_not_overlap():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    cells = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(panels) == 12
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) == 23


def test_the_word_ray_names_the_sink():
    assert load_sink_class("metrics", SinkConfig(sink="ray")).__name__ == "PrometheusSink"
