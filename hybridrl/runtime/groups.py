"""The groups of a run, each method typed: the only place where a worker and its methods are named by strings."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hybridrl.choices import PairLoss, Source, WeightTransfer
from hybridrl.config import ModelConfig, RunSettings
from hybridrl.placement import chunk_size
from hybridrl.runtime.calls import Pending, gather, is_done
from hybridrl.runtime.group import ActorGroup, EngineCall, Slot
from hybridrl.types import GenerateOrder, LearnerStats, Prompt, Sample, Shard, UpdatePlan, WeightManifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a rollout wave: its header for the controller, its batch for the workers."""

    wave: str
    prompts: tuple[Prompt, ...]
    header: Pending  # -> ChunkHeader
    batch: Pending  # -> RolloutBatch; only ever passed on by reference


class EngineLoad:
    """Who has how many tokens to do: prompt and longest possible response of every chunk that is not done."""

    def __init__(self, engines: int) -> None:
        self.under_way: list[list[tuple[int, Pending]]] = [[] for _ in range(engines)]  # per engine (tokens, -> header)

    def assign(self, tokens: Sequence[int]) -> list[int]:
        """An engine for each chunk, in order: always the one with the least to do. All idle: the same at each call."""
        self.under_way = [[(n, header) for n, header in mine if not is_done(header)] for mine in self.under_way]
        load = [sum(n for n, _ in mine) for mine in self.under_way]
        engines = []
        for num_tokens in tokens:
            engine = load.index(min(load))
            load[engine] += num_tokens
            engines.append(engine)
        return engines

    def add(self, engine: int, tokens: int, header: Pending) -> None:
        self.under_way[engine].append((tokens, header))


class RolloutGroup:
    worker = "hybridrl.workers.rollout:Rollout"

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
        self.group = ActorGroup(name, self.worker, slots, [kwargs] * len(slots), log_dir=log_dir, concurrent=True)
        self.load = EngineLoad(len(slots))

    def ready(self) -> list[Pending]:
        return self.group.submit_all("ping", deadline_s=self.settings.deadlines.start_s)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        wave: str,
        group_size: int,
        temperature: float,
        seed: int,
        support: int = 0,
        groups_per_chunk: int | None = None,
    ) -> list[Chunk]:
        """Start sampling. Chunks are contiguous in prompt order; each goes to the engine with the fewest tokens to do.

        Args:
            groups_per_chunk: None: as set in rollout.groups_per_chunk.
        """
        rollout = self.settings.rollout
        size = chunk_size(len(prompts), groups_per_chunk or rollout.groups_per_chunk, self.group.size)
        pieces = [tuple(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        tokens = [sum(len(p.input_ids) + rollout.max_new_tokens for p in piece) * group_size for piece in pieces]
        engines, numbers = self.load.assign(tokens), [0] * self.group.size
        chunks = []
        for piece, engine, num_tokens in zip(pieces, engines, tokens, strict=True):
            order = GenerateOrder(
                wave=wave, chunk=numbers[engine], num_chunks=engines.count(engine), group_size=group_size,
                temperature=temperature, max_new_tokens=rollout.max_new_tokens, seed=seed, support=support,
            )  # fmt: skip
            numbers[engine] += 1
            header, batch = self.group.submit_pair(engine, "generate", order, piece, deadline_s=self.settings.deadlines.rollout_s)
            self.load.add(engine, num_tokens, header)
            chunks.append(Chunk(wave=wave, prompts=piece, header=header, batch=batch))
        return chunks

    def cancel(self, chunks: Sequence[Chunk]) -> list[Pending]:
        """Stop sampling these chunks, wherever they are; -> how many responses each engine gave up."""
        groups = [f"{chunk.wave}/{prompt.uid}" for chunk in chunks for prompt in chunk.prompts]
        return self.group.submit_all("abort", groups, deadline_s=self.settings.deadlines.sync_s)

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

    worker = "hybridrl.workers.scorer:Scorer"

    def __init__(self, settings: RunSettings, slots: Sequence[Slot], *, teacher: str, device: str, log_dir: str) -> None:
        self.settings, self.teacher = settings, teacher
        kwargs = {"settings": settings, "teacher": teacher, "device": device}
        self.group = ActorGroup(f"scorer-{teacher}", self.worker, slots, [kwargs] * len(slots), log_dir=log_dir, any_order=True)

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
    worker = "hybridrl.workers.reward:RewardWorker"

    def __init__(self, settings: RunSettings, slots: Sequence[Slot], *, log_dir: str) -> None:
        self.settings = settings
        watch_only = settings.algorithm.reward_weight.is_zero() and settings.algorithm.pair.loss is PairLoss.none
        model = {"tokenizer_path": settings.model.path, "revision": settings.model.revision}
        kwargs = {"config": settings.reward, **model, "watch_only": watch_only}
        self.group = ActorGroup("reward", self.worker, slots, [kwargs] * len(slots), log_dir=log_dir, any_order=True)

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
    worker = "hybridrl.workers.learner:Learner"

    def __init__(self, settings: RunSettings, slots: Sequence[Slot], *, device: str, log_dir: str) -> None:
        self.settings = settings
        self.slot = slots[0]
        master = (self.slot.node_ip, free_port_at(self.slot))
        kwargs = [{"settings": settings, "rank": rank, "master": master, "device": device} for rank in range(len(slots))]
        self.group = ActorGroup("learner", self.worker, slots, kwargs, log_dir=log_dir)
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


def free_port_at(slot: Slot) -> int:
    """A free TCP port of the slot's node."""
    there = PlacementGroupSchedulingStrategy(slot.group, placement_group_bundle_index=slot.bundle)
    ref = ray.remote(_free_port).options(num_cpus=0, scheduling_strategy=there).remote()
    return gather([Pending(ref=ref, worker=slot.node_ip, call="free_port", deadline_s=60.0)])[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
