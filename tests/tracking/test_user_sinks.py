"""A sink in a user's file receives the same data as the run's own sinks, and cannot harm them."""

import csv
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hybridrl.cli import main
from hybridrl.core.errors import ConfigError
from hybridrl.launch.session import make_sinks, run_info
from hybridrl.settings.choices import WandbMode
from hybridrl.settings.compose import load_config, to_yaml
from hybridrl.settings.run import RunSettings, SinkConfig, TrackingConfig
from hybridrl.tracking.jsonl import read_metrics
from hybridrl.tracking.user_sinks import build_sinks, check_sinks
from hybridrl.types import RunInfo

README = Path(__file__).parent.parent.parent / "hybridrl" / "tracking" / "README.md"

QUIET = """
class Quiet:
    def start(self, info): ...
    def log(self, metrics): ...
    def samples(self, rows): ...
    def close(self, exit_code): ...

class Fails(Quiet):
    def __init__(self, how):
        self.how = how
    def log(self, metrics):
        if metrics["train/step"] == 1:
            if self.how == "exit":
                raise SystemExit(0)
            raise OSError("the tracker's server is gone")

class Empties(Quiet):
    def log(self, metrics):
        metrics.clear()

class Records(Quiet):
    rows = []
    def log(self, metrics):
        self.rows.append(metrics)

class Keeps(Quiet):
    name = "keeps"
    run_id = None
    def load_state_dict(self, state):
        self.run_id = state
    def state_dict(self):
        return self.run_id or "new"

class KeepsNothing(Keeps):
    name = "nothing"
    def state_dict(self):
        raise KeyError("no run")

class Takes(Quiet):
    def rollouts(self, rows): ...

class TakesNothing(Quiet):
    def rollouts(self): ...

class NoSamples:
    def start(self, info): ...
    def log(self, metrics): ...
    def close(self, exit_code): ...

class NoArgument(Quiet):
    def log(self): ...

class Waits(Quiet):
    async def log(self, metrics): ...

class NeedsUrl(Quiet):
    def __init__(self, url, *, port=80): ...

class CannotBeBuilt(Quiet):
    def __init__(self):
        raise OSError("no route to the server")

def function(info): ...
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "tracker.py"
    path.write_text(QUIET)
    return path


def settings_with(run_dir: Path, *sinks: str) -> RunSettings:
    run_dir.mkdir(exist_ok=True)
    base = ["experiment=quickstart", f"run.dir={run_dir}", "tracking.wandb=disabled"]
    return load_config([*base, *(f"+tracking.sinks.{sink}" for sink in sinks)])


def info(settings: RunSettings, first_step: int = 0) -> RunInfo:
    return replace(run_info(settings, Path(settings.run.dir), None), first_step=first_step)


def test_the_tracker_of_the_readme_writes_what_the_run_logs_and_follows_it_back_to_a_checkpoint(
    tmp_path: Path,
) -> None:
    code, command = re.findall(r"```(?:python|bash)\n(.*?)```", README.read_text(), re.DOTALL)[:2]
    (tmp_path / "csv_tracker.py").write_text(code)
    [setting] = re.findall(r"'\+tracking\.sinks\.(.*)'", command)
    settings = settings_with(
        tmp_path / "run", setting.replace("csv_tracker.py", f"{tmp_path}/csv_tracker.py")
    )
    _, sinks = make_sinks(settings)
    sinks.start(info(settings))
    for step in range(4):
        sinks.log({"train/step": step, "reward/mean": step / 4, "train/loss": 1.0})
    sinks.start(info(settings, first_step=2))
    sinks.log({"train/step": 3, "reward/mean": 0.5})
    sinks.close(0)
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["train/step", "reward/mean"],
            ["0", "0.0"],
            ["1", "0.25"],
            ["2", "0.5"],
            ["3", "0.5"],
        ]


@pytest.mark.parametrize(
    ("how", "reason"), [("raise", "the tracker's server is gone"), ("exit", "SystemExit: 0")]
)
def test_a_sink_that_fails_is_named_in_a_warning_and_the_others_keep_their_rows(
    tmp_path: Path, user_file: Path, caplog: pytest.LogCaptureFixture, how: str, reason: str
) -> None:
    settings = settings_with(
        tmp_path / "run",
        f"a={{sink: '{user_file}:Fails', options: {{how: {how}}}}}",
        f"b={user_file}:Empties",
        f"c={user_file}:Records",
    )
    _, sinks = make_sinks(settings)
    sinks.start(info(settings))
    rows = [{"train/step": step, "reward/mean": 0.5} for step in range(3)]
    with caplog.at_level(logging.WARNING):
        for row in rows:
            sinks.log(row)
    sinks.close(0)
    assert read_metrics(tmp_path / "run") == rows
    assert build_sinks(settings.tracking)["tracking.sinks.c"].rows == rows
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith("tracking.sinks.a failed and is off for the rest of the run: ")
    assert reason in warning


def test_a_sink_may_keep_an_id_in_the_checkpoint_and_one_that_cannot_does_not_end_the_run(
    tmp_path: Path, user_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_with(
        tmp_path / "run", f"a={user_file}:KeepsNothing", f"b={user_file}:Keeps"
    )
    _, sinks = make_sinks(settings)
    assert sinks.state_dict() == {"keeps": "new"}
    assert "tracking.sinks.a failed and is off for the rest of the run: KeyError" in caplog.text
    sinks.load_state_dict({"keeps": "of-the-checkpoint"})
    assert sinks.state_dict() == {"keeps": "of-the-checkpoint"}


@pytest.mark.parametrize(
    ("sink", "options", "sentence"),
    [
        ("{file}:NoSamples", {}, "the class has no method samples; write def samples(self, rows)"),
        (
            "{file}:NoArgument",
            {},
            "its method log must take one argument beside self; write def log(self, metrics)",
        ),
        (
            "{file}:Waits",
            {},
            "its method log is async, and it is called without await; write def log(self, metrics)",
        ),
        ("{file}:Missing", {}, "has no Missing; name a class that the file defines"),
        ("{file}:function", {}, "must be a class; name a class that the file defines"),
        ("{file}:TakesNothing", {}, "write def rollouts(self, rows)"),
        ("tracker.Tracker", {}, "or write path/to/file.py:Class for your own"),
        ("/nowhere/tracker.py:Tracker", {}, "there is no file /nowhere/tracker.py;"),
        ("{file}:NeedsUrl", {"uri": "a"}, "options.uri: .*NeedsUrl takes no such argument; remove"),
        ("{file}:NeedsUrl", {}, r"give each argument of \(url, \*, port=80\) that has no default"),
    ],
)
def test_a_sink_that_cannot_work_is_refused_in_one_sentence(
    user_file: Path, sink: str, options: dict[str, str], sentence: str
) -> None:
    entry = SinkConfig(sink=sink.format(file=user_file), options=options)
    pattern = sentence if options or "url" in sentence else re.escape(sentence)
    with pytest.raises(ConfigError, match=rf"^tracking\.sinks\.mine\..*{pattern}"):
        check_sinks(TrackingConfig(sinks={"mine": entry}))


def test_rollouts_that_no_tracker_takes_are_refused(user_file: Path) -> None:
    quiet = {"mine": SinkConfig(sink=f"{user_file}:Quiet")}
    takes = {"mine": SinkConfig(sink=f"{user_file}:Takes")}
    off = WandbMode.disabled
    with pytest.raises(
        ConfigError,
        match=r"^tracking\.rollouts_every=5: needs a tracker that takes them; set tracking\.wandb=",
    ):
        check_sinks(TrackingConfig(wandb=off, sinks=quiet, rollouts_every=5))
    check_sinks(TrackingConfig(wandb=off, sinks=takes, rollouts_every=5))
    check_sinks(TrackingConfig(wandb=WandbMode.offline, sinks=quiet, rollouts_every=5))
    check_sinks(TrackingConfig(wandb=off, sinks=quiet))


@pytest.mark.parametrize("wrong", [{"rollouts_every": -1}, {"rollouts": 0}])
def test_numbers_of_rollouts_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"^tracking\.rollouts_every=.*at least 0 and at least 1"):
        TrackingConfig(**wrong)


def test_a_dry_run_checks_the_sinks_and_builds_none(
    tmp_path: Path, user_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--dry-run", "experiment=quickstart", f"run.dir={tmp_path / 'run'}"]
    assert main([*command, f"+tracking.sinks.mine={user_file}:NoSamples"]) == 2
    assert "the class has no method samples" in capsys.readouterr().err
    check_sinks(TrackingConfig(sinks={"mine": SinkConfig(sink=f"{user_file}:CannotBeBuilt")}))


def test_a_sink_that_cannot_be_built_ends_the_start_in_one_sentence(user_file: Path) -> None:
    entry = SinkConfig(sink=f"{user_file}:CannotBeBuilt")
    with pytest.raises(ConfigError, match="raised OSError: no route to the server; correct the"):
        build_sinks(TrackingConfig(sinks={"mine": entry}))


def test_a_secret_among_a_sinks_options_is_masked_in_the_saved_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKER_ADDRESS", "canary-0a1b2c3d4e")
    sink = "mine={sink: 'a.py:B', options: {url: '${oc.env:TRACKER_ADDRESS}'}}"
    settings = settings_with(tmp_path / "run", sink)
    assert settings.tracking.sinks["mine"].options == {"url": "canary-0a1b2c3d4e"}
    assert "canary" not in to_yaml(settings) and "url: '***'" in to_yaml(settings)


def test_an_entry_that_is_no_class_or_an_unknown_setting_of_one_is_answered_with_the_right_form(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"write tracking\.sinks\.mine=FILE\.py:CLASS or"):
        settings_with(tmp_path, "mine=3")
    with pytest.raises(ConfigError, match=r"did you mean tracking\.sinks\.mine\.options"):
        settings_with(tmp_path, "mine.option=3")
