"""Who holds what on the GPUs that engines and learner share, phase by phase."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from hybridrl.runtime.learner_group import LearnerGroup
from hybridrl.runtime.rollout_group import RolloutGroup


class Phase(StrEnum):
    """What a run does with its models at a time."""

    sample = "sample"
    """engines sample: responses, the probe of their weights, evaluations"""
    sync = "sync"
    """the learner's weights go to the engines"""
    learn = "learn"
    """the learner updates, measures held-out data, saves or loads its state"""


OF_ENGINES = {
    Phase.sample: ("weights", "kv_cache"),
    Phase.sync: ("weights",),
    Phase.learn: (),
}
"""The parts of an engine that are on its GPU; the others are in host memory or dropped."""

WITH_OPTIMIZER = {Phase.learn}
"""Phases in which master weights, optimizer and gradients of the learner are on its GPU.

Its weights always are, since engines receive and the probe compares them. So are the scorers, which
score chunks while others are sampled.
"""


@dataclass(slots=True, kw_only=True)
class Residency:
    """Lets engines and learner take turns, in the order of the calls of `enter`.

    consumes phases / produces engines and a learner that hold what the phase needs / waits for
    those that make room, then for those that take it.
    """

    takes_turns: bool
    """false: all hold everything all the time, and nothing is called"""
    phase: Phase = Phase.learn
    """the present one; workers are started with engines asleep, so that the learner has room"""

    def enter(self, phase: Phase, engines: Sequence[RolloutGroup], learner: LearnerGroup) -> None:
        """Make room for what is needed in `phase`, then bring it to the GPUs.

        Raises:
            WorkerError: a learner rank failed.
            FleetExhausted: an engine did, and no other can take its place.
        """
        if not self.takes_turns or phase is self.phase:
            return
        before = self.phase
        held = OF_ENGINES[before]
        if not set(held) <= set(OF_ENGINES[phase]):
            for group in engines:
                group.sleep()
            held = ()
        if before in WITH_OPTIMIZER:
            learner.release()
        if phase in WITH_OPTIMIZER:
            learner.acquire()
        if waking := [part for part in OF_ENGINES[phase] if part not in held]:
            for group in engines:
                group.wake_up(waking)
        self.phase = phase

    def begin_again(self, engines: Sequence[RolloutGroup]) -> None:
        """Make room for a new learner, whatever the present phase: it starts with its optimizer."""
        if not self.takes_turns:
            return
        for group in engines:
            group.sleep()
        self.phase = Phase.learn
