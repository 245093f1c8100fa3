"""Copying an object to many nodes in rounds, and the placement of workers that share GPUs."""

from types import SimpleNamespace

import pytest

from hybridrl.runtime import fan_out
from hybridrl.runtime.cluster import Team, shared_bundles
from hybridrl.runtime.fan_out import rounds


def test_each_round_has_as_many_receivers_as_have_the_object_before_it():
    """After five rounds 32 nodes have the object, including the source."""
    assert rounds([0, 1, 2, 3, 4]) == [[0], [1, 2], [3, 4]]
    assert [len(receivers) for receivers in rounds(range(31))] == [1, 2, 4, 8, 16]
    assert rounds([]) == []


class Recorder:
    """A group with a worker on each of the given nodes, which records the objects that are sent."""

    def __init__(self, *nodes: str) -> None:
        self.slots = [SimpleNamespace(node_id=node) for node in nodes]
        self.brought: list[int] = []

    def bring(self, worker: int, ref: str, *, deadline_s: float) -> tuple[int, str, float]:
        self.brought.append(worker)
        return worker, ref, deadline_s


def rounds_of(
    monkeypatch: pytest.MonkeyPatch, group: Recorder, workers: list[int]
) -> list[list[tuple[int, str, float]]]:
    """The calls of each round; a round ends when its calls are awaited."""
    waited: list[list[tuple[int, str, float]]] = []
    monkeypatch.setattr(fan_out, "outcomes", lambda calls, watch: waited.append(calls))
    fan_out.fan_out(group, workers, "weights", deadline_s=9.0, watch=lambda: None)
    return waited


def test_one_worker_of_each_node_is_given_the_object_and_each_round_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
):
    """Workers 1 and 3 do not need the object; worker 4 is on the node of worker 0."""
    group = Recorder("a", "b", "c", "d", "a", "e", "f")
    waited = rounds_of(monkeypatch, group, [0, 2, 4, 5, 6])
    assert waited == [
        [(0, "weights", 9.0)],
        [(2, "weights", 9.0), (5, "weights", 9.0)],
        [(6, "weights", 9.0)],
    ]


def test_for_two_nodes_nothing_is_done(monkeypatch: pytest.MonkeyPatch):
    group = Recorder("a", "b", "a", "b")
    assert rounds_of(monkeypatch, group, [0, 1, 2, 3]) == [] and group.brought == []


def test_a_team_that_is_larger_than_another_sits_in_every_bundle_and_a_smaller_one_in_the_first():
    """There are four engines and two learner ranks with GPUs, and six reward workers without
    GPUs.
    """
    teams = [
        Team(name="rollout", size=4, gpus=1, heavy=True),
        Team(name="learner", size=2, gpus=1, heavy=True),
        Team(name="reward", size=6, gpus=0, heavy=False),
    ]
    bundles, seats = shared_bundles(teams)
    assert bundles == [{"CPU": 1.0, "GPU": 1.0}] * 4
    of_team = {t.name: [seat.bundle for seat in seats if seat.team is t] for t in teams}
    assert of_team == {
        "rollout": [0, 1, 2, 3],
        "learner": [0, 1],
        "reward": [0, 1, 2, 3, 0, 1],
    }
