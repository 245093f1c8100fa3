"""The internals of multiprocessing that hybridrl/rewards/spawn.py relies on."""

import os
import struct
import sys
import types
from multiprocessing.spawn import get_preparation_data

import pytest

from hybridrl.rewards.spawn import BareContext, limit_waits, without_main_script


def test_a_spawned_process_is_given_the_main_script_except_inside_of_the_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = types.ModuleType("__main__")
    script.__file__ = "/home/me/train.py"
    monkeypatch.setitem(sys.modules, "__main__", script)
    assert get_preparation_data("child")["init_main_from_path"] == "/home/me/train.py"
    with without_main_script():
        prepared = get_preparation_data("child")
    assert not {"init_main_from_path", "init_main_from_name"} & prepared.keys()
    assert sys.modules["__main__"] is script


def test_a_process_is_started_through_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-1a2b3c4d5e")
    context = BareContext()
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=send_environment, args=(writer,))
    process.start()
    writer.close()
    assert reader.recv() is False
    process.join()


def send_environment(writer) -> None:
    """Send whether the process was started with the variable, according to /proc."""
    with open("/proc/self/environ", "rb") as file:
        writer.send(b"SOME_API_KEY=sk" in file.read())


def test_a_read_of_half_a_message_fails_and_a_whole_one_arrives() -> None:
    reader, writer = BareContext().Pipe()
    limit_waits(reader, 0.01)
    writer.send_bytes(b"whole")
    assert reader.recv_bytes() == b"whole"
    os.write(writer.fileno(), struct.pack("!i", 5) + b"ha")  # the length, and a part of the content
    with pytest.raises(BlockingIOError):
        reader.recv_bytes()


def test_a_write_that_nothing_reads_fails() -> None:
    _reader, writer = BareContext().Pipe()
    limit_waits(writer, 0.01)
    with pytest.raises(BlockingIOError):
        writer.send_bytes(bytes(2**24))
