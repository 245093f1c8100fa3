"""A module that runs in a child process."""

import sys
from pathlib import Path

import pytest

from hybridrl.core.child_module import ChildFailed, answer_of

PROGRAM = """
import json, os, sys
given = json.load(sys.stdin)
if "exit" in given:
    sys.exit(given["exit"])
if "wait" in given:
    sys.stdin.read()
    import time
    time.sleep(1000)
print("a library prints")
print(json.dumps([given, os.environ["COLOUR"], os.environ["PYTHONPATH"].split(os.pathsep)]))
"""


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module `program_of_a_test`, in a folder from which this process imports."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "program_of_a_test.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path / "modules")


def answered(given: object, timeout_s: float = 60.0) -> str:
    variables = {"COLOUR": "blue"}
    return answer_of("program_of_a_test", given, timeout_s=timeout_s, variables=variables)


def test_the_last_line_is_the_answer_and_files_of_the_working_directory_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A notebook has "" in sys.path, which is its working directory."""
    (tmp_path / "json.py").write_text("raise AssertionError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert answered({"a": 1}).startswith('[{"a": 1}, "blue", [')
    assert '""' not in answered({})


def test_a_child_that_fails_or_takes_too_long_is_an_error():
    with pytest.raises(ChildFailed, match=r"^no such thing$"):
        answered({"exit": "first line\nno such thing"})
    with pytest.raises(ChildFailed, match=r"^exit code 3$"):
        answered({"exit": 3})
    with pytest.raises(TimeoutError):
        answered({"wait": True}, timeout_s=0.5)
