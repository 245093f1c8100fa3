"""Whether models are available: on this disk, in the cache, or on a simulated hub."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hybridrl.models.reach import reach

ENDED = threading.Event()
"""The test is over."""


class Hub(BaseHTTPRequestHandler):
    """A stand-in for the hub with org/open and org/gated, which answers as the real one does, and
    org/silent, about whose accessibility it says nothing.
    """

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/org/silent/auth-check"):
            ENDED.wait()
        elif self.path.startswith(("/api/models/org/open", "/api/models/org/silent")):
            self.answer(200, {"id": "org/open", "sha": "0123456789abcdef", "siblings": []})
        elif self.path.startswith("/api/models/org/gated/auth-check"):
            self.answer(403, {"error": "restricted"}, code="GatedRepo")
        elif self.path.startswith("/api/models/org/gated"):
            self.answer(200, {"id": "org/gated", "sha": "0123", "siblings": [], "gated": "manual"})
        else:
            self.answer(404, {"error": "Repository not found"}, code="RepoNotFound")

    def answer(self, status: int, body: dict[str, object], code: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HfApi]:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ENDED.clear()
        yield HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token=False)
        ENDED.set()
        server.shutdown()


def test_a_local_model_or_data_set_is_reached_without_a_hub(tmp_path: Path):
    assert reach("builtin:countdown-student", None).text == "comes with hybridrl"
    assert not reach("builtin:countdown-studnet", None).reached
    assert "it must be one of countdown-s" in reach("builtin:countdown-studnet", None).text
    (tmp_path / "config.json").write_text("{}")
    assert reach(str(tmp_path), None).text == "is on this disk"
    assert reach(str(tmp_path), None, kind="dataset").reached
    assert not reach(str(tmp_path / "none"), None).reached


def test_a_model_on_the_hub_is_reached_at_its_commit(hub: HfApi):
    result = reach("org/open", None, api=hub)
    assert result.reached and result.text == "is on the hub, at commit 0123456789ab"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("org/gated", "is gated on the hub"),
        ("org/none", "is not on the hub, or is private"),
        ("a/b/c", "is not a valid name on the hub"),
    ],
)
def test_an_unavailable_model_is_reported_with_the_reason(hub: HfApi, path: str, reason: str):
    result = reach(path, None, api=hub)
    assert not result.reached and reason in result.text


def test_a_hub_that_falls_silent_is_not_waited_for_without_a_limit(
    hub: HfApi, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hybridrl.models.reach.LIMIT_S", 0.05)
    result = reach("org/silent", None, api=hub)
    assert not result.reached and "the hub does not answer" in result.text


def test_a_hub_that_does_not_answer_is_reported(hub: HfApi):
    result = reach("org/open", None, api=HfApi(endpoint="http://127.0.0.1:9", token=False))
    assert not result.reached and "the hub does not answer" in result.text


def test_a_folder_without_a_config_is_not_a_model(tmp_path: Path):
    result = reach(str(tmp_path), None)
    assert not result.reached and "holds no config.json" in result.text


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_cached_model_or_data_set_is_reached_without_the_hub(
    hub: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    """A data set has no config.json; loading, too, uses the cache while the hub is down. Of a model
    it downloads neither the README nor other files that it does not need.
    """
    repository = tmp_path / f"{kind}s--org--cached"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    (repository / "snapshots" / "0123").mkdir(parents=True)
    (repository / "snapshots" / "0123" / "file").write_text("")
    if kind == "model":
        files = {name: {"size": 2, "blob_id": "0" * 40} for name in ("config.json", "README.md")}
        (repository / "trees").mkdir()
        listing = {"format_version": 1, "files": files}
        (repository / "trees" / "0123.json").write_text(json.dumps(listing))
        (repository / "snapshots" / "0123" / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    unreachable = HfApi(endpoint="http://127.0.0.1:9", token=False)
    result = reach("org/cached", None, api=unreachable, kind=kind)
    assert result.reached and "cache here, as the hub does not answer" in result.text
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert reach("org/cached", None, kind=kind).text == "is in the hub's cache here"
    assert not reach("org/other", None, kind=kind).reached


def test_a_token_that_a_login_stored_is_used(
    hub: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "without a token" in reach("org/none", None, api=hub).text
    (tmp_path / "token").write_text("hf_abc")
    assert "with the token at hand" in reach("org/none", None, api=hub).text


def test_offline_only_the_cache_is_searched(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = reach("org/open", None)
    assert not result.reached and "HF_HUB_OFFLINE is set" in result.text
