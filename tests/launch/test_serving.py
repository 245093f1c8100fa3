"""The command line of `hybridrl serve`; tests/launch/test_train.py starts a real server."""

import json
from pathlib import Path

import pytest

from hybridrl.cli import main
from hybridrl.core.errors import ConfigError
from hybridrl.launch.serving import ServeCommand, parse, server_command
from hybridrl.models.loading import resolve
from tests.support.graph import save_tiny


def test_the_command_names_the_model_by_its_folder_and_fits_a_cpu():
    folder = resolve("builtin:countdown-student")
    given = ServeCommand(source="x", host="h", port=1, arguments=("--seed", "3"))
    command = server_command(folder, given, "cpu")
    assert command[3:7] == ["--model", str(folder), "--served-model-name", folder.name]
    assert "--enforce-eager" in command and command[-2:] == ["--seed", "3"]
    on_gpu = server_command(folder, given, "cuda")
    assert "--enforce-eager" not in on_gpu


def test_embeddings_that_the_files_hold_as_two_are_served_as_two(tmp_path: Path):
    """vLLM would tie them, because the config says that they are tied."""
    whole = save_tiny(tmp_path / "tied", 0)
    apart = save_tiny(tmp_path / "apart", 0, tied=False)
    config = json.loads((apart / "config.json").read_text())
    (apart / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    given = ServeCommand(source="x", host="h", port=1)
    untied = ["--hf-overrides", '{"tie_word_embeddings": false}']
    assert server_command(apart, given, "cpu")[-2:] == untied
    assert "--hf-overrides" not in server_command(whole, given, "cpu")


def test_the_arguments_of_vllm_follow_two_dashes():
    command = ["runs/a", "--step", "40", "--port=9", "--", "--seed", "3"]
    assert parse(command) == ServeCommand(
        source="runs/a", step="40", host="127.0.0.1", port=9, arguments=("--seed", "3")
    )


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["a", "--seed", "3"], "--seed: hybridrl serve takes "),
        ([], "hybridrl serve takes one run directory or model folder"),
        (["a", "b"], "hybridrl serve takes one run directory or model folder"),
        (["a", "--port", "x"], "--port x: must be a number from 1 to 65535"),
        (["a", "--port=0"], "--port 0: must be a number from 1 to 65535"),
        (["a", "--port"], "--port : must be a number from 1 to 65535"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_sentence(command: list[str], sentence: str):
    with pytest.raises(ConfigError) as caught:
        parse(command)
    assert str(caught.value).startswith(sentence)


def test_a_folder_without_a_model_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert main(["serve", str(tmp_path)]) == 2
    assert (
        "is neither a run (no config.yaml) nor a model (no config.json)" in capsys.readouterr().err
    )
