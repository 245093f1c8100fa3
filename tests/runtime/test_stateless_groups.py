"""How calls are distributed among the interchangeable workers of a group."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from hybridrl.launch.model_engines import teams_of
from hybridrl.runtime.calls import Pending
from hybridrl.runtime.chunk import Chunk
from hybridrl.runtime.cluster import Team
from hybridrl.runtime.reward_group import RewardGroup
from hybridrl.runtime.scorer_group import ScorerGroup
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings


class Recorder:
    """A stand-in for ActorGroup, whose calls name their worker and have the chunk as result."""

    def __init__(
        self,
        name: str,
        path: str,
        slots: Sequence[object],
        arguments: Sequence[Mapping[str, object]],
        *,
        unit: int,
        **others: Any,
    ) -> None:
        self.size = len(slots)
        self.arguments = arguments
        self.unit = unit
        self.submitted: list[tuple[Any, ...]] = []

    def members(self, index: int) -> range:
        return range(index, index + self.unit)

    def submit(self, index: int, method: str, ref: str, *args: Any, deadline_s: float) -> Pending:
        self.submitted.append((method, *args))
        return Pending(ref=ref, worker=str(index), call=method, deadline_s=deadline_s)

    def submit_pair(self, index: int, method: str, ref: str, *, deadline_s: float):
        call = self.submit(index, method, ref, deadline_s=deadline_s)
        return call, call


class Slot:
    num_gpus = 0


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridrl.runtime.stateless_group.ActorGroup", Recorder)


def settings(*overrides: str) -> RunSettings:
    return load_config(["run.dir=here", "experiment=quickstart", *overrides])


def chunks(refs: str) -> list[Chunk]:
    calls = [Pending(ref=ref, worker="rollout/0", call="generate", deadline_s=1.0) for ref in refs]
    return [Chunk(order=None, prompts=(), header=call, batch=call) for call in calls]


def places(calls: Sequence[Pending]) -> str:
    return " ".join(f"{call.ref}{call.worker}" for call in calls)


def test_reward_workers_take_turns_over_chunks_that_come_alone_and_each_wave_begins_anew():
    group = RewardGroup(settings(), [Slot(), Slot()], log_dir="logs")
    assert places(group.score(chunks("abc"), [1.0])) == "a0 b1 c0"
    assert places([group.score_one(chunk, [1.0]) for chunk in chunks("def")]) == "d0 e1 f0"
    assert places(group.score(chunks("gh"), [1.0])) == "g0 h1"
    assert places([group.score_one(chunk, [1.0]) for chunk in chunks("ij")]) == "i1 j0"


def test_the_one_function_that_a_set_names_reaches_the_reward_workers():
    group = RewardGroup(settings(), [Slot()], log_dir="logs")
    [chunk] = chunks("a")
    group.score([chunk], [1.0], "code")
    group.score_one(chunk, [1.0], "code")
    group.score_one(chunk, [1.0])
    assert [only for _, _, only in group.group.submitted] == ["code", "code", None]


@pytest.mark.parametrize(("devices", "expected"), [(1, "a0 b1 c2 d3 e0"), (2, "a0 b2 c0 d2 e0")])
def test_replicas_take_turns_over_chunks_that_come_alone(
    devices: int, expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hybridrl.runtime.scorer_group.free_port_at", lambda slot, limit: "host:1")
    given = settings(f"+teachers.main.devices={devices}")
    group = ScorerGroup(given, [Slot()] * 4, teacher="main", device="cpu", log_dir="logs")
    assert places([group.score_one(chunk).header for chunk in chunks("abcde")]) == expected
    assert places([call.header for call in group.score(chunks("ab"))]) == expected[:5]


def test_a_reward_worker_has_the_deadlines_of_the_run():
    given = settings("deadlines.start_s=70", "deadlines.reward_s=80")
    [arguments] = RewardGroup(given, [Slot()], log_dir="logs").group.arguments
    assert (arguments["start_s"], arguments["deadline_s"]) == (70, 80)


def test_a_model_is_judged_by_as_many_workers_and_on_as_many_gpus_as_in_its_run():
    model = "+reward.functions.rm={function: reward_model, options: {path: somewhere}}"
    given = settings(
        *(model, "reward.gpus=1", "reward.workers=3"),
        *("rollout.tensor_parallel=2", "rollout.groups_per_chunk=1"),
    )
    engines = Team(name="rollout", size=1, gpus=2, heavy=True)
    assert teams_of(given, judged=False) == [engines]
    judges = Team(name="reward", size=3, gpus=1, heavy=False)
    assert teams_of(given, judged=True) == [engines, judges]
