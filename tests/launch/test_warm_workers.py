"""What a holder of workers promises without any."""

import os
import signal
from pathlib import Path

import pytest

from hybridrl.core.errors import ConfigError, Preempted
from hybridrl.launch import session
from hybridrl.launch.session import train
from hybridrl.launch.warm_workers import WarmWorkers
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings


def settings_of(run_dir: Path) -> RunSettings:
    return load_config(["experiment=quickstart", f"run.dir={run_dir}"])


def test_a_job_that_begins_during_another_one_is_refused_and_the_next_one_is_not(tmp_path: Path):
    settings = settings_of(tmp_path)
    with WarmWorkers() as warm:
        with warm.job(settings, {}, measures=False, say=print):
            refused = pytest.raises(ConfigError, match="a job that has not ended uses these")
            with refused, warm.job(settings, {}, measures=False, say=print):
                pass
        with warm.job(settings, {}, measures=False, say=print) as kept:
            assert kept is None


def test_a_stop_signal_during_the_checks_of_a_job_is_the_exception_of_one_that_can_be_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A sweep ends with it and its exit status, as in the middle of a job."""
    monkeypatch.setattr(session, "preflight", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="ended by SIGTERM; the same command continues"):
        train(settings_of(tmp_path / "run"))
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "run").exists()
