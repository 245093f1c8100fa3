"""The ranks of the learner, which are called together."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hybridrl.core.errors import CheckpointError, WorkerError
from hybridrl.core.free_port import free_port
from hybridrl.runtime.actor_group import ActorGroup, EngineCall, Slot
from hybridrl.runtime.calls import Pending, gather
from hybridrl.runtime.chunk import Chunk
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.settings.choices import WeightTransfer
from hybridrl.settings.run import RunSettings
from hybridrl.types import (
    BatchPlan,
    Files,
    LearnerStats,
    SavedFile,
    TokenScores,
    UpdatePlan,
    WeightManifest,
)

POLL_S = 0.2
"""Between two questions whether the ranks have written their files."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The engines that a channel of nccl or ipc is open to, each with its epoch."""

    group: ActorGroup
    engines: tuple[tuple[int, int], ...]

    @classmethod
    def to(cls, rollout: RolloutGroup) -> "Connected":
        """The engines that serve now."""
        return cls(rollout.group, rollout.group.incarnations(sorted(rollout.fleet.serving)))


class LearnerGroup:
    """consumes references to chunks, rewards and scores / produces updates and weights / all calls
    but `ready` and `logprob_gaps` wait for every rank: the ranks work together, so that the failure
    of one ends the wait.
    """

    worker = "hybridrl.policy.learner:Learner"

    def __init__(
        self, settings: RunSettings, slots: Sequence[Slot], *, device: str, log_dir: str
    ) -> None:
        self.settings = settings
        self.device = device
        self.slot = slots[0]
        master = free_port_at(self.slot, settings.deadlines.start_s)
        arguments = [
            {"settings": settings, "rank": rank, "master": master, "device": device}
            for rank in range(len(slots))
        ]
        self.group = ActorGroup("learner", self.worker, slots, arguments, log_dir=log_dir)
        self.master = master
        self.given_up: str | None = None  # why no checkpoint is waited for any more
        self.connected: Connected | None = None

    def ready(self) -> list[Pending]:
        return self.group.submit_all("ping", deadline_s=self.settings.deadlines.start_s)

    def note_failure(self, error: WorkerError) -> None:
        """Do not wait any longer for a checkpoint if the error is of a rank: a rank that failed
        does not write its file.
        """
        if error.worker in self.group.names:
            self.give_up("a learner rank failed while its file was being written")

    def give_up(self, reason: str) -> None:
        """Do not wait any longer for a checkpoint, whose thread would keep this process alive.

        Args:
            reason: a sentence without its full stop.
        """
        self.given_up = self.given_up or reason

    def configure(self, settings: RunSettings) -> None:
        """Learn by other settings from here on; the student stays."""
        self.settings = settings
        self.group.call_all("configure", settings, deadline_s=settings.deadlines.start_s)

    def keep_start(self) -> None:
        """Keep a copy of the student as it is, with which `begin_job` begins."""
        self.group.call_all("keep_start", deadline_s=self.settings.deadlines.save_s)

    def begin_job(self, settings: RunSettings, log_dir: str) -> None:
        """Learn in another job as a learner that starts with it does, from the kept student."""
        self.settings = settings
        self.group.begin_job(settings, log_dir, {"settings": settings})
        self.group.call_all("begin_job", settings, deadline_s=settings.deadlines.start_s)

    def learn(
        self,
        plan: BatchPlan,
        groups: Sequence[Sequence[Sequence[Sequence[int]]]],
        values: Sequence[Sequence[ray.ObjectRef]],
    ) -> LearnerStats:
        """The optimizer steps of one batch. Every rank returns the same global statistics, and its
        own work.

        Args:
            groups: per rank, of each mini-batch, of each of its chunks which groups are its own.
            values: per rank, the references of its chunks, as in Learner.learn.
        """
        return self._on_ranks("learn", plan, groups, values)

    def evaluate(
        self,
        plan: UpdatePlan,
        groups: Sequence[Sequence[Sequence[int]]],
        values: Sequence[Sequence[ray.ObjectRef]],
    ) -> LearnerStats:
        """Measure held-out data; nothing is learned.

        Args:
            groups: per rank, of each of its chunks which groups are its own.
            values: as in `learn`.
        """
        return self._on_ranks("evaluate", plan, groups, values)

    def _on_ranks(
        self,
        method: str,
        plan: BatchPlan | UpdatePlan,
        groups: Sequence[Sequence[Any]],
        values: Sequence[Sequence[ray.ObjectRef]],
    ) -> LearnerStats:
        limit = self.settings.deadlines.learn_s
        per_rank = enumerate(zip(groups, values, strict=True))
        stats: list[LearnerStats] = gather(
            [
                self.group.submit(rank, method, plan, own, *refs, deadline_s=limit)
                for rank, (own, refs) in per_rank
            ]
        )
        return replace(stats[0], work=tuple(work for of_rank in stats for work in of_rank.work))

    def release(self) -> None:
        """Every rank moves what only an update needs from its GPU to host memory."""
        self.group.call_all("release", deadline_s=self.settings.deadlines.learn_s)

    def acquire(self) -> None:
        """The other end of `release`."""
        self.group.call_all("acquire", deadline_s=self.settings.deadlines.learn_s)

    def logprob_gaps(self, chunks: Sequence[Chunk]) -> list[Pending]:
        """One call per rank: -> mean |log p - log mu| in nats, by the present weights, of each
        chunk whose number is the rank's modulo the number of ranks. Does not wait.
        """
        refs = [chunk.batch.ref for chunk in chunks]
        limit = self.settings.deadlines.learn_s
        ranks = self.group.size
        return [
            self.group.submit(rank, "logprob_gaps", *refs[rank::ranks], deadline_s=limit)
            for rank in range(ranks)
        ]

    def shared_scores(self, chunk: Chunk) -> list[list[TokenScores]]:
        """Per rank, the scores of a chunk by each of settings.shared_teachers."""
        limit = self.settings.deadlines.learn_s
        return self.group.call_all("shared_scores", chunk.batch.ref, deadline_s=limit)

    def pack_weights(self, version: int) -> tuple[WeightManifest, ray.ObjectRef]:
        """The student's weights as one object; only the manifest comes to the caller."""
        limit = self.settings.deadlines.sync_s
        pairs = [
            self.group.submit_pair(rank, "pack_weights", version, deadline_s=limit)
            for rank in range(self.group.size)
        ]
        manifests = gather([manifest for manifest, _ in pairs])
        return manifests[0], pairs[0][1].ref

    def connect_engines(self, backend: WeightTransfer, rollout: RolloutGroup) -> None:
        """Open a channel of nccl or ipc to the engines that serve; the one before is closed."""
        self.connected = None
        limit = self.settings.deadlines.start_s
        engines = tuple(sorted(rollout.fleet.serving))
        self.group.call_all(
            "connect_engines",
            str(backend),
            free_port_at(self.slot, limit),
            EngineCall(rollout.group, engines, limit),
            len(engines),
            deadline_s=limit,
        )
        self.connected = Connected.to(rollout)

    def is_connected(self, rollout: RolloutGroup) -> bool:
        """Whether the channel is open to the engines that serve now, and to no other."""
        return self.connected == Connected.to(rollout)

    def send_weights(self, version: int) -> int:
        """Send the weights to the connected engines, which serve them as this version; returns the
        bytes that each one received.
        """
        limit = self.settings.deadlines.sync_s
        return self.group.call_all("send_weights", version, deadline_s=limit)[0]

    def state_bytes(self) -> int:
        return sum(self.group.call_all("state_bytes", deadline_s=self.settings.deadlines.save_s))

    def begin_save(self, folder: str) -> Files:
        """Every rank begins to write its own file; with checkpoint.background from a copy of its
        state.

        Returns:
            A function that waits for the files; it may be called in another thread.
        """
        self.group.call_all("begin_save", folder, deadline_s=self.settings.deadlines.save_s)
        return self._saved_files

    def _saved_files(self) -> list[SavedFile]:
        """Raises:
        CheckpointError: a file could not be written, or is not written within deadlines.save_s.
        WorkerError: a rank failed.
        """
        limits = self.settings.deadlines
        end = time.monotonic() + limits.save_s
        while True:
            self._check_wanted()
            # A rank answers at the end of the update that it is busy with.
            calls = self.group.submit_all("saved_file", deadline_s=limits.learn_s + limits.save_s)
            files = gather(calls, self._check_wanted)
            if None not in files:
                return files
            if time.monotonic() > end:
                raise CheckpointError(
                    f"a learner rank has not written its file within deadlines.save_s="
                    f"{limits.save_s:g}; raise it, or write to a faster disk"
                )
            time.sleep(POLL_S)

    def _check_wanted(self) -> None:
        if self.given_up is not None:
            raise CheckpointError(self.given_up)

    def load_state(self, folder: str, optimizer_steps: int) -> None:
        self.group.call_all(
            "load_state", folder, optimizer_steps, deadline_s=self.settings.deadlines.save_s
        )

    def export(self, folder: str) -> None:
        self.group.call_all("export", folder, deadline_s=self.settings.deadlines.save_s)

    def close(self) -> None:
        self.group.close()


def free_port_at(slot: Slot, start_s: float) -> tuple[str, int]:
    """Address and a free TCP port of the node that the slot is on; if that node is gone, of the one
    where Ray places the slot anew.
    """
    node = PlacementGroupSchedulingStrategy(slot.group, placement_group_bundle_index=slot.bundle)
    ref = ray.remote(_free_port).options(num_cpus=0, scheduling_strategy=node).remote()
    return gather(
        [
            Pending(
                ref=ref, worker=f"the node of {slot.node_ip}", call="free_port", deadline_s=start_s
            )
        ]
    )[0]


def _free_port() -> tuple[str, int]:
    return ray.util.get_node_ip_address(), free_port()
