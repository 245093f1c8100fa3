"""The group of the learner's ranks, which are called together."""

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
"""Seconds between two checks whether the ranks have written their files."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The engines to which a channel of nccl or ipc is open."""

    group: ActorGroup
    engines: tuple[tuple[int, int], ...]  # (index, epoch)

    @classmethod
    def to(cls, rollout: RolloutGroup) -> "Connected":
        """The engines that serve now."""
        return cls(rollout.group, rollout.group.incarnations(sorted(rollout.fleet.serving)))


class LearnerGroup:
    """Calls the learner's ranks.

    consumes references to chunks, rewards and scores / produces updates and weights / all methods
    that call the ranks wait for every rank, except `ready` and `logprob_gaps`. The ranks work
    together, so the failure of one ends the wait.
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
        self.given_up: str | None = None  # why checkpoints are no longer waited for
        self.connected: Connected | None = None

    def ready(self) -> list[Pending]:
        return self.group.submit_all("ping", deadline_s=self.settings.deadlines.start_s)

    def note_failure(self, error: WorkerError) -> None:
        """Stop waiting for a checkpoint if `error` is about a rank: a failed rank does not write
        its file.
        """
        if error.worker in self.group.names:
            self.give_up("a learner rank failed while its file was being written")

    def give_up(self, reason: str) -> None:
        """Stop waiting for a checkpoint, since the waiting thread would keep this process alive.

        Args:
            reason: a sentence without its full stop.
        """
        self.given_up = self.given_up or reason

    def configure(self, settings: RunSettings) -> None:
        """Use other settings from now on; the student is unchanged."""
        self.settings = settings
        self.group.call_all("configure", settings, deadline_s=settings.deadlines.start_s)

    def keep_start(self) -> None:
        """Keep a copy of the student's present state, to which `begin_job` returns."""
        self.group.call_all("keep_start", deadline_s=self.settings.deadlines.save_s)

    def begin_job(self, settings: RunSettings, log_dir: str) -> None:
        """Serve another job as a new learner would, starting from the kept copy of the student."""
        self.settings = settings
        self.group.begin_job(settings, log_dir, {"settings": settings})
        self.group.call_all("begin_job", settings, deadline_s=settings.deadlines.start_s)

    def learn(
        self,
        plan: BatchPlan,
        groups: Sequence[Sequence[Sequence[Sequence[int]]]],
        values: Sequence[Sequence[ray.ObjectRef]],
    ) -> LearnerStats:
        """Take the optimizer steps of one batch.

        Args:
            groups: groups[rank][m][c]: the indices of the rank's groups of mini-batch m in its
                chunk c.
            values: per rank, the references of its chunks, as in Learner.learn.

        Returns:
            The statistics of the first rank, with the work of all ranks. The other statistics are
            over all ranks.
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
            groups: groups[rank][c]: the indices of the rank's groups in its chunk c.
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
        """Move the state that only updates need from the GPUs of all ranks to host memory."""
        self.group.call_all("release", deadline_s=self.settings.deadlines.learn_s)

    def acquire(self) -> None:
        """Undo `release`."""
        self.group.call_all("acquire", deadline_s=self.settings.deadlines.learn_s)

    def logprob_gaps(self, chunks: Sequence[Chunk]) -> list[Pending]:
        """Submit one call per rank, without waiting. The call to rank r returns, for every chunk i
        with i % ranks == r, the mean |log p - log mu| in nats under the present weights.
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
        """Pack the student's weights into one object. Returns their manifest, and a reference to
        the object.
        """
        limit = self.settings.deadlines.sync_s
        pairs = [
            self.group.submit_pair(rank, "pack_weights", version, deadline_s=limit)
            for rank in range(self.group.size)
        ]
        manifests = gather([manifest for manifest, _ in pairs])
        return manifests[0], pairs[0][1].ref

    def connect_engines(self, backend: WeightTransfer, rollout: RolloutGroup) -> None:
        """Open a channel of nccl or ipc to the engines that serve; an earlier one is closed."""
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
        """Let every rank begin to write its own file, with checkpoint.background from a copy of its
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
            # A rank answers at once, or at the end of the call that it is busy with.
            limit = max(limits.learn_s, limits.save_s)
            calls = self.group.submit_all("saved_file", deadline_s=limit)
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
    """The address of the slot's node and a TCP port that is free on it. If that node is gone, they
    are those of the node where Ray places the slot anew.
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
