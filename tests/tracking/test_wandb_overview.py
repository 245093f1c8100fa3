"""The view that a run adds to a project in Weights & Biases: made by the real library, and saved at
a local stand-in for the server.
"""

import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from hybridrl.settings.choices import WandbMode
from hybridrl.settings.run import TrackingConfig
from hybridrl.tracking.glossary import explain
from hybridrl.tracking.wandb_overview import PARTS, SavingOverview, main, save_overview
from hybridrl.tracking.wandb_sink import WandbSink
from hybridrl.types import RunInfo
from tests.support.wandb_server import LocalWandb, running

SETTINGS = {"model": {"path": "builtin:student"}, "train": {"lr": 0.001}, "run": {"seed": 3}}
VIEW = ("me/hybridrl", "nw-hybridrl-v")


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalWandb]:
    """A running stand-in with an account, shared because wandb reads the environment only once in a
    process.
    """
    home = tmp_path_factory.mktemp("home")
    wandb.teardown()
    with pytest.MonkeyPatch.context() as patch, running(LocalWandb()) as server:
        patch.delenv("WANDB_MODE", raising=False)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("WANDB_BASE_URL", server.url)
        patch.setenv("WANDB_API_KEY", "0" * 40)
        for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(home))
        yield server
        wandb.teardown()


@pytest.fixture
def server(account: LocalWandb) -> LocalWandb:
    """The stand-in without any view."""
    account.views = {}
    account.asked_for_views = 0
    account.refusal = ""
    return account


def plots(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The configuration of each diagram of a view, by the diagram's title."""
    sections = spec["section"]["panelBankConfig"]["sections"]
    found = [panel["config"] for section in sections for panel in section["panels"]]
    return {config["chartTitle"]: config for config in found}


def tracked(run_dir: Path, tracking: TrackingConfig) -> None:
    """Track a run of one step."""
    sink = WandbSink(tracking)
    info = RunInfo(run_dir=str(run_dir), name="a", total_steps=1, first_step=0, config=SETTINGS)
    sink.start(info)
    sink.log({"train/step": 1})
    sink.close(0)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_every_metric_of_the_overview_is_explained_in_the_glossary() -> None:
    keys = [key for part in PARTS for plot in part.plots for key in plot.keys]
    known = {key: explain(key) for key in keys}
    assert [key for key, metric in known.items() if metric is None] == []
    forms = {key: metric.key for key, metric in known.items() if metric and "<" in key}
    assert [key for key, form in forms.items() if key != form] == []
    assert len(set(keys)) == len(keys)


def test_a_diagram_of_a_form_of_metrics_finds_them_by_a_regular_expression(
    server: LocalWandb,
) -> None:
    save_overview("me", "hybridrl")
    accuracy = plots(json.loads(server.views[VIEW]["spec"]))["Held-out accuracy"]
    assert accuracy["useMetricRegex"] and accuracy["metrics"] == []
    rows = ["eval/accuracy", "eval/hard/accuracy", "eval/accuracy_stderr", "eval/hard/loss"]
    found = [key for key in rows if re.search(accuracy["metricRegex"], key)]
    assert found == ["eval/accuracy", "eval/hard/accuracy"]


def test_a_run_online_saves_the_overview_once_in_its_project(
    server: LocalWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracking = TrackingConfig(wandb=WandbMode.online)
    tracked(tmp_path / "a", tracking)
    assert list(server.views) == [VIEW]
    assert server.views[VIEW]["displayName"] == "hybridrl overview"
    spec = json.loads(server.views[VIEW]["spec"])
    assert spec["section"]["settings"]["xAxis"] == "train/step"
    sections = spec["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [part.title for part in PARTS]
    reward = plots(spec)["Training reward"]
    assert (reward["xAxis"], reward["metrics"]) == ("train/step", ["reward/mean"])
    assert plots(spec)["Gradient by its parts"]["yLogScale"]
    server.views[VIEW]["spec"] = '{"version": 7}'  # as if a user had changed it with a newer app
    tracked(tmp_path / "b", tracking)
    assert server.asked_for_views == 2
    assert server.views == {VIEW: {"displayName": "hybridrl overview", "spec": '{"version": 7}'}}
    assert warnings(caplog) == []


def test_a_run_goes_on_where_the_overview_is_refused_with_one_warning(
    server: LocalWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.refusal = "views are out of order"
    tracked(tmp_path, TrackingConfig(wandb=WandbMode.online))
    [warning] = warnings(caplog)
    assert "views are out of order" in warning
    assert "`python -m hybridrl.tracking.wandb_overview me/hybridrl` saves it later" in warning


def test_the_end_of_a_run_waits_for_the_overview_only_so_long(
    server: LocalWandb, caplog: pytest.LogCaptureFixture
) -> None:
    server.release.clear()
    saving = SavingOverview("me", "hybridrl")
    saving.wait(0)
    server.release.set()
    saving.wait(30)
    [warning] = warnings(caplog)
    assert "the overview was not saved (the server does not answer)" in warning


def test_no_overview_is_asked_for_without_the_setting_or_offline(
    server: LocalWandb, tmp_path: Path
) -> None:
    tracked(tmp_path / "a", TrackingConfig(wandb=WandbMode.online, overview=False))
    tracked(tmp_path / "b", TrackingConfig(wandb=WandbMode.offline))
    assert (server.asked_for_views, server.views) == (0, {})


def test_without_its_package_a_run_goes_on_with_a_sentence(
    server: LocalWandb,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    tracked(tmp_path, TrackingConfig(wandb=WandbMode.online))
    [warning] = warnings(caplog)
    assert warning == (
        "tracking.overview=true: it needs the package wandb-workspaces, which is not installed; "
        "pip install 'hybridrl[overview]', or set tracking.overview=false"
    )


def test_the_command_saves_the_overview_of_a_project_later(
    server: LocalWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["me/other"])
    assert list(server.views) == [("me/other", "nw-hybridrl-v")]
    assert capsys.readouterr().out == f"{server.url}/me/other?nw=hybridrl\n"
    main(["me/other"])
    assert capsys.readouterr().out == "me/other has the view already\n"
    with pytest.raises(SystemExit, match="OWNER/PROJECT"):
        main(["other"])
    assert save_overview("me", "other") is None
