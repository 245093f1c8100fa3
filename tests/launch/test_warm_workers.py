"""The rules by which WarmWorkers keeps workers between jobs, tested without any worker."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

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
    """The sweep ends with this exception and its exit status, as in the middle of a job."""
    monkeypatch.setattr(session, "preflight", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="ended by SIGTERM; run the same command again"):
        train(settings_of(tmp_path / "run"))
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "run").exists()


def kept_by(warm: WarmWorkers, settings: RunSettings, *, intact: bool) -> SimpleNamespace | None:
    """The workers that are kept after a job ends with these settings; None: none are kept."""
    workers = SimpleNamespace(intact=intact)
    warm._cluster = SimpleNamespace(device="cpu")  # connects to no Ray
    with warm.job(settings, {}, measures=False, say=print):
        warm.keep(settings, {}, Path("runs/a"), {}, workers)
    kept, warm._kept = warm._kept, None
    return kept and kept.workers


def test_workers_are_kept_if_all_are_there_and_the_job_shares_them(tmp_path: Path):
    settings = settings_of(tmp_path)
    with WarmWorkers() as warm:
        assert kept_by(warm, settings, intact=True).intact
        assert kept_by(warm, settings, intact=False) is None
        recorded = replace(settings, diagnostics=replace(settings.diagnostics, trace=True))
        assert kept_by(warm, recorded, intact=True) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((), None),
        (("train.lr=0.5",), None),
        (("rollout.max_num_seqs=3",), "rollout.max_num_seqs differs"),
        (("run.seed=5", "rollout.max_num_seqs=3"), "rollout.max_num_seqs differs"),
        (
            ("learner.ranks=2", "rollout.max_num_seqs=3"),
            "learner.ranks, rollout.max_num_seqs, the number of workers differ",
        ),
        (("diagnostics.trace=true",), "diagnostics.trace"),
    ],
)
def test_a_job_has_the_workers_of_the_one_before_unless_their_settings_differ(
    tmp_path: Path, change: tuple[str, ...], reason: str | None
):
    workers = SimpleNamespace(intact=True)
    settings = settings_of(tmp_path)
    changed = load_config(["experiment=quickstart", f"run.dir={tmp_path}", *change])
    said: list[str] = []
    with WarmWorkers() as warm:
        warm._cluster = SimpleNamespace(device="cpu")  # connects to no Ray
        with warm.job(settings, {}, measures=False, say=said.append):
            warm.keep(settings, {}, Path("runs/a"), {}, workers)
        with warm.job(changed, {}, measures=False, say=said.append) as kept:
            assert (kept is not None and kept.workers is workers) == (reason is None)
    assert len(said) == (reason is not None)
    assert all(line.startswith("the workers of the previous job end and new") for line in said)
    assert all(reason in line for line in said if reason)


def test_a_job_that_fails_leaves_no_workers(tmp_path: Path):
    settings = settings_of(tmp_path)
    with WarmWorkers() as warm:
        with pytest.raises(KeyError), warm.job(settings, {}, measures=False, say=print):
            warm.keep(settings, {}, Path("runs/a"), {}, SimpleNamespace(intact=True))
            raise KeyError
        assert warm.run_dir is None
