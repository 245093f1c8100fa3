"""A job reuses the workers of the previous job, unless one of them was lost."""

import os
import signal
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from benchmarks.stage import prompts_of, settings_of

from hybridrl.controller.preemption import Preemption
from hybridrl.launch.session import Session, connect_anew
from hybridrl.launch.warm_workers import Kept, WarmWorkers
from hybridrl.runtime.calls import gather
from hybridrl.runtime.cluster import Cluster
from hybridrl.runtime.learner_group import LearnerGroup
from hybridrl.runtime.reward_group import RewardGroup
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.runtime.scorer_group import ScorerGroup
from hybridrl.runtime.workers import place_workers, start_workers
from hybridrl.tracking.console import ConsoleSink
from hybridrl.tracking.sink import Sinks
from tests.support.importable import importable_benchmarks

LIGHT = {
    RolloutGroup: "Engine",
    ScorerGroup: "Scorer",
    RewardGroup: "Judge",
    LearnerGroup: "Learner",
}
"""The workers of tools/bench, which compute nothing, for the real groups."""


@pytest.mark.graph
def test_a_job_whose_workers_were_lost_before_it_begins_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """The engine is killed after the previous job."""
    for group, worker in LIGHT.items():
        monkeypatch.setattr(group, "worker", f"benchmarks.fake_workers:{worker}")
    settings = settings_of(f"run.dir={tmp_path}", "eval.teacher=false")
    preemption = Preemption()
    with ExitStack() as stack:
        stack.enter_context(importable_benchmarks())
        stack.enter_context(Cluster(settings))  # both sets of workers share one Ray
        holder = stack.enter_context(WarmWorkers())
        cluster = holder.cluster(settings)
        slots = place_workers(settings, cluster)
        before = start_workers(settings, cluster, slots, str(tmp_path / "before"))
        pids = [pid for group in before.groups for pid in group.group.pids()]
        os.kill(before.rollout.group.pids()[0], signal.SIGKILL)
        session = Session(
            settings=settings,
            run_dir=tmp_path,
            cluster=cluster,
            slots=slots,
            prompts=prompts_of(4, 8),
            heldout=[],
            sets=[],
            inputs={},
            console=ConsoleSink(),
            sinks=Sinks(required=[]),
            preemption=preemption,
        )
        kept = Kept(run_dir=tmp_path, slots=slots, workers=before, conditions={})
        anew = partial(connect_anew, settings, holder, preemption, stack)
        workers = session.start(None, kept, anew, keeps=False)
        gather([call for group in workers.groups for call in group.ready()])
        others = [pid for group in workers.groups for pid in group.group.pids()]
    assert len(pids) == len(others) == 4 and not set(pids) & set(others)
    assert session.slots is not slots
    printed = capsys.readouterr().out
    assert "the workers of the previous job end and new ones start: rollout/0" in printed
