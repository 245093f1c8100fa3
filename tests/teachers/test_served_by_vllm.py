"""A teacher that vLLM's own server runs, compared with the same model in this process. The server
is started once; tests/teachers/test_served.py tests the loss of servers.
"""

import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from hybridrl.core.errors import ConfigError
from hybridrl.core.free_port import free_port
from hybridrl.launch.served_teachers import check_served_teachers
from hybridrl.launch.serving import ServeCommand, server_command, server_environment
from hybridrl.models.tiny import tiny_tokenizer
from hybridrl.planning.edges import ANSWER_BYTES
from hybridrl.runtime.scorer_group import scoring
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.scorer import Scorer
from hybridrl.teachers.served import ServedScorer
from hybridrl.types import Prompt, TokenScores
from tests.support.batches import make_batch
from tests.support.graph import save_tiny

pytestmark = pytest.mark.graph

PROMPTS = [((1, 5, 6), [(7, 8, 2), (9, 2)]), ((1, 10), [(11, 2), (12, 13, 14, 2)])]
TOPK = ("algorithm.topk.source=teacher", "algorithm.topk.k=3", "++teachers.main.evidence=support")
KEY = "canary-7f3a91d2c4"
START_S = 180.0


@dataclass
class Server:
    """A running server, and the folders of its model and of a student."""

    folder: Path
    url: str
    process: subprocess.Popen[bytes]

    def settings(self, *more: str) -> RunSettings:
        return load_config(
            [
                f"run.dir={self.folder}/run",
                "experiment=quickstart",
                f"model.path={self.folder}/student",
                "teachers.main.path=null",
                f"++teachers.main.url={self.url}",
                "++teachers.main.api_key=${oc.env:OF_SERVER}",
                "++teachers.main.evidence=drawn",
                *more,
            ]
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("vllm")
    save_tiny(folder / "student", 0)
    save_tiny(folder / "teacher", 1)
    port = free_port()
    small = ("--max-model-len", "64", "--kv-cache-memory-bytes", str(2**26), "--api-key", KEY)
    teacher = folder / "teacher"
    given = ServeCommand(source=str(teacher), port=port, arguments=small)
    command = server_command(teacher, given, "cpu")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=server_environment("cpu"),
            start_new_session=True,
        )
    running = Server(folder, f"http://127.0.0.1:{port}/v1", process)
    try:
        wait_until_up(running)
        yield running
    finally:
        end(running)


def wait_until_up(server: Server) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            urllib.request.urlopen(server.url.replace("/v1", "/health"), timeout=10).close()
            return
        except OSError:
            if server.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server is not up:\n{(server.folder / 'log').read_text()[-3000:]}")
            time.sleep(0.2)


def end(server: Server) -> None:
    """Kill the server and its engine, which is a separate process."""
    if server.process.poll() is None:
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait(30)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_SERVER", KEY)


def served(settings: RunSettings) -> ServedScorer:
    evidence, rule = scoring(settings, "main")
    return ServedScorer(settings, teacher="main", device="cpu", evidence=evidence, rule=rule)


def local(server: Server, *more: str) -> TokenScores:
    """The scores of the same model, loaded in this process."""
    settings = load_config(
        [
            f"run.dir={server.folder}/run",
            "experiment=quickstart",
            f"model.path={server.folder}/student",
            f"teachers.main.path={server.folder}/teacher",
            "++teachers.main.evidence=drawn",
            *more,
        ]
    )
    evidence, rule = scoring(settings, "main")
    scorer = Scorer(settings, teacher="main", device="cpu", evidence=evidence, rule=rule)
    return scorer.score(make_batch(PROMPTS))[1]


@pytest.mark.parametrize("more", [(), TOPK])
def test_a_server_gives_the_log_probs_of_the_same_model_here(server: Server, more: tuple[str, ...]):
    """In float32 they agree to 1e-5 nats."""
    expected = local(server, *more)
    _, scores = served(server.settings(*more)).score(make_batch(PROMPTS))
    assert expected.logprobs.any()
    assert np.abs(scores.logprobs - expected.logprobs).max() < 1e-5
    assert scores.support_ids.tolist() == expected.support_ids.tolist()
    assert scores.rows.shape == expected.rows.shape
    assert np.abs(scores.rows - expected.rows).max(initial=0) < 1e-5


def checked(server: Server, *more: str) -> None:
    lengths = ("rollout.max_new_tokens=32", "rollout.max_model_len=63")
    prompts = [Prompt(uid="a", input_ids=(1, 5, 6, 7), text="", columns={})]
    check_served_teachers(server.settings(*lengths, *more), tiny_tokenizer(), [], prompts)


def test_a_server_with_the_students_tokens_passes_every_check(server: Server):
    checked(server, *TOPK)
    checked(server, f"++teachers.main.served.tokenizer={server.folder}/teacher")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("rollout.max_model_len=64",), "reads at most 64 tokens, and rollout.max_model_len=64"),
        ((*TOPK, "algorithm.topk.k=21"), "start it with --max-logprobs 21 or more, or lower"),
        (("++teachers.main.served.model=other",), "has the models teacher, but served.model=other"),
        (("++teachers.main.api_key=null",), "answers /v1/models with HTTP 401 (Unauthorized)"),
    ],
)
def test_a_server_that_cannot_score_for_the_run_is_refused(
    server: Server, more: tuple[str, ...], message: str
):
    with pytest.raises(ConfigError) as caught:
        checked(server, *more)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_server_with_other_tokens_is_refused_and_the_tokens_are_named(server: Server):
    other = tiny_tokenizer()
    other.add_tokens(["added"])
    prompts = [Prompt(uid="a", input_ids=(1, 5), text="", columns={})]
    with pytest.raises(ConfigError, match=r"where those of model\.path=.* read 'added'"):
        check_served_teachers(server.settings(), other, [], prompts)


def test_the_size_of_an_answer_is_what_the_plan_expects(server: Server):
    """They agree within 20 % for a sequence of 48 tokens."""
    one = served(server.settings(*TOPK))
    (answer,) = one.answers([[1, *range(4, 21), *range(4, 21), *range(4, 17)]])
    per_logprob = answer.nbytes / answer.top_ids.shape[0] / (1 + answer.top_ids.shape[1])
    assert per_logprob == pytest.approx(ANSWER_BYTES, rel=0.2)
