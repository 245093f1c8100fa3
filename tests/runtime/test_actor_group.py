"""Groups of actors in a process that connects to several Rays one after the other, as in a
notebook.
"""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from hybridrl.runtime.actor_group import ActorGroup, dump_stacks
from hybridrl.runtime.cluster import Cluster, Team
from hybridrl.settings.compose import load_config

ROOT = Path(__file__).parents[2]
LIMIT_S = 30.0


def one_worker(cluster: Cluster, log_dir: Path) -> ActorGroup:
    [slot] = cluster.place([Team(name="w", size=1, gpus=0, heavy=False)])["w"]
    slot = replace(slot, env={**slot.env, "PYTHONPATH": str(ROOT)})
    path = "tests.support.failing_worker:Failing"
    group = ActorGroup("w", path, [slot], [{}], log_dir=str(log_dir))
    group.call_all("ping", deadline_s=60)
    return group


@pytest.mark.graph
def test_stacks_are_requested_of_the_workers_of_this_ray_and_not_of_those_of_an_earlier_one(
    tmp_path: Path,
):
    settings = load_config(["run.dir=here", "experiment=quickstart", "cluster.device=cpu"])
    with Cluster(settings) as cluster:
        of_earlier = one_worker(cluster, tmp_path / "earlier")
    with Cluster(settings) as cluster:
        of_this = one_worker(cluster, tmp_path / "now")
        dump_stacks()
        log = tmp_path / "now" / "w-0.log"
        end = time.monotonic() + LIMIT_S
        while "most recent call first" not in log.read_text():
            assert time.monotonic() < end, "no stacks within the limit"
            time.sleep(0.1)
    assert "most recent call first" not in (tmp_path / "earlier" / "w-0.log").read_text()
    assert of_earlier.driver != of_this.driver
