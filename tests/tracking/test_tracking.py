"""Tracking: no measurement of a run is lost, duplicated or misreported."""

import io
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import wandb

from hybridrl.core import redact
from hybridrl.core.errors import ConfigError, DataError
from hybridrl.report.run_report import measure, write_report
from hybridrl.settings.choices import WandbMode
from hybridrl.settings.run import TrackingConfig
from hybridrl.tracking.console import ConsoleSink, duration, set_lines
from hybridrl.tracking.glossary import explain
from hybridrl.tracking.jsonl import JsonlSink, read_metrics, read_samples
from hybridrl.tracking.sink import Sinks
from hybridrl.tracking.timing import PhaseClock
from hybridrl.tracking.wandb_internals import server_address
from hybridrl.tracking.wandb_sink import WandbSink, resolve_mode, unreachable
from hybridrl.types import FinishReason, RunInfo, Sample

CONFIG = """\
model: {path: "builtin:countdown-student"}
teachers: {main: {path: "builtin:countdown-teacher", weight: 1.0}}
algorithm:
  imitation_weight: {kind: constant, value: 1.0}
  reward_weight: {kind: linear, value: 0.0, end: 1.0, steps: 2}
  gamma: 0.0
data: {task: countdown}
reward: {functions: {countdown: {function: countdown, weight: 1.0}}}
"""


SETTINGS = {"model": {"path": "builtin:student"}, "train": {"lr": 0.001}, "run": {"seed": 3}}
"""The settings from which the name of a run is made."""


def info(run_dir: Path, *, first_step: int = 0, total_steps: int = 4) -> RunInfo:
    return RunInfo(
        run_dir=str(run_dir),
        name="demo",
        total_steps=total_steps,
        first_step=first_step,
        config=SETTINGS,
    )


def sample(step: int, response: str = "1+2", reward: float = 1.0) -> Sample:
    return Sample(
        step=step,
        uid="held-0",
        prompt="1 2=3:",
        response=response,
        reward=reward,
        finish_reason=FinishReason.stop,
    )


def write_rows(run_dir: Path, rows: Sequence[Mapping[str, float]], first_step: int = 0) -> None:
    sink = JsonlSink()
    sink.start(info(run_dir, first_step=first_step))
    for row in rows:
        sink.log(row)
    sink.close(0)


class RecordingSink:
    def __init__(self, fails_at: str = "") -> None:
        self.events: list[str] = []
        self._fails_at = fails_at

    def _record(self, event: str) -> None:
        self.events.append(event)
        if event == self._fails_at:
            raise OSError("disk full")

    def start(self, info: RunInfo) -> None:
        self._record("start")

    def log(self, metrics: Mapping[str, float]) -> None:
        self._record("log")

    def samples(self, rows: Sequence[Sample]) -> None:
        self._record("samples")

    def close(self, exit_code: int) -> None:
        self._record("close")


