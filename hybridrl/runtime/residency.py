"""The state that engines and learner hold on the GPUs that they share, in each phase."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from hybridrl.runtime.learner_group import LearnerGroup
from hybridrl.runtime.rollout_group import RolloutGroup


class Phase(StrEnum):
    """A phase of a run, by its use of the models."""

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
"""The parts of an engine that are on its GPU in a phase; the others are in host memory or dropped.
"""

WITH_OPTIMIZER = {Phase.learn}
"""Phases in which the learner's master weights, optimizer state and gradients are on its GPU.

The learner's weights are always there, since engines receive them and the probe uses them. So are
the scorers, which score chunks while others are sampled.
"""


@dataclass(slots=True, kw_only=True)
class Residency:
    """Lets engines and learner take turns, in the order of the calls of `enter`.

    consumes phases / produces engines and a learner that hold what the phase needs / waits for the
    workers that free GPU memory, then for those that need it.
    """

    takes_turns: bool
    """false: all workers keep everything on their GPUs, and nothing is called"""
    phase: Phase = Phase.learn
    """the present phase; engines are put to sleep when they have started, so it is first `learn`"""

    def enter(self, phase: Phase, engines: Sequence[RolloutGroup], learner: LearnerGroup) -> None:
        """Free the GPU memory that `phase` does not need, then load what it needs.

        Raises:
            WorkerError: a learner rank failed.
            FleetExhausted: an engine failed, and cannot be replaced.
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
        """Put all engines to sleep in any phase, to make room for a new learner, which starts with
        its optimizer on the GPU.
        """
        if not self.takes_turns:
            return
        for group in engines:
            group.sleep()
        self.phase = Phase.learn
