"""The Prometheus gauges of a run, and the Grafana dashboard that reads them."""

import json
import re
from pathlib import Path

import pytest

from hybridrl.runtime.prometheus_sink import gauge_name
from hybridrl.settings.run import SinkConfig
from hybridrl.tracking.user_sinks import load_sink_class

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana.json"


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


def test_the_panels_of_the_dashboard_do_not_overlap():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    cells = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(panels) == 18
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) == 23


def test_the_word_ray_names_the_sink():
    assert load_sink_class("metrics", SinkConfig(sink="ray")).__name__ == "PrometheusSink"
