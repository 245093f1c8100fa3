"""`hybridrl export --push` and its model card, against a local stand-in of the hub."""

import hashlib
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM

from hybridrl.cli import main
from hybridrl.launch.hub_upload import HubUpload, folder_licence
from hybridrl.models.loading import resolve
from hybridrl.report.model_card import RunCard
from hybridrl.settings.models import ModelConfig
from hybridrl.tracking.jsonl import METRICS
from tests.run_dir.test_directory import settings_of
from tests.support.hub import LocalHub, running
from tests.test_cli import save_checkpoint

ROWS = (
    '{"train/step": 0, "eval/accuracy": 0.25, "eval/accuracy_stderr": 0.02}',
    '{"train/step": 10, "eval/accuracy": 0.5, "eval/accuracy_stderr": 0.03, "reward/mean": 0.4}',
    '{"train/step": 20, "eval/accuracy": 0.75, "eval/accuracy_stderr": 0.01}',
)
"""The metrics of a run whose checkpoint is of step 10."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """Run a stand-in for the hub, to which the command connects with a token that is accepted."""
    monkeypatch.setenv("HF_TOKEN", "hf_good0123456789")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol differs from LFS
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    huggingface_hub.close_session()  # it may be of another test with other variables
    with running(LocalHub()) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        yield hub


def save_run(run_dir: Path, *overrides: str) -> Path:
    """Write the directory of a run with metrics and a checkpoint of step 10."""
    save_checkpoint(run_dir, *overrides)
    (run_dir / METRICS).write_text("\n".join(ROWS) + "\n")
    return run_dir


def test_a_pushed_export_arrives_byte_for_byte_in_a_private_repository_with_its_card(
    tmp_path: Path, hub: LocalHub, capsys: pytest.CaptureFixture
):
    hub.private["me/tiny"] = True
    hub.files = {"adapter_config.json": b"of an earlier push", "notes.md": b"mine"}
    run = save_run(tmp_path / "run")
    assert main(["export", str(run), "--push", "me/tiny", "--message", "The tenth step"]) == 0
    folder = run / "export" / "step_000010"
    assert capsys.readouterr().out == f"{folder}\n{hub.endpoint}/me/tiny\n"
    sent = {path: hashlib.sha256(content).hexdigest() for path, content in hub.files.items()}
    written = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert sent.pop("notes.md"), "files of the user's stay"
    assert hub.removed == ["adapter_config.json"], "else a loader would look for adapters"
    assert sent == written and {"model.safetensors", "README.md", "curves.png"} <= sent.keys()
    assert hub.messages == ["The tenth step"]
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
    assert "POST /api/repos/create" not in hub.requests, "it exists"


def test_a_new_repository_is_private_unless_public_is_given(tmp_path: Path, hub: LocalHub):
    run = save_run(tmp_path / "run")
    assert main(["export", str(run), "--push", "me/one"]) == 0
    assert main(["export", str(run), "--push", "me/two", "--public"]) == 0
    assert hub.private == {"me/one": True, "me/two": False}
    assert hub.messages == ["Step 10 of a run of hybridrl"] * 2


def test_the_card_states_the_run_up_to_the_exported_step_without_its_secrets(
    tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MY_API_KEY", "sk-0a1b2c3d4e5f6a7b")
    monkeypatch.setenv("HOME", str(tmp_path))
    run = save_run(
        tmp_path / "run", "train.lr=0.003", "tracking.group=sk-0a1b2c3d4e5f6a7b", "run.seed=7"
    )
    assert main(["export", str(run), "--push", "me/tiny"]) == 0
    text = hub.files["README.md"].decode()
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hybridrl"],
    }, "a built-in model has no name on the hub"
    assert "| accuracy at step 0 | 25.0 % (\N{PLUS-MINUS SIGN} 2.0) |" in text
    assert "| accuracy at step 10 | 50.0 % (\N{PLUS-MINUS SIGN} 3.0) |" in text
    assert "75.0 %" not in text, "a later step is of another model"
    overrides = text.partition("```text\n")[2].partition("```")[0].splitlines()
    assert {"train.lr=0.003", "run.seed=7"} <= set(overrides)
    assert "teachers.main.path=builtin:countdown-teacher" in overrides
    left_out = ("run.dir=", "tracking.", "teachers.main.weight=")
    assert not any(line.startswith(left_out) for line in overrides)
    assert "<summary>All settings</summary>" in text and "lr: 0.003" in text
    assert 'from_pretrained("me/tiny")' in text and "![The curves of the run](curves.png)" in text
    assert "sk-0a1b2c3d4e5f6a7b" not in text and str(tmp_path) not in text
    assert "hf_good0123456789" not in text


@pytest.mark.parametrize(
    ("repo", "more", "status", "sentence"),
    [
        ("tiny", [], 2, "--push tiny: must be OWNER/NAME"),
        ("me/ti ny", [], 2, "--push me/ti ny: must be OWNER/NAME"),
        ("a/b/c", [], 2, "--push a/b/c: must be OWNER/NAME"),
        ("me/open", [], 2, "--push me/open: the repository is public; add --public"),
        (
            "me/shut",
            ["--public"],
            2,
            "--push me/shut: the repository is private; leave --public out",
        ),
        ("other/tiny", [], 1, "refused with status 403"),
    ],
)
def test_what_the_hub_would_refuse_is_one_sentence_before_anything_is_written(
    repo: str,
    more: list[str],
    status: int,
    sentence: str,
    tmp_path: Path,
    hub: LocalHub,
    capsys: pytest.CaptureFixture,
):
    hub.private |= {"me/open": False, "me/shut": True}
    run = save_run(tmp_path / "run")
    capsys.readouterr()
    assert main(["export", str(run), "--push", repo, *more]) == status
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (run / "export").exists() and hub.files == {}


def test_a_missing_or_wrong_token_offline_mode_and_a_dead_network_are_each_one_sentence(
    tmp_path: Path, hub: LocalHub, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    run = save_run(tmp_path / "run")
    capsys.readouterr()

    def refused(status: int) -> str:
        assert main(["export", str(run), "--push", "me/tiny"]) == status
        assert not (run / "export").exists() and hub.files == {}
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    hub.role = "read"
    assert "the token of me may only read; make one that may write" in refused(2)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong0123456789")
    error = refused(1)
    assert "refused with status 401" in error and "the token is not valid" in error
    assert "hf_wrong0123456789" not in error
    monkeypatch.delenv("HF_TOKEN")
    assert "no token for the hub was found; set HF_TOKEN" in refused(2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it" in refused(2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_good0123456789")
    with socket.socket() as unused:  # bound and not listening, so that connections are refused
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert f"{endpoint} does not answer" in refused(1)


def test_the_front_matter_of_adapters_names_their_base_its_licence_and_the_data_of_the_hub(
    tmp_path: Path, hub: LocalHub
):
    hub.licences["org/base"] = "apache-2.0"
    data = ["data.path=org/rows:main:train", "data.heldout_path=org/rows:main:test"]
    settings = settings_of(tmp_path, "model.path=org/base", "data.task=records", *data)
    licence = HubUpload(repo="me/tiny").licence(settings.model)
    card = RunCard.of(tmp_path, settings, step=10, adapter=True).text("me/tiny", licence)
    assert ModelCard(card).data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "datasets": ["org/rows"],
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["hybridrl"],
    }
    assert "## Results" not in card, "the run has no metrics here"
    assert "vllm serve org/base --enable-lora --lora-modules trained=me/tiny" in card


def test_options_of_a_push_are_refused_without_it(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["export", str(tmp_path), "--public"]) == 2
    assert "--public: has no effect without --push OWNER/NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("front_matter", "licence"),
    [("license: mit", "mit"), ("license: mit: x", None), ("license:\tmit\n\t- a", None)],
)
def test_a_folders_model_card_with_malformed_front_matter_states_no_licence(
    tmp_path: Path, front_matter: str, licence: str | None
):
    folder = tmp_path / "model"
    shutil.copytree(resolve("builtin:countdown-student"), folder)
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\nA model.\n")
    assert folder_licence(ModelConfig(path=str(folder))) == licence
