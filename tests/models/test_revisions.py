"""Models and data of the hub are requested at the revision that the settings name.

The hub is a local server that has no files and records the requests.
"""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from hybridrl.core.errors import ConfigError
from hybridrl.settings.compose import load_config
from hybridrl.settings.models import ModelConfig

HUB = [
    "experiment=quickstart",
    "run.dir=r",
    "model.revision=s1",
    "teachers.main.path=me/teacher",
    "+teachers.main.revision=t2",
]

REQUESTS = """
from contextlib import suppress
from tests.models.test_revisions import HUB
from hybridrl.settings.compose import load_config
from hybridrl.launch.preflight import check_teachers
from hybridrl.data.problem_sources import load_problems
from hybridrl.core.errors import ConfigError, DataError
from hybridrl.models.tiny import tiny_tokenizer
from hybridrl.kernels.head import HeadRule
from hybridrl.teachers.scorer import Scorer
from hybridrl.teachers.evidence import Hidden
from hybridrl.teachers.inbox import TeacherInbox
import torch

data = ["data.path=me/rows", "data.heldout_path=me/other", "data.revision=d3"]
settings = load_config([*HUB, "data.task=records", *data])
device = torch.device("cpu")
for request in (
    lambda: check_teachers(settings, tiny_tokenizer()),
    lambda: Scorer(
        settings,
        teacher="main",
        device="cpu",
        evidence=Hidden(drawn=False),
        rule=HeadRule(),
    ),
    lambda: TeacherInbox.load(settings, [Hidden(drawn=False)], device),
    lambda: load_problems(settings.data, 0),
):
    print("requests", flush=True)
    with suppress(ConfigError, DataError):
        request()
"""


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
        """Nothing is printed."""


def test_teachers_and_data_are_requested_at_their_revisions(tmp_path: Path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Hub.paths.clear()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = Path(__file__).parent.parent.parent
        hub = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
            "HF_HOME": str(tmp_path),
            "NO_PROXY": "127.0.0.1",
        }
        env = os.environ | hub | {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(root)}
        process = subprocess.run(
            [sys.executable, "-c", REQUESTS],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        server.shutdown()
    assert process.returncode == 0 and process.stdout.count("requests") == 4, process.stderr
    teacher = [path for path in Hub.paths if "me/teacher" in path]
    assert len(teacher) >= 3, "tokenizer, weights and head"
    assert set(teacher) == {"/api/models/me/teacher/revision/t2"}
    heldout = next(path for path in Hub.paths if "me/other" in path)
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