def test_metrics_read_back_as_written(tmp_path):
    write_rows(
        tmp_path, [{"train/step": 1, "reward/mean": 0.25}, {"train/step": 2, "reward/mean": 0.5}]
    )
    assert read_metrics(tmp_path) == [
        {"train/step": 1, "reward/mean": 0.25},
        {"train/step": 2, "reward/mean": 0.5},
    ]


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    sink = JsonlSink()
    sink.start(info(tmp_path))
    sink.log({"train/step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"train/step": 1}\n'
    sink.close(0)


def test_nan_and_infinity_become_null_and_read_as_nan(tmp_path):
    write_rows(tmp_path, [{"train/step": 1, "a": math.nan, "b": -math.inf, "c": 1.5}])
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "train/step": 1,
        "a": None,
        "b": None,
        "c": 1.5,
    }
    row = read_metrics(tmp_path)[0]
    assert math.isnan(row["a"]) and math.isnan(row["b"]) and row["c"] == 1.5


def test_resume_cuts_rows_and_samples_after_the_checkpoint_and_a_torn_line(tmp_path):
    write_rows(tmp_path, [{"train/step": s, "x": 10 + s} for s in range(4)])
    sink = JsonlSink()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"train/step": 4, "x"')
    (tmp_path / "samples/step_000003.jsonl").write_text("")
    (tmp_path / "samples/step_000002.jsonl").write_text("")
    sink.start(info(tmp_path, first_step=2))
    sink.log({"train/step": 3, "x": 23})
    sink.close(0)
    assert [(r["train/step"], r["x"]) for r in read_metrics(tmp_path)] == [
        (0, 10),
        (1, 11),
        (2, 12),
        (3, 23),
    ]
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["step_000002.jsonl"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_that_starts_over_keeps_no_old_row(tmp_path):
    write_rows(tmp_path, [{"train/step": 0}, {"train/step": 1}])
    write_rows(tmp_path, [{"train/step": 0}], first_step=0)
    assert [r["train/step"] for r in read_metrics(tmp_path)] == [0]


def test_a_torn_last_line_is_not_read_and_a_damaged_earlier_one_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"train/step": 1}\n{"train')
    assert read_metrics(tmp_path) == [{"train/step": 1}]
    (tmp_path / "metrics.jsonl").write_text('{"train/step": 1}\n{"train\n{"train/step": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(tmp_path)


def test_samples_read_back_per_evaluation_with_a_failed_reward_as_nan(tmp_path):
    sink = JsonlSink()
    sink.start(info(tmp_path))
    sink.samples([sample(0, "line one\nline\u2028two", math.nan)])
    sink.samples([sample(20)])
    sink.close(0)
    first, last = read_samples(tmp_path)
    assert first[0].response == "line one\nline\u2028two" and math.isnan(first[0].reward)
    assert last == [sample(20)]


def test_the_values_of_a_samples_reward_functions_read_back_and_may_be_missing(tmp_path):
    sink = JsonlSink()
    sink.start(info(tmp_path))
    sink.samples([replace(sample(0), parts={"countdown": 1.0, "brief": math.nan})])
    sink.close(0)
    path = tmp_path / "samples" / "step_000000.jsonl"
    assert json.loads(path.read_text())["parts"] == {"countdown": 1.0, "brief": None}
    [[read]] = read_samples(tmp_path)
    assert read.parts["countdown"] == 1.0 and math.isnan(read.parts["brief"])
    path.write_text(path.read_text().replace('{"countdown": 1.0, "brief": null}', "3"))
    with pytest.raises(DataError, match="parts is not an object"):
        read_samples(tmp_path)


def test_rollouts_reach_the_sinks_that_take_them():
    class Taking(RecordingSink):
        def rollouts(self, rows: Sequence[Sample]) -> None:
            self.events.append(f"{len(rows)} rollouts")

    taking = Taking()
    other = RecordingSink()
    Sinks(required=[other], optional={"taking": taking}).rollouts([sample(1), sample(1)])
    assert (taking.events, other.events) == (["2 rollouts"], [])


def test_sinks_switch_off_a_failing_optional_sink_with_one_warning(caplog):
    good = RecordingSink()
    bad = RecordingSink(fails_at="log")
    sinks = Sinks(required=[good], optional={"bad": bad})
    sinks.start(info(Path()))
    sinks.log({"train/step": 1})
    sinks.log({"train/step": 2})
    sinks.samples([sample(2)])
    sinks.close(0)
    assert good.events == ["start", "log", "log", "samples", "close"]
    assert bad.events == ["start", "log"]
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "disk full" in caplog.text


def test_a_required_sink_s_error_propagates_and_close_still_reaches_every_sink():
    first = RecordingSink(fails_at="close")
    second = RecordingSink()
    optional = RecordingSink()
    with pytest.raises(OSError, match="disk full"):
        Sinks(required=[first, second], optional={"last": optional}).close(1)
    assert [s.events for s in (first, second, optional)] == [["close"]] * 3
    with pytest.raises(OSError, match="disk full"):
        Sinks(required=[RecordingSink(fails_at="log")]).log({"train/step": 1})


@pytest.fixture
def no_wandb_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


def test_wandb_auto_is_online_only_with_a_key(no_wandb_account, monkeypatch, tmp_path):
    wandb.teardown()  # because wandb reads its settings only once per process
    assert resolve_mode(WandbMode.auto) is WandbMode.offline
    for host in ("api.wandb.ai", urlsplit(wandb.Settings().base_url).netloc):
        (tmp_path / "netrc").write_text(f"machine {host} login user password abc\n")
        assert resolve_mode(WandbMode.auto) is WandbMode.online
    (tmp_path / "netrc").write_text("machine example.org login user password abc\n")
    assert resolve_mode(WandbMode.auto) is WandbMode.offline
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    assert resolve_mode(WandbMode.auto) is WandbMode.online
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert resolve_mode(WandbMode.auto) is WandbMode.offline


def test_the_server_of_wandb_login_is_the_one_whose_key_counts(no_wandb_account, tmp_path):
    (tmp_path / "home").mkdir()
    settings = "[default]\nbase_url = https://wandb.lab.example:8443\n"
    (tmp_path / "home" / "settings").write_text(settings)
    wandb.teardown()  # because wandb reads the file only once per process
    (tmp_path / "netrc").write_text("machine wandb.lab.example:8443 login user password abc\n")
    assert server_address() == "https://wandb.lab.example:8443"
    assert resolve_mode(WandbMode.auto) is WandbMode.online
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password abc\n")
    assert resolve_mode(WandbMode.auto) is WandbMode.offline
    wandb.teardown()


def test_wandb_online_without_a_key_is_refused_instead_of_asking(no_wandb_account):
    with pytest.raises(ConfigError, match=r"tracking\.wandb=online"):
        WandbSink(TrackingConfig(wandb=WandbMode.online))


def test_wandb_offline_writes_a_run_and_resume_keeps_its_id(no_wandb_account, tmp_path):
    sink = WandbSink(TrackingConfig())
    sink.start(info(tmp_path))
    sink.log({"train/step": 1, "reward/mean": 0.5, "kl/token": math.nan})
    sink.samples([sample(1)])
    sink.close(0)
    run_id = sink.state_dict()
    again = WandbSink(TrackingConfig())
    again.load_state_dict(run_id)
    again.start(info(tmp_path, first_step=1))
    again.log({"train/step": 2})
    again.close(0)
    assert run_id and again.state_dict() == run_id
    files = list(tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert files and all(f.stat().st_size > 0 for f in files)


class Tracker(RecordingSink):
    """A sink whose tracker gets a run with an id when it is started."""

    name = "tracker"

    def __init__(self, fails_at: str = "") -> None:
        super().__init__(fails_at=fails_at)
        self.run_id: str | None = None

    def state_dict(self) -> str | None:
        return self.run_id

    def load_state_dict(self, state: str | None) -> None:
        self.run_id = state

    def start(self, info: RunInfo) -> None:
        self.run_id = self.run_id or "new"
        super().start(info)


def test_the_id_of_a_tracker_s_run_lives_in_its_sink_and_outlives_it(tmp_path):
    optional = {"tracker": Tracker(fails_at="log"), "other": RecordingSink()}
    sinks = Sinks(required=[], optional=optional)
    assert sinks.state_dict() == {}, "no run has begun"
    sinks.start(info(tmp_path))
    sinks.log({"train/step": 1})
    assert sinks.state_dict() == {"tracker": "new"}, "the sink is off, and its run can go on later"
    without = Sinks(required=[])
    without.load_state_dict({"tracker": "old"})
    assert without.state_dict() == {"tracker": "old"}, "a resume without it forgets no run"
    again = Sinks(required=[], optional={"tracker": Tracker()})
    again.load_state_dict(without.state_dict())
    again.start(info(tmp_path))
    assert again.state_dict() == {"tracker": "old"}


def test_two_sinks_of_one_tracker_continue_a_run_each(tmp_path):
    first, second = Tracker(), Tracker()
    first.run_id, second.run_id = "one", "two"
    both = Sinks(required=[], optional={"tracking.sinks.a": first, "tracking.sinks.b": second})
    saved = both.state_dict()
    assert saved == {"tracking.sinks.a": "one", "tracking.sinks.b": "two"}
    again = {"tracking.sinks.a": Tracker(), "tracking.sinks.b": Tracker()}
    Sinks(required=[], optional=again).load_state_dict(saved)
    assert [sink.run_id for sink in again.values()] == ["one", "two"]


class FallsSilent(BaseHTTPRequestHandler):
    """A W&B server that accepts a run and then never answers."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/graphql" or self.server.silent.is_set():
            self.server.over.wait()
            return
        project = {"id": "p", "name": "hybridrl", "entity": {"id": "e", "name": "me"}}
        made = {
            "id": "r",
            "name": "r",
            "displayName": "r",
            "config": "{}",
            "historyLineCount": 0,
            "project": project,
        }
        if b"mutation UpsertBucket" in body:
            self.server.silent.set()
        answer = json.dumps(
            {"data": {"upsertBucket": {"bucket": made, "inserted": True}, "model": None}}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *parts: object) -> None:
        """Nothing is printed."""


def test_a_wandb_server_that_falls_silent_does_not_hold_the_end_of_a_run(
    no_wandb_account, tmp_path
):
    script = (
        "import logging, os, sys\nfrom hybridrl.settings.choices import WandbMode\nfrom "
        "hybridrl.settings.run "
        "import "
        "TrackingConfig\nfrom "
        "hybridrl.tracking.jsonl "
        "import JsonlSink\nfrom "
        "hybridrl.tracking.sink "
        "import Sinks\nfrom "
        "hybridrl.tracking.wandb_sink "
        "import WandbSink\nfrom "
        "hybridrl.types import "
        "RunInfo\nlogging.basicConfig()\nwandb "
        "= "
        "WandbSink(TrackingConfig(wandb=WandbMode.online, overview=False), "
        "finish_s=2.0)\nsinks = "
        "Sinks(required=[JsonlSink()], "
        "optional={'wandb': wandb})\nsinks.start(RunInfo(run_dir=sys.argv[1], "
        "name='demo', "
        "total_steps=100, "
        "first_step=0, "
        f"config={SETTINGS}))\nprint('begun', "
        "flush=True)\nfor step "
        "in range(1, 101):\n    "
        "sinks.log({'train/step': "
        "step})\nsinks.close(0)\nprint('closed', "
        # at its exit wandb would wait another 10 s for the silent server
        "flush=True)\nos._exit(0)\n"
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), FallsSilent) as server:
        server.silent = threading.Event()
        server.over = threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        account = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_address[1]}",
            "WANDB_API_KEY": "0" * 40,
            "NO_PROXY": "127.0.0.1",
        }
        root = Path(__file__).parent.parent.parent
        try:
            done = subprocess.run(
                [sys.executable, "-c", script, tmp_path],
                cwd=root,
                env=os.environ | account | {"PYTHONPATH": str(root)},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        finally:
            server.over.set()
            server.shutdown()
    assert done.returncode == 0 and done.stdout.split() == ["begun", "closed"], done.stderr
    assert "wandb failed and is off" in done.stderr and "within 2 s; `wandb sync " in done.stderr
    assert len(read_metrics(tmp_path)) == 100


class Answer(BaseHTTPRequestHandler):
    """A server that is not W&B and gives every request the same answer."""

    status = 500
    body = b"out of order"

    def answer(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_POST = answer

    def log_message(self, *_: object) -> None: ...


class LoginPage(Answer):
    status = 200
    body = b"<html><form>Please log in</form></html>"


class NotFoundPage(Answer):
    status = 404
    body = b"<html>nginx: no such page</html>"


class OtherService(Answer):
    status = 200
    body = b'{"login": "required"}'


class RefusedKey(Answer):
    status = 401
    body = b'{"errors": [{"message": "user is not logged in"}]}'


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (NotFoundPage, "answers with a page (status 404)"),
        (OtherService, "answers with status 200, but not as a W&B server does"),
        (RefusedKey, ""),
    ],
)
def test_only_an_answer_of_wandb_counts_as_one(no_wandb_account, monkeypatch, handler, reason):
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        result = unreachable()
        server.shutdown()
    assert reason in result and bool(result) == bool(reason)


@pytest.mark.parametrize(
    ("handler", "reason"),
    [(Answer, "answers with status 500"), (LoginPage, "answers with a page")],
)
def test_a_server_that_is_no_wandb_leaves_an_offline_run_and_one_warning(
    no_wandb_account, monkeypatch, tmp_path, caplog, handler, reason
):
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        sink = WandbSink(TrackingConfig(wandb=WandbMode.online))
        sink.start(info(tmp_path))
        server.shutdown()
    sink.log({"train/step": 1})
    sink.close(0)
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("hybridrl")]
    assert reason in warning and f"wandb sync {tmp_path}/wandb/offline-run-*" in warning
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_a_refused_connection_is_a_reason_to_track_offline(no_wandb_account, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert unreachable().startswith("there is no answer from http://127.0.0.1:9 (")


def test_wandb_disabled_does_nothing_and_keeps_the_checkpoint_s_id(no_wandb_account, tmp_path):
    sink = WandbSink(TrackingConfig(wandb=WandbMode.disabled))
    sink.load_state_dict("abc123")
    sink.start(info(tmp_path))
    sink.log({"train/step": 1})
    sink.samples([sample(1)])
    sink.close(0)
    assert sink.state_dict() == "abc123" and not (tmp_path / "wandb").exists()


def test_the_console_prints_a_line_for_each_held_out_set():
    metrics = {
        "eval/accuracy": 0.5,
        "eval/accuracy_teacher/accuracy": 0.75,
        "eval/hard/accuracy": 0.3125,
        "eval/hard/accuracy_stderr": 0.021,
        "eval/hard/pass_at_1": 0.3125,
        "eval/pairs/loss": 0.531,
        "eval/pairs/pair_accuracy": 0.75,
    }
    assert set_lines(metrics) == [
        "set hard: accuracy 31.2 % +- 2.1 %",
        "set pairs: loss 0.5310, 75.0 % of pairs ranked right",
    ]


def test_console_prints_one_plain_line_per_step_and_evaluations_stand_out(tmp_path):
    out = io.StringIO()
    console = ConsoleSink(out)
    console.start(info(tmp_path))
    console.log({"train/step": 0, "eval/accuracy": 0.331, "eval/accuracy_teacher/main": 0.74})
    step = {
        "reward/mean": 0.4123,
        "kl/token": 0.03,
        "schedule/lambda": 1.0,
        "perf/tokens_per_s": 8100.0,
    }
    console.log(
        {"train/step": 2, **step, "time/rollout_s": 2.1, "time/step_s": 4.0, "eval/accuracy": 0.512}
    )
    console.notice("a notice")
    console.close(0)
    lines = out.getvalue().splitlines()
    assert lines[1] == "step 0  eval accuracy 33.1 % (teacher 74.0 %)"
    assert lines[2].startswith(
        "step 2/4  reward 0.412  KL/token 0.0300  lambda 1.00  tok/s 8,100  4.0 s (rollout 2.1)  "
    )
    assert lines[3] == "step 2  eval accuracy 51.2 % (teacher 74.0 %, start 33.1 %)"
    assert lines[4:] == ["a notice", "done"]
    assert "\x1b" not in out.getvalue()


def test_the_line_of_a_step_has_the_engines_cache_and_what_waited_or_was_preempted(tmp_path):
    out = io.StringIO()
    console = ConsoleSink(out)
    console.start(info(tmp_path))
    calm = {
        "engine/rollout/kv_use": 0.614,
        "engine/rollout/waiting": 0.0,
        "engine/rollout/preemptions": 0.0,
    }
    busy = {"engine/rollout/waiting": 320.0, "engine/rollout/preemptions": 3.0}
    console.log({"train/step": 1, **calm})
    console.log({"train/step": 2, **calm, **busy})
    lines = [line for line in out.getvalue().splitlines() if line.startswith("step")]
    assert lines[0].startswith("step 1/4  KV cache 61 %  0.0 s left")
    assert lines[1].startswith("step 2/4  KV cache 61 %  waiting 320  preempted 3  ")


def test_one_step_in_ten_seconds_is_printed_and_the_file_has_each(tmp_path):
    out = io.StringIO()
    now = 0.0
    console = ConsoleSink(out, every_s=10.0, clock=lambda: now)
    console.start(info(tmp_path, total_steps=25))
    for step in range(1, 26):  # at 0, 4, 8, ..., 96 seconds
        now = 4.0 * (step - 1)
        console.log({"train/step": step})
    console.close(0)
    printed = [int(line.split("/")[0][4:]) for line in out.getvalue().splitlines()[2:-1]]
    assert printed == [1, 4, 7, 10, 13, 16, 19, 22, 25]  # 12 seconds apart
    lines = (tmp_path / "logs" / "console.log").read_text().splitlines()
    assert [line.split("  ")[1] for line in lines if "/25" in line] == ["step"] * 9 + [
        f"step {step}/25" for step in range(10, 26)
    ]
    assert lines[-1].endswith("  done")


def test_the_last_step_and_evaluations_are_printed_however_soon_they_come(tmp_path):
    out = io.StringIO()
    console = ConsoleSink(out, every_s=10.0, clock=lambda: 0.0)
    console.start(info(tmp_path, total_steps=4))
    for step in range(1, 5):
        console.log({"train/step": step, "eval/accuracy": step / 8})
    lines = out.getvalue().splitlines()[2:]
    assert [line.split("  ")[:2] for line in lines] == [
        ["step 1/4", "0.0 s left"],
        ["step 1", "eval accuracy 12.5 %"],
        ["step 2", "eval accuracy 25.0 %"],
        ["step 3", "eval accuracy 37.5 %"],
        ["step 4/4", "0.0 s left"],
        ["step 4", "eval accuracy 50.0 %"],
    ]


def test_a_console_file_that_cannot_be_opened_leaves_the_printed_lines(tmp_path, caplog):
    (tmp_path / "logs").write_text("not a folder")
    out = io.StringIO()
    console = ConsoleSink(out)
    console.start(info(tmp_path))
    console.log({"train/step": 1})
    console.close(0)
    assert "step 1/4" in out.getvalue() and out.getvalue().endswith("done\n")
    assert "console.log: cannot be opened" in caplog.text


def test_a_secret_in_a_notice_is_masked_in_the_console_file(tmp_path):
    redact.remember(["s3cr3t-token-value"])
    console = ConsoleSink(io.StringIO())
    console.start(info(tmp_path))
    console.notice("refused: s3cr3t-token-value")
    console.close(1)
    text = (tmp_path / "logs" / "console.log").read_text()
    assert "refused: " in text and "s3cr3t" not in text


def test_console_of_a_resumed_run_knows_the_start_and_the_teacher(tmp_path):
    write_rows(
        tmp_path,
        [
            {"train/step": 0, "eval/accuracy": 0.25, "eval/accuracy_teacher/main": 0.75},
            {"train/step": 1},
        ],
    )
    out = io.StringIO()
    console = ConsoleSink(out)
    console.start(info(tmp_path, first_step=1))
    console.log({"train/step": 2, "eval/accuracy": 0.5})
    assert "step 2  eval accuracy 50.0 % (teacher 75.0 %, start 25.0 %)" in out.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_console_on_a_terminal_shows_bar_columns_and_evaluation(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    console = ConsoleSink(out)
    console.start(info(tmp_path))
    console.log(
        {
            "train/step": 1,
            "reward/mean": 0.4123,
            "kl/token": 0.03,
            "schedule/lambda": 1.0,
            "eval/accuracy": 0.512,
            "rollout/truncated_frac": 0.031,
            "train/grad_norm": 0.8312,
            "train/lr": 5e-4,
            "reward/countdown/mean": 0.25,
            "time/rollout_s": 2.1,
            "time/step_s": 4.0,
            "cluster/restarts": 1.0,
            "engine/rollout/running": 64.0,
            "engine/rollout/prefix_hit_rate": 0.727,
        }
    )
    console.notice("a notice")
    console.close(3)
    text = out.getvalue()
    for shown in (
        "cut off",
        "3.1 %",
        "grad norm",
        "0.831",
        "5.0e-04",
        "countdown 0.250",
        "step 4.0 s",
        "rollout 2.1",
        "restarts 1, 64 requests at once, 73 % of prompts from the prefix cache",
        "1/4",
        "reward",
        "0.412",
        "accuracy",
        "KL/token",
        "lambda",
        "step 1  eval accuracy 51.2 %",
        "a notice",
        "stopped",
    ):
        assert shown in text
    assert "done" not in text and "mean 0.412" not in text


def test_durations_read_as_people_say_them():
    assert [duration(s) for s in (3.21, 42, 754, 3780)] == [
        "3.2 s",
        "42 s",
        "12 min 34 s",
        "1 h 3 min",
    ]


def test_phase_clock_adds_up_a_phase_also_when_it_raises_and_forgets_when_taken():
    clock = PhaseClock()
    with clock.phase("rollout"):
        pass
    once = dict(clock.take())
    with pytest.raises(KeyError), clock.phase("learn"):
        raise KeyError
    assert list(once) == ["time/rollout_s"] and once["time/rollout_s"] > 0
    assert list(clock.take()) == ["time/learn_s"]
    assert clock.take() == {}


def text_of(page: Path) -> str:
    """The text of a page without its embedded pictures, whose encoding may contain any word."""
    return re.sub(r"base64,[^\"]*", "base64,", page.read_text(encoding="utf-8"))


def synthetic_run(run_dir: Path, steps: int = 2) -> None:
    sink = JsonlSink()
    sink.start(info(run_dir))
    sink.log(
        {
            "train/step": 0,
            "eval/accuracy": 0.23,
            "eval/accuracy_stderr": 0.019,
            "eval/accuracy_teacher/main": 0.73,
        }
    )
    sink.samples([sample(0, "<script>alert('x')</script>", 0.0)])
    for step in range(1, steps + 1):
        sink.log(
            {
                "train/step": step,
                "reward/mean": 0.1 * step,
                "reward/stderr": 0.02,
                "kl/token": 0.5 / step,
                "schedule/lambda": 1.0,
            }
            | {
                "grad/dense_norm": 1.0,
                "grad/sparse_norm": 0.1,
                "time/rollout_s": 2.0,
                "time/learn_s": 1.5,
                "time/step_s": 4.0,
            }
            | ({"eval/accuracy": 0.42} if step == steps else {})
        )
    sink.samples([sample(steps, "1+2", 1.0)])
    sink.close(0)
    (run_dir / "config.yaml").write_text(CONFIG)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a synthetic run."""
    folder = tmp_path_factory.mktemp("reported")
    synthetic_run(folder)
    page = write_report(folder)
    assert page == folder / "report.html"
    return page


def test_report_states_what_was_measured_and_escapes_what_the_model_wrote(reported: Path):
    page = text_of(reported)
    # (0.42 - 0.23) / (0.73 - 0.23) = 0.38; two steps of 4 s
    assert (
        "rose from 23.0 % (\u00b1 1.9) to 42.0 %; the teacher reaches 73.0 %, so 38.0 % of the "
        "gap was closed." in page
    )
    assert (
        "countdown-student was trained for 2 steps on countdown problems to imitate "
        "countdown-teacher" in page
    )
    assert "The steps took 8.0 s of wall time" in page
    assert "&lt;script&gt;" in page and "<script>alert" not in page
    assert "&#10003; right" in page and "&#10007; wrong" in page
    assert "0.0 to 1.0, linear over 2 steps" in page and "All settings" in page


def test_report_needs_nothing_from_outside_the_page(reported: Path):
    page = text_of(reported)
    assert page.count("<svg") == 6 and "<img" not in page
    assert "http" not in page and "<link" not in page and " src=" not in page
    assert reported.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n")


def test_each_curve_says_what_its_metrics_are(reported: Path):
    page = text_of(reported)
    assert page.count("How to read it") == 6
    kl = explain("kl/token")
    assert f"<dt><code>kl/token</code></dt><dd>{kl.formula} - {kl.reading}</dd>" in page


def test_report_leaves_out_what_was_not_measured(tmp_path):
    write_rows(
        tmp_path,
        [{"train/step": 1, "reward/mean": 0.0, "grad/dense_norm": 0.0, "kl/token": math.nan}],
    )
    page = text_of(write_report(tmp_path))
    assert page.count("<svg") == 1 and "Training reward" in page
    assert "was not measured" in page and "nan" not in page.lower()


def test_report_of_a_run_that_only_evaluated_has_one_accuracy_and_no_gap(tmp_path):
    write_rows(
        tmp_path,
        [
            {
                "train/step": 0,
                "eval/accuracy": 0.0,
                "eval/accuracy_teacher/a": 0.5,
                "eval/accuracy_teacher/b": 0.6,
            }
        ],
    )
    assert "measured once, 0.0 %; the teacher reaches 60.0 %." in text_of(write_report(tmp_path))


@pytest.mark.parametrize(
    "row", [{}, {"time/eval_s": 1.0}, {"time/eval_s": 1.0, "eval/accuracy": 0.5}]
)
def test_a_run_can_be_reported_while_its_first_step_is_under_way(tmp_path, row):
    write_rows(tmp_path, [{"train/step": 0, **row}])
    page = text_of(write_report(tmp_path))
    assert page.count("<svg") == ("eval/accuracy" in row) and (tmp_path / "report.png").is_file()


def test_a_run_without_rewards_has_no_accuracy_and_says_so(tmp_path):
    """Its responses have no reward."""
    write_rows(
        tmp_path,
        [
            {"train/step": 0, "time/eval_s": 1.0},
            {"train/step": 1, "kl/token": 0.5, "time/step_s": 4.0, "time/eval_s": 1.0},
        ],
    )
    sink = JsonlSink()
    sink.start(info(tmp_path, first_step=1))
    sink.samples([sample(1, reward=math.nan)])
    sink.close(0)
    page = text_of(write_report(tmp_path))
    assert (
        "accuracy on held-out problems was not measured" in page
        and "not scored" not in page  # no response is scored, so none has a verdict
        and "Held-out accuracy" not in page
    )
    out = io.StringIO()
    console = ConsoleSink(out)
    console.start(info(tmp_path, first_step=1))
    console.log({"train/step": 2, "kl/token": 0.4, "time/step_s": 4.0, "time/eval_s": 1.0})
    assert "accuracy" not in out.getvalue() and "KL/token 0.4000" in out.getvalue()


def test_gap_closed_is_not_reported_when_the_teacher_is_not_ahead():
    rows = [
        {"train/step": 0, "eval/accuracy": 0.5, "eval/accuracy_teacher/a": 0.5},
        {"train/step": 1, "eval/accuracy": 0.6},
    ]
    assert measure(rows).gap_closed is None


def test_report_of_an_empty_directory_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no metrics"):
        write_report(tmp_path)
