"""Engines and learner that take turns: which one releases memory, which acquires it, and when."""

import pytest

from hybridrl.runtime.residency import Phase, Residency


class Engines:
    """A rollout group that records its calls."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name = name
        self.calls = calls

    def sleep(self) -> None:
        self.calls.append(f"{self.name} sleep")

    def wake_up(self, parts: list[str]) -> None:
        self.calls.append(f"{self.name} wake_up {' '.join(parts)}")


class Learner:
    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def release(self) -> None:
        self.calls.append("release")

    def acquire(self) -> None:
        self.calls.append("acquire")


def calls_of(*phases: Phase, residency: Residency | None = None) -> list[str]:
    """The calls with which newly started workers go through these phases."""
    calls: list[str] = []
    taking = residency or Residency(takes_turns=True)
    for phase in phases:
        taking.enter(phase, [Engines("rollout", calls)], Learner(calls))
    return calls


def test_a_step_samples_then_learns_then_sends_weights_and_each_makes_room_first():
    started = [Phase.sync, Phase.sample]
    step = [Phase.sample, Phase.learn, Phase.sync, Phase.sample]
    first = ["release", "rollout wake_up weights", "rollout wake_up kv_cache"]
    assert calls_of(*started) == first
    assert calls_of(*started, *step) == [*first, "rollout sleep", "acquire", *first]


def test_a_step_that_learned_nothing_wakes_its_engines_with_the_weights_that_they_had():
    assert calls_of(Phase.sample, Phase.learn, Phase.sample)[1:] == [
        "rollout wake_up weights kv_cache",
        "rollout sleep",
        "acquire",
        "release",
        "rollout wake_up weights kv_cache",
    ]


def test_weights_that_are_sent_after_sampling_find_no_kv_cache():
    assert calls_of(Phase.sample, Phase.sync)[2:] == ["rollout sleep", "rollout wake_up weights"]


def test_every_group_of_engines_makes_room_before_the_learner_takes_it():
    calls: list[str] = []
    groups = [Engines("rollout", calls), Engines("teacher", calls)]
    taking = Residency(takes_turns=True, phase=Phase.sample)
    taking.enter(Phase.learn, groups, Learner(calls))
    assert calls == ["rollout sleep", "teacher sleep", "acquire"]


@pytest.mark.parametrize("phase", list(Phase))
def test_a_new_learner_finds_sleeping_engines_whatever_the_phase(phase: Phase):
    calls: list[str] = []
    taking = Residency(takes_turns=True, phase=phase)
    taking.begin_again([Engines("rollout", calls)])
    assert calls == ["rollout sleep"] and taking.phase is Phase.learn


def test_workers_that_take_no_turns_are_not_called():
    residency = Residency(takes_turns=False)
    assert calls_of(*Phase, residency=residency) == []
    residency.begin_again([Engines("rollout", calls := [])])
    assert calls == []
