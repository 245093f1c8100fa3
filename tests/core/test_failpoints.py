"""Failpoints fire at the place and time that a test sets, and never otherwise."""

import errno
import subprocess
import sys

import pytest

from hybridrl.core import failpoints


def test_nothing_happens_while_the_variable_is_unset(monkeypatch):
    monkeypatch.setenv(failpoints.VARIABLE, "learner.update:do=raise")
    with pytest.raises(RuntimeError):
        failpoints.hit("learner.update", step=1)
    monkeypatch.delenv(failpoints.VARIABLE)
    failpoints.hit("learner.update", step=1)


def test_a_point_fires_at_its_place_and_under_its_conditions_only(monkeypatch):
    monkeypatch.setenv(failpoints.VARIABLE, "learner.update:step=2:do=raise;save:do=enospc")
    failpoints.hit("learner.update", step=1)
    failpoints.hit("learner", step=2)
    with pytest.raises(RuntimeError, match=r"failpoint learner\.update"):
        failpoints.hit("learner.update", step=2)
    with pytest.raises(OSError) as caught:
        failpoints.hit("save")
    assert caught.value.errno == errno.ENOSPC


def test_a_point_with_a_marker_file_fires_once(monkeypatch, tmp_path):
    monkeypatch.setenv(failpoints.VARIABLE, f"save:do=raise:once={tmp_path / 'fired'}")
    with pytest.raises(RuntimeError):
        failpoints.hit("save")
    failpoints.hit("save")
    assert (tmp_path / "fired").exists()


def test_kill_ends_the_process_before_it_prints():
    code = "from hybridrl.core import failpoints; failpoints.hit('x'); print('alive')"
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={failpoints.VARIABLE: "x:do=kill"},
        capture_output=True,
        timeout=60,
    )
    assert process.returncode == -9 and process.stdout == b""


@pytest.mark.parametrize("text", ["x:do=explode", "x", "x:step"])
def test_a_point_that_cannot_be_parsed_raises(text):
    with pytest.raises((ValueError, KeyError)):
        failpoints.parse(text)
