"""A run continues without its terminal, and no file is opened with a standard descriptor."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridrl.core.terminal import SurvivingStream
from hybridrl.tracking.console import ConsoleSink

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """\
import os, sys
from hybridrl.core.terminal import secure_streams
secure_streams()
for i in range(1000):
    print("a line of the console", i)
    print("a line of an error", file=sys.stderr)
sys.stdout.flush()
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(file, b"%d" % file)
print("another line", flush=True)
"""


def run(tmp_path: Path, before: str = "", after: str = "") -> tuple[int, str]:
    """Run PROGRAM in a shell; returns its exit status, and the descriptor that it got for a
    file.
    """
    (tmp_path / "program.py").write_text(PROGRAM)
    file = tmp_path / "file"
    command = f"{before} {sys.executable} {tmp_path / 'program.py'} {file} {after}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shell = ["bash", "-o", "pipefail", "-c", command]
    process = subprocess.run(shell, env=environment, capture_output=True, timeout=60)
    return process.returncode, file.read_text() if file.exists() else ""


@pytest.mark.parametrize(
    ("what", "after"),
    [
        ("a reader that has ended", "| true"),
        ("a reader that takes three lines", "| head -3"),
        ("a full disk", "> /dev/full 2>&1"),
        ("only the errors on a full disk", "2> /dev/full"),
        ("both closed", ">&- 2>&-"),
        ("all three closed", "<&- >&- 2>&-"),
        ("the input closed", "<&-"),
    ],
)
def test_a_process_survives_its_terminal_and_reserves_the_standard_descriptors(
    tmp_path: Path, what: str, after: str
):
    status, descriptor = run(tmp_path, after=after)
    assert status == 0, what
    assert int(descriptor) >= 3, what


def test_a_character_that_the_terminal_lacks_is_escaped(tmp_path: Path):
    program = (
        "from hybridrl.core.terminal import secure_streams; secure_streams(); print('\\u2713 done')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", program]
    process = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert (process.returncode, process.stdout) == (0, b"\\u2713 done\n")


class Failing(io.StringIO):
    """A stream whose writes fail with an error from the second one on."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.lines: list[str] = []

    def write(self, text: str) -> int:
        if self.lines:
            raise self.error
        self.lines.append(text)
        return len(text)


@pytest.mark.parametrize(
    "error", [BrokenPipeError("gone"), OSError(28, "No space left on device"), ValueError("closed")]
)
def test_a_failed_write_drops_console_lines_and_raises_nothing(error: Exception):
    failing = Failing(error)
    stream = SurvivingStream(failing)
    console = ConsoleSink(stream)  # type: ignore[arg-type]
    console.notice("one")
    console.notice("two")
    console.log({"train/step": 1.0})
    assert failing.lines == ["one"] and stream.failure is not None


def test_output_continues_after_a_reader_was_slow_for_a_while():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    os.set_blocking(reader, False)
    stream = SurvivingStream(os.fdopen(writer, "w"))
    for _ in range(3000):
        stream.write("a line of a hundred letters" + "." * 73 + "\n")
        stream.flush()
    received = b""
    for _ in range(10):
        stream.write("the last line\n")
        stream.flush()
        received = os.read(reader, 10**6)
    os.close(reader)
    assert stream.failure is None and received.endswith(b"the last line\n")


def test_version_exits_normally_with_every_standard_descriptor_closed():
    command = f"{sys.executable} -m hybridrl.cli --version <&- >&- 2>&-"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(["bash", "-c", command], env=environment, timeout=60).returncode == 0
