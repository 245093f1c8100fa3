"""A submission is checked before the cluster is contacted, and its output is followed to the
end.
"""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from ray.job_submission import JobDetails, JobStatus

from hybridrl.core.errors import ClusterLost, ConfigError
from hybridrl.launch.submission import check, job_of, jobs, parsed, settings_of, variables
from hybridrl.runtime.jobs import Jobs, Output, Submitted, exit_status, refusal

QUICKSTART = ["experiment=quickstart", "run.dir=/shared/runs/a"]


def submitted(command: str, state: str = "RUNNING", exit_code: int | None = None) -> Submitted:
    return Submitted(
        id="a", state=state, command=command, started=None, exit_status=exit_code, message=""
    )


def test_a_job_runs_the_same_settings_also_those_with_spaces_and_quotes(tmp_path: Path) -> None:
    tricky = "+reward.functions.r={function: 'r.py:f', weight: 0.5}"
    submission = parsed(["--folder", str(tmp_path), "--id", "x", *QUICKSTART, tricky])
    [overrides] = submission.overrides
    job = job_of(submission, 0, overrides)
    assert job.id == "x" and job.folder == tmp_path
    assert settings_of(submitted(job.command)) == (None, [*QUICKSTART, tricky])


def test_a_file_of_settings_is_below_the_overrides_and_is_named_as_the_job_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that the file refers to may be set only on the cluster."""
    monkeypatch.delenv("TEACHER_PATH", raising=False)
    file = tmp_path / "settings" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(
        "experiment: quickstart\nrun: {dir: /shared/runs/a}\n"
        "teachers: {main: {path: '${oc.env:TEACHER_PATH}'}}\n"
    )
    submission = parsed(["--config", str(file), "--folder", str(tmp_path), "train.lr=1e-4"])
    assert submission.config == "settings/mine.yaml"
    check(["train.lr=1e-4"], file)
    with pytest.raises(ConfigError, match=r"train\.steps=-1"):
        check(["train.steps=-1"], file)
    job = job_of(submission, 0, *submission.overrides)
    assert job.command == "hybridrl train --config settings/mine.yaml train.lr=1e-4"
    assert settings_of(submitted(job.command)) == ("settings/mine.yaml", ["train.lr=1e-4"])
    monkeypatch.setattr(Jobs, "__init__", lambda self, address: None)
    monkeypatch.setattr(Jobs, "find", lambda self, name: submitted(job.command))
    again = parsed(["--folder", str(tmp_path), "--resume", "x", "train.steps=9"])
    assert again.config == "settings/mine.yaml"
    assert again.overrides == [["train.lr=1e-4", "train.steps=9"]]


@pytest.mark.parametrize(
    ("place", "sentence"),
    [("absent.yaml", "is not a file"), ("mine.yaml", "must be in .*/sent, which is sent to")],
)
def test_a_file_of_settings_that_the_nodes_would_not_have_is_refused(
    tmp_path: Path, place: str, sentence: str
) -> None:
    (tmp_path / "sent").mkdir()
    (tmp_path / "mine.yaml").write_text("train: {steps: 7}\n")
    with pytest.raises(ConfigError, match=f"--config .*{place}: {sentence}"):
        parsed(["--config", str(tmp_path / place), "--folder", str(tmp_path / "sent"), *QUICKSTART])


def test_a_sweep_is_one_job_for_each_combination_with_a_folder_of_its_own() -> None:
    swept = ["train.lr=0.2,0.1", "run.seed=range(0,2)", "run.dir=/runs/${hydra:job.num}"]
    submission = parsed(["-m", "--id", "s", *swept])
    assert submission.overrides == [
        ["train.lr=0.2", "run.seed=0", "run.dir=/runs/0"],
        ["train.lr=0.2", "run.seed=1", "run.dir=/runs/1"],
        ["train.lr=0.1", "run.seed=0", "run.dir=/runs/2"],
        ["train.lr=0.1", "run.seed=1", "run.dir=/runs/3"],
    ]
    assert job_of(submission, 3, submission.overrides[3]).id == "s-3"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--adress", "x"], "^--adress: hybridrl submit has no such option; see --help$"),
        (["--folder", "/nowhere/at/all"], "is not a folder; name the checkout"),
        (["--env", "A"], "^--env A: must be NAME=VALUE$"),
        (["-m", "train.lr=interval(0,1)"], "interval has no list of values; list them as KEY=A,B"),
        (["--env", "JUDGE_API_KEY=sk-1234567890abcdef"], "^--env JUDGE_API_KEY: looks like a sec"),
        (["--env", "DATABASE_URL=postgres://u:s3cr3tpw9@h/db"], "^--env DATABASE_URL: looks like"),
    ],
)
def test_a_wrong_option_is_refused_in_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parsed([*arguments, *QUICKSTART])


def test_a_secret_in_a_variable_is_not_repeated_in_the_message() -> None:
    with pytest.raises(ConfigError) as caught:
        dict(variables(["JUDGE_API_KEY=sk-1234567890abcdef"]))
    assert "sk-1234" not in str(caught.value)


def test_a_run_dir_that_would_be_deleted_with_the_job_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^run\.dir=runs/a: must be absolute"):
        check(["experiment=quickstart", "run.dir=runs/a"])


def test_a_variable_that_only_the_cluster_has_does_not_stop_a_submission(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    option = "+reward.functions.j={function: countdown, options: {k: '${oc.env:JUDGE_API_KEY}'}}"
    check([*QUICKSTART, option])
    with pytest.raises(ConfigError, match=r"train\.lr=-1"):
        check([*QUICKSTART, option, "train.lr=-1"])


def test_the_root_of_run_dir_may_be_a_variable_that_only_the_cluster_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SHARED_STORE", raising=False)
    check(["experiment=quickstart", "run.dir=${oc.env:SHARED_STORE}/runs/a"])
    with pytest.raises(ConfigError, match=r"^run\.dir=runs/.*: must be absolute"):
        check(["experiment=quickstart", "run.dir=runs/${oc.env:SHARED_STORE}"])


def test_only_a_job_of_hybridrl_is_submitted_again() -> None:
    with pytest.raises(ConfigError, match="--resume a: its command is not hybridrl train: sleep 9"):
        settings_of(submitted("sleep 9"))


@pytest.mark.parametrize(
    ("state", "exit_code", "status"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", None, 75)],
)
def test_the_command_ends_with_the_status_of_its_job(
    state: str, exit_code: int | None, status: int
) -> None:
    assert exit_status(submitted("hybridrl train", state, exit_code)) == status


def test_an_address_where_no_dashboard_answers_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="no Ray dashboard answers there"):
        Jobs("http://127.0.0.1:1")


class EndsQuietly:
    """A job whose connections fail at 0 s, end without an error at 100 s, and fail at 200 s. The
    next connection gives the rest of the output.
    """

    def __init__(self) -> None:
        self.events = iter(["fail", "end", "fail", "rest"])
        self.is_over = False

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        event = next(self.events)
        if event == "fail":
            raise RuntimeError("WebSocket connection closed unexpectedly")
        self.is_over = event == "rest"
        yield "one"

    def get_job_status(self, job_id: str) -> JobStatus:
        return JobStatus.SUCCEEDED if self.is_over else JobStatus.RUNNING


def test_an_interruption_counts_from_the_last_connection_that_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hybridrl.runtime.jobs.RETRY_S", 0.0)
    client: Any = EndsQuietly()
    written: list[str] = []

    async def follow() -> None:
        loop = asyncio.get_running_loop()
        seconds = iter(range(0, 10_000, 50))  # the clock advances by 50 s at each reading
        monkeypatch.setattr(loop, "time", lambda: float(next(seconds)))
        await Output(client, "http://head:8265", "a", written.append).follow()

    asyncio.run(follow())
    assert "".join(written) == "one"


class LosesConnections:
    """A job whose output is "one two three". The first connection ends after "one ", the second one
    before that, each with an error. Each connection sends the output from its beginning.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.events: list[str] = []
        self.connections = iter([["one "], [], ["one two", " three"]])

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        texts = next(self.connections)
        self.events.append(f"connect {job_id}")
        for text in texts:
            yield text
        if len(texts) < 2:
            raise self.error

    def get_job_status(self, job_id: str) -> JobStatus:
        return JobStatus.SUCCEEDED


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("WebSocket connection closed unexpectedly"),
        aiohttp.ServerDisconnectedError(),
    ],
)
def test_output_is_written_once_over_connections_that_are_lost(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybridrl.runtime.jobs.RETRY_S", 0.0)
    client: Any = LosesConnections(error)
    written: list[str] = []
    asyncio.run(Output(client, "http://head:8265", "a", written.append).follow())
    assert written == ["one ", "two", " three"]
    assert client.events == ["connect a"] * 3


class FallsSilent:
    """A job whose first connections give no output and do not end; the last one gives the output.

    Args:
        answers: the job's status that the dashboard reports after each connection.
    """

    def __init__(self, answers: list[JobStatus | Exception]) -> None:
        self.answers = iter(answers)
        self.is_over = False

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        if not self.is_over:
            await asyncio.Event().wait()
        yield "one"

    def get_job_status(self, job_id: str) -> JobStatus:
        answer = JobStatus.SUCCEEDED if self.is_over else next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        self.is_over = answer is JobStatus.RUNNING
        return answer


def test_the_dashboard_is_asked_about_a_job_whose_output_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A network that fails silently does not end a connection."""
    monkeypatch.setattr("hybridrl.runtime.jobs.QUIET_S", 0.01)
    monkeypatch.setattr("hybridrl.runtime.jobs.RETRY_S", 0.02)
    goes_on: Any = FallsSilent([JobStatus.RUNNING])
    written: list[str] = []
    asyncio.run(Output(goes_on, "http://head:8265", "a", written.append).follow())
    assert written == ["one"]
    is_gone: Any = FallsSilent([ConnectionError("no route")] * 3)
    with pytest.raises(ClusterLost, match=r"has not answered for 0\.01 s \(no route\)"):
        asyncio.run(Output(is_gone, "http://head:8265", "a", written.append).follow())


class HasNoJob:
    def get_job_info(self, job_id: str) -> JobDetails:
        raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist.")


def test_a_job_that_does_not_exist_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridrl.runtime.jobs.TimedJobClient", lambda address: HasNoJob())
    with pytest.raises(ConfigError, match=r"^--address http://head:8265: .*Job typo does not exis"):
        Jobs("http://head:8265").follow("typo")


@contextmanager
def answering(status: int, body: str, *, silent: bool = False) -> Iterator[str]:
    """The address of a server that gives every request this answer, or with `silent` none."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if silent:
                ended.wait()
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_given_address_takes_precedence_over_the_variables_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with answering(502, "bad gateway") as other:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", other)
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        with pytest.raises(ConfigError, match=r"127\.0\.0\.1:1: no Ray dashboard answers there"):
            Jobs("http://127.0.0.1:1")
        assert os.environ["RAY_API_SERVER_ADDRESS"] == other
        with pytest.raises(ConfigError, match="is no Ray dashboard"):
            Jobs()


@pytest.mark.parametrize(
    ("status", "body"),
    [(502, "bad gateway"), (200, "<html>Please log in.</html>"), (200, "{}")],
)
def test_a_server_that_is_no_dashboard_is_one_sentence(status: int, body: str) -> None:
    with answering(status, body) as address, pytest.raises(ConfigError) as caught:
        Jobs(address)
    assert f"--address {address}: what answers there is no Ray dashboard" in str(caught.value)


def test_a_dashboard_that_is_silent_is_not_waited_for_without_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hybridrl.runtime.job_client_internals.ANSWER_S", 0.05)
    with answering(200, "", silent=True) as address, pytest.raises(ConfigError) as caught:
        Jobs(address)
    assert "no Ray dashboard answers there" in str(caught.value)


def test_an_address_that_is_not_one_of_http_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--address head:6379: must be http\(s\)://HOST:PORT"):
        Jobs("head:6379")


@pytest.mark.parametrize("command", ["echo it's", "hybridrl train --config", "ls"])
def test_a_job_that_is_no_training_is_not_resumed(command: str) -> None:
    with pytest.raises(ConfigError, match=r"--resume a: its command is not hybridrl train: "):
        settings_of(submitted(command))


def test_the_reason_of_a_refusal_is_its_last_line_with_words() -> None:
    """Ray's answer to an id that a job has already."""
    traceback = "Request failed: Traceback (most recent call last):\n  File job_manager.py\n"
    refused = RuntimeError(f"{traceback}ValueError: Job with id x already exists.\n.\n.")
    assert refusal(refused) == "ValueError: Job with id x already exists"
    assert refusal(TimeoutError()) == "TimeoutError"


@pytest.mark.parametrize("option", ["--stop", "--status"])
def test_an_option_about_one_job_needs_its_id(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option}: give the ID of a job"):
        jobs([option, "--address", "http://127.0.0.1:1"])


def test_a_file_of_settings_that_is_no_utf_8_is_refused_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"run: {dir: /\xff}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        check([], file)
