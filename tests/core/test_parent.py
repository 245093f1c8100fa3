"""Processes end when their parent is killed."""

import multiprocessing
import time
from multiprocessing.connection import Connection

import pytest

from hybridrl.core.parent import VARIABLE, end_with_parent

SPAWN = multiprocessing.get_context("spawn")
LONG_S = 120.0


def outlive(end: Connection) -> None:
    end_with_parent()
    end.send("running")
    if end.poll(4 * LONG_S):  # longer than the test waits for this process to end
        end.send(f"still running after {end.recv()}")


def start_child(end: Connection) -> None:
    SPAWN.Process(target=outlive, args=(end,)).start()
    end.close()
    time.sleep(LONG_S)


def started() -> Connection:
    """The connection to a running process whose parent has been killed."""
    here, there = SPAWN.Pipe()
    parent = SPAWN.Process(target=start_child, args=(there,))
    parent.start()
    there.close()
    assert here.poll(LONG_S) and here.recv() == "running"
    parent.kill()
    parent.join()
    return here


def test_a_process_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "1")
    child = started()
    assert child.poll(LONG_S)
    with pytest.raises(EOFError):  # no process holds the other end of the connection any more
        child.recv()


def test_a_process_outlives_its_parent_where_nothing_else_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv(VARIABLE, raising=False)
    child = started()
    child.send("a question")
    assert child.poll(LONG_S) and child.recv() == "still running after a question"
