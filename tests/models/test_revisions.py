"""Models and data of the hub are requested at the revision that the settings name.

The hub is a local server that has no files and records the requests.
"""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import datasets
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from hybridrl.core.errors import ConfigError, DataError
from hybridrl.data.problem_sources import load_problems
from hybridrl.kernels.head import HeadRule
from hybridrl.launch.preflight import check_teachers
from hybridrl.models.tiny import tiny_tokenizer
from hybridrl.settings.compose import load_config
from hybridrl.settings.models import ModelConfig
from hybridrl.teachers.evidence import Hidden
from hybridrl.teachers.inbox import TeacherInbox
from hybridrl.teachers.scorer import Scorer

HUB = [
    "experiment=quickstart",
    "run.dir=r",
    "model.revision=s1",
    "teachers.main.path=me/teacher",
    "+teachers.main.revision=t2",
]


class Hub(BaseHTTPRequestHandler):
    """Answers each request with 404 and appends its path to `paths`."""

    paths: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *parts: object) -> None:
        """Print nothing."""


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The paths that the libraries request from the hub, with empty caches."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        for library, name, value in (
            (constants, "ENDPOINT", endpoint),
            (constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template),
            (constants, "HF_HUB_OFFLINE", False),
            (constants, "HF_HUB_CACHE", str(tmp_path / "hub")),
            (datasets.config, "HF_ENDPOINT", endpoint),
            (datasets.config, "HF_HUB_OFFLINE", False),
            (datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets"),
        ):
            monkeypatch.setattr(library, name, value)
        huggingface_hub.close_session()  # it may be of another test with other variables
        Hub.paths.clear()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Hub.paths
        server.shutdown()


def test_teachers_and_data_are_requested_at_their_revisions(requested: list[str]):
    data = ["data.path=me/rows", "data.heldout_path=me/other", "data.revision=d3"]
    settings = load_config([*HUB, "data.task=records", *data])
    hidden = Hidden(drawn=False)
    loads = (
        lambda: check_teachers(settings, tiny_tokenizer()),
        lambda: Scorer(settings, teacher="main", device="cpu", evidence=hidden, rule=HeadRule()),
        lambda: TeacherInbox.load(settings, [hidden], torch.device("cpu")),
    )
    for load in loads:
        requested.clear()
        with pytest.raises(ConfigError):
            load()
        assert set(requested) == {"/api/models/me/teacher/revision/t2"}
    requested.clear()
    with pytest.raises(DataError):
        load_problems(settings.data, 0)
    heldout = next(path for path in requested if "me/other" in path)
    assert heldout.startswith("/datasets/me/other/resolve/d3/")


def test_an_engine_that_serves_a_teacher_uses_its_revision_or_the_students():
    settings = load_config(HUB)
    teacher = ModelConfig(path="me/teacher", revision="t2", dtype="float32")
    assert settings.teacher_model("main") == teacher, "of the dtype of the quickstart's student"
    assert load_config([*HUB[:3], "teachers.main.path=null"]).teacher_model("main").revision == "s1"


def test_a_revision_of_a_teacher_without_a_path_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"teachers\.main\.revision=t2: without a path it is the student; set model\.revision",
    ):
        load_config([*HUB[:3], "teachers.main.path=null", "+teachers.main.revision=t2"])
