"""`hybridrl serve`: the command line of the server, and a chat request to a real one."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from hybridrl.cli import main
from hybridrl.controller.serving import parse, server_command
from hybridrl.errors import ConfigError
from hybridrl.models.loading import resolve

ROOT = Path(__file__).parent.parent
START_S = 240.0


def test_the_command_names_the_model_by_its_folder_and_fits_a_cpu():
    command = server_command(
        "builtin:countdown-student", host="h", port=1, device="cpu", arguments=["--seed", "3"]
    )
    folder = resolve("builtin:countdown-student")
    assert command[3:7] == ["--model", str(folder), "--served-model-name", folder.name]
    assert "--enforce-eager" in command and command[-2:] == ["--seed", "3"]
    on_gpu = server_command(str(folder), host="h", port=1, device="cuda", arguments=[])
    assert "--enforce-eager" not in on_gpu


def test_the_arguments_of_vllm_follow_two_dashes():
    assert parse(["runs/a", "--port=9", "--", "--seed", "3"]) == (
        "runs/a",
        "127.0.0.1",
        9,
        ["--seed", "3"],
    )
    for wrong in (["a", "--seed", "3"], [], ["a", "b"], ["a", "--port", "x"]):
        with pytest.raises(ConfigError):
            parse(wrong)


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["serve", str(tmp_path)]) == 2
    assert "exists but holds no config.json" in capsys.readouterr().err


@pytest.mark.graph
def test_a_chat_request_is_answered(tmp_path: Path):
    model = tmp_path / "served"
    shutil.copytree(resolve("builtin:countdown-student"), model)
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "hybridrl.cli", "serve", str(model), "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            wait_until_up(server, port, tmp_path / "log")
            question = {"role": "user", "content": "8 8 4=60:"}
            body = {"model": "served", "messages": [question], "max_tokens": 16, "temperature": 0}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/chat/completions",
                data=json.dumps(body).encode(),
                headers={"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                choice = json.load(answer)["choices"][0]
        finally:
            server.terminate()
            server.wait(timeout=60)
    assert choice["message"]["content"] and choice["finish_reason"] == "stop"


def wait_until_up(server: subprocess.Popen, port: int, log: Path) -> None:
    """Wait for the server's health page; the end of its log, if it ends or takes too long."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server did not come up:\n{log.read_text()[-2000:]}")
