"""When a channel of nccl or ipc is formed, and what is sent through it, tested with a learner and
engines that record their calls. tests/weights/test_gpu_transfer.py uses real ones.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest

from hybridrl.core.errors import WorkerDied
from hybridrl.runtime.fleet import Fleet, do_nothing
from hybridrl.runtime.learner_group import Connected, LearnerGroup
from hybridrl.runtime.weight_sync import WeightSync
from hybridrl.settings.choices import WeightTransfer
from hybridrl.types import WeightManifest

PACKED = WeightManifest(
    version=5, names=(), dtypes=(), shapes=(), offsets=(), nbytes=70, digest="d"
)


class Group:
    """The actors of two engines. The epoch of an engine counts how often it was replaced."""

    def __init__(self) -> None:
        self.epochs = [0, 0]

    def incarnations(self, engines: Iterable[int]) -> tuple[tuple[int, int], ...]:
        return tuple((engine, self.epochs[engine]) for engine in engines)


class Engines(Fleet):
    """The product's fleet, except that the test tells it which engines are lost and ready."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.serving = {0, 1}
        self.ready: set[int] = set()
        self.joined = do_nothing

    def _admit_ready(self, watch: Callable[[], None]) -> None:
        self.serving |= self.ready
        self.ready = set()

    def fail(self, engine: int) -> None:
        self.serving.discard(engine)
        self.group.epochs[engine] += 1


class Rollout:
    """A rollout group that records its calls.

    Attributes:
        dead: engines that have died and do not answer the next check.
        interrupted: engines whose update was interrupted, so that they cannot leave their channel.
        starting: engines that become ready when all others have left the channel.
    """

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.group = Group()
        self.fleet = Engines(self.group)
        self.dead: list[int] = []
        self.interrupted: list[int] = []
        self.starting: list[int] = []

    def check(self) -> None:
        self.calls.append("check")
        while self.dead:
            self.fleet.fail(self.dead.pop())

    def leave_channel(self) -> None:
        self.calls.append("leave")
        while self.interrupted:
            self.fleet.fail(self.interrupted.pop())
        self.fleet.ready |= set(self.starting)

    def load_weights(self, manifest: WeightManifest, packed: object) -> None:
        self.calls.append(f"load {packed}")


class Learner:
    """A learner group that records its calls.

    Attributes:
        error: the error that the next sending raises; None: it succeeds.
    """

    is_connected = LearnerGroup.is_connected

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.connected: Connected | None = None
        self.error: WorkerDied | None = None

    def pack_weights(self, version: int) -> tuple[WeightManifest, object]:
        self.calls.append(f"pack {version}")
        return PACKED, "packed"

    def connect_engines(self, backend: WeightTransfer, rollout: Rollout) -> None:
        self.connected = Connected.to(rollout)
        self.calls.append(f"connect {sorted(rollout.fleet.serving)}")

    def send_weights(self, version: int) -> int:
        self.calls.append(f"send {version}")
        if self.error is not None:
            raise self.error
        return 70


@dataclass
class Scene:
    """A learner and two engines with a channel of nccl, and the calls since they were last read."""

    calls: list[str] = field(default_factory=list)
    backend: WeightTransfer = WeightTransfer.nccl

    def __post_init__(self) -> None:
        self.rollout = Rollout(self.calls)
        self.learner = Learner(self.calls)
        self.sync = WeightSync(self.learner, self.rollout, self.backend)

    def published(self, version: int) -> list[str]:
        """Publish a version; returns the calls until all engines serve it."""
        assert self.sync.publish(version) == 70
        return self.taken()

    def admitted(self, *engines: int) -> list[str]:
        """Make these engines ready; returns the calls before prompts are sampled."""
        self.rollout.fleet.ready |= set(engines)
        self.rollout.fleet.admit()
        return self.taken()

    def taken(self) -> list[str]:
        taken = [*self.calls]
        self.calls.clear()
        return taken


FORMED = ["leave", "connect [0, 1]"]


@pytest.fixture
def scene() -> Scene:
    """A scene in which the engines serve version 1."""
    scene = Scene()
    assert scene.published(1) == ["check", *FORMED, "send 1"]
    return scene


def test_a_channel_to_the_same_engines_is_formed_once(scene: Scene):
    assert scene.published(2) == ["check", "send 2"]
    assert scene.admitted() == [] and scene.sync.version == 2


def test_after_a_loss_the_channel_is_formed_with_the_others_before_anything_is_sent(scene: Scene):
    scene.rollout.dead = [1]
    assert scene.published(2) == ["check", "leave", "connect [0]", "send 2"]
    assert scene.published(3) == ["check", "send 3"]


def test_an_engine_that_joins_between_two_updates_is_sent_the_last_version(scene: Scene):
    """Until then it has the weights that it has read from disk."""
    scene.rollout.dead = [1]
    scene.published(2)
    assert scene.admitted(1) == [*FORMED, "send 2"]
    assert scene.admitted() == [], "once"
    assert scene.published(3) == ["check", "send 3"]


def test_another_engine_in_the_place_of_one_is_not_taken_for_it(scene: Scene):
    """Its predecessor was lost, and it joins before an update, so engines 0 and 1 serve again."""
    scene.rollout.fleet.fail(1)
    assert scene.admitted(1) == [*FORMED, "send 1"]


def test_an_engine_that_joins_as_an_update_begins_is_sent_the_new_version_alone(scene: Scene):
    scene.rollout.dead = [1]
    scene.published(2)
    scene.rollout.fleet.ready = {1}
    assert scene.published(3) == ["check", *FORMED, "send 3"]


def test_an_engine_that_cannot_leave_the_channel_is_not_in_the_next_one_and_one_that_is_ready_is(
    scene: Scene,
):
    scene.rollout.fleet.fail(1)
    scene.rollout.interrupted = [0]
    scene.rollout.starting = [1]
    assert scene.published(2) == ["check", "leave", "connect [1]", "send 2"]
    assert scene.admitted(0) == [*FORMED, "send 2"]


def test_after_a_failed_sending_an_engine_that_joins_waits_for_the_next_update(scene: Scene):
    """Some engines may have the new weights and some the old ones, so nothing is sent to it
    alone.
    """
    scene.learner.error = WorkerDied("rollout/1", "update_weights", "it has died")
    with pytest.raises(WorkerDied):
        scene.sync.publish(2)
    assert scene.taken() == ["check", "send 2"] and scene.sync.version is None
    scene.learner.error = None
    scene.rollout.fleet.fail(1)
    assert scene.admitted(1) == []
    assert scene.published(2) == ["check", *FORMED, "send 2"]


def test_before_the_first_update_nothing_is_sent_to_an_engine_that_joins():
    scene = Scene()
    scene.rollout.fleet.fail(1)
    assert scene.admitted(1) == []


def test_the_object_store_needs_no_channel():
    scene = Scene(backend=WeightTransfer.object_store)
    assert scene.published(5) == ["pack 5", "load packed"]
    scene.rollout.fleet.fail(1)
    assert scene.admitted(1) == []
