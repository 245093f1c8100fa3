"""The four groups of a run, each method typed: the only place where a worker's method is named by a string."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hybridrl.choices import PairLoss, Source, WeightTransfer
from hybridrl.config import ModelConfig, RunSettings
from hybridrl.runtime.calls import Pending, gather
from hybridrl.runtime.group import ActorGroup, EngineCall, Slot
from hybridrl.types import GenerateOrder, LearnerStats, Prompt, Sample, Shard, UpdatePlan, WeightManifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a rollout wave: its header for the controller, its batch for the workers."""

    header: Pending  # -> ChunkHeader
    batch: Pending  # -> RolloutBatch; only ever passed on by reference


class RolloutGroup:
    def __init__(
        self,
        settings: RunSettings,
        slots: Sequence[Slot],
        *,
        model: ModelConfig,
        device: str,
        backend: WeightTransfer,
        log_dir: str,
        name: str = "rollout",
        source: Source = Source.student,
    ) -> None:
        self.settings = settings
        kwargs = {"settings": settings, "model": model, "device": device, "backend": str(backend), "source": source}
        self.group = ActorGroup(name, "hybridrl.workers.rollout:Rollout", slots, [kwargs] * len(slots), log_dir=log_dir, concurrent=True)

    def ready(self) -> list[Pending]:
        return self.group.submit_all("ping", deadline_s=self.settings.deadlines.start_s)

    def generate(
        self, prompts: Sequence[Prompt], *, wave: str, group_size: int, temperature: float, seed: int, support: int = 0
    ) -> list[Chunk]:
        """Start sampling. Chunks are contiguous in prompt order and assigned to engines statically."""
        rollout = self.settings.rollout
        engines, per_engine = self.group.size, rollout.chunks_per_engine
        pieces = split(prompts, min(engines * per_engine, len(prompts)))
        chunks = []
        for i, piece in enumerate(pieces):
            engine = i % engines
            order = GenerateOrder(
                wave=wave, chunk=i // engines, num_chunks=len(range(engine, len(pieces), engines)), group_size=group_size,
                temperature=temperature, max_new_tokens=rollout.max_new_tokens, seed=seed, support=support,
            )  # fmt: skip
            header, batch = self.group.submit_pair(engine, "generate", order, piece, deadline_s=self.settings.deadlines.rollout_s)
            chunks.append(Chunk(header=header, batch=batch))
        return chunks

    def probe(self, prompts: Sequence[Prompt], *, num_tokens: int, support: int) -> list[Chunk]:
        """The same prompts on every engine, greedily: one chunk per engine."""
        order = GenerateOrder(
            wave="probe", chunk=0, num_chunks=1, group_size=1, temperature=0.0, max_new_tokens=num_tokens, seed=0, support=support
        )
        limit = self.settings.deadlines.rollout_s
        pairs = [self.group.submit_pair(i, "generate", order, list(prompts), deadline_s=limit) for i in range(self.group.size)]
        return [Chunk(header=header, batch=batch) for header, batch in pairs]

    def load_weights(self, manifest: WeightManifest, packed: ray.ObjectRef) -> list[Pending]:
        return self.group.submit_all("load_weights", manifest, packed, deadline_s=self.settings.deadlines.sync_s)

    def abort(self) -> list[Pending]:
        """Stop all sampling; -> how many responses each engine gave up."""
        return self.group.submit_all("abort", deadline_s=self.settings.deadlines.sync_s)

    def set_version(self, version: int) -> list[Pending]:
        return self.group.submit_all("update_weight_version", str(version), deadline_s=self.settings.deadlines.sync_s)

    def close(self) -> None:
        self.group.close()


class ScorerGroup:
    """The replicas of one teacher."""

    def __init__(self, settings: RunSettings, slots: Sequence[Slot], *, teacher: str, device: str, log_dir: str) -> None:
        self.settings, self.teacher = settings, teacher
        kwargs = {"settings": settings, "teacher": teacher, "device": device}
        self.group = ActorGroup(f"scorer-{teacher}", "hybridrl.workers.scorer:Scorer", slots, [kwargs] * len(slots), log_dir=log_dir)

    def ready(self) -> list[Pending]:
        return self.group.submit_all("ping", deadline_s=self.settings.deadlines.start_s)

    def configure(self, settings: RunSettings) -> None:
        self.settings = settings
        self.group.call_all("configure", settings, deadline_s=settings.deadlines.start_s)

    def score(self, chunks: Sequence[Chunk]) -> list[tuple[Pending, Pending]]:
        """One call per chunk, which starts when the chunk is done: (-> ScoreHeader, -> TokenScores)."""
        limit = self.settings.deadlines.rollout_s + self.settings.deadlines.score_s
        return [self.group.submit_pair(i % self.group.size, "score", c.batch.ref, deadline_s=limit) for i, c in enumerate(chunks)]


class RewardGroup:
    def __init__(self, settings: RunSettings, slots: Sequence[Slot], *, log_dir: str) -> None:
        self.settings = settings
        watch_only = settings.algorithm.reward_weight.is_zero() and settings.algorithm.pair.loss is PairLoss.none
        model = {"tokenizer_path": settings.model.path, "revision": settings.model.revision}
        kwargs = {"config": settings.reward, **model, "watch_only": watch_only}
        self.group = ActorGroup("reward", "hybridrl.workers.reward:RewardWorker", slots, [kwargs] * len(slots), log_dir=log_dir)

    def ready(self) -> list[Pending]:
        return self.group.submit_all("ping", deadline_s=self.settings.deadlines.start_s)

    def score(self, chunks: Sequence[Chunk], weights: Sequence[float]) -> list[Pending]:
        """One call per chunk: -> Rewards. `weights`: of the functions at this step, in the order of reward.functions."""
        limit = self.settings.deadlines.rollout_s + self.settings.deadlines.reward_s
        return [self.group.submit(i % self.group.size, "score", c.batch.ref, weights, deadline_s=limit) for i, c in enumerate(chunks)]

    def samples(self, chunk: Chunk, rewards: Pending, step: int, count: int) -> tuple[Sample, ...]:
        """The first `count` rollouts of a chunk as text."""
        limit = self.settings.deadlines.reward_s
        return self.group.submit(0, "samples", chunk.batch.ref, rewards.ref, step, count, deadline_s=limit).result()


class LearnerGroup:
    def __init__(self, settings: RunSettings, slots: Sequence[Slot], *, device: str, log_dir: str) -> None:
        self.settings = settings
        self.slot = slots[0]
        master = (self.slot.node_ip, free_port_at(self.slot))
        kwargs = [{"settings": settings, "rank": rank, "master": master, "device": device} for rank in range(len(slots))]
        self.group = ActorGroup("learner", "hybridrl.workers.learner:Learner", slots, kwargs, log_dir=log_dir)
        self.master = master

    def ready(self) -> list[Pending]:
        return self.group.submit_all("ping", deadline_s=self.settings.deadlines.start_s)

    def configure(self, settings: RunSettings) -> None:
        """Learn by other settings from here on; the student stays."""
        self.settings = settings
        self.group.call_all("configure", settings, deadline_s=settings.deadlines.start_s)

    def update(self, plan: UpdatePlan, shards: Sequence[Shard], values: Sequence[Sequence[ray.ObjectRef]]) -> LearnerStats:
        """One optimizer step; shard i and its refs go to rank i. Every rank returns the same global statistics."""
        limit = self.settings.deadlines.learn_s
        per_rank = enumerate(zip(shards, values, strict=True))
        return gather([self.group.submit(rank, "update", plan, shard, *refs, deadline_s=limit) for rank, (shard, refs) in per_rank])[0]

    def pack_weights(self, version: int) -> tuple[WeightManifest, ray.ObjectRef]:
        """The student's weights as one object; only the manifest comes to the caller."""
        limit = self.settings.deadlines.sync_s
        pairs = [self.group.submit_pair(rank, "pack_weights", version, deadline_s=limit) for rank in range(self.group.size)]
        manifests = gather([manifest for manifest, _ in pairs])
        return manifests[0], pairs[0][1].ref

    def connect_engines(self, backend: WeightTransfer, rollout: RolloutGroup) -> None:
        limit = self.settings.deadlines.start_s
        call = EngineCall(rollout.group, limit)
        port = free_port_at(self.slot)
        self.group.call_all("connect_engines", str(backend), (self.master[0], port), call, rollout.group.size, deadline_s=limit)

    def send_weights(self) -> None:
        self.group.call_all("send_weights", deadline_s=self.settings.deadlines.sync_s)

    def save_state(self, folder: str) -> None:
        self.group.call_all("save_state", folder, deadline_s=self.settings.deadlines.save_s)

    def load_state(self, folder: str, optimizer_steps: int) -> None:
        self.group.call_all("load_state", folder, optimizer_steps, deadline_s=self.settings.deadlines.save_s)

    def export(self, folder: str) -> None:
        self.group.call_all("export", folder, deadline_s=self.settings.deadlines.save_s)

    def close(self) -> None:
        self.group.close()


def split(items: Sequence, parts: int) -> list[list]:
    """Contiguous, sizes differing by at most one. Example: 5 items in 2 -> sizes 3, 2."""
    size, extra = divmod(len(items), parts)
    starts = [i * size + min(i, extra) for i in range(parts + 1)]
    return [list(items[a:b]) for a, b in pairwise(starts)]


def free_port_at(slot: Slot) -> int:
    """A free TCP port of the slot's node."""
    there = PlacementGroupSchedulingStrategy(slot.group, placement_group_bundle_index=slot.bundle)
    ref = ray.remote(_free_port).options(num_cpus=0, scheduling_strategy=there).remote()
    return gather([Pending(ref=ref, worker=slot.node_ip, call="free_port", deadline_s=60.0)])[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
