"""Fake workers, which only wait and return values of the right shapes.

They import neither torch nor vllm, so each process takes only 90 MB.
"""

import asyncio
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hybridrl.kernels.head import HeadRule
from hybridrl.runtime.rollout_group import PROBE
from hybridrl.settings.choices import Source
from hybridrl.settings.rewards import RewardConfig
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.evidence import Evidence
from hybridrl.types import (
    BatchPlan,
    ChunkHeader,
    FinishReason,
    GenerateOrder,
    LearnerStats,
    Prompt,
    Rewards,
    RolloutBatch,
    ScoreHeader,
    TokenScores,
    WeightManifest,
    per_token_bytes,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """How many seconds each kind of worker is busy in a step, and the size of its results."""

    generate_s: float = 0.0  # an engine generates its part of a wave
    score_s: float = 0.0
    learn_s: float = 0.0
    pack_s: float = 0.0
    load_s: float = 0.0  # an engine loads weights and generates nothing
    # Above 0: chunks are generated concurrently, each in generate_s times exp(spread * z), where
    # the standard normal z depends on seed and prompt.
    spread: float = 0.0
    weight_bytes: int = 1
    support: int = 0  # K, the number of log-probs and ids that a scorer sends per response token

    @property
    def phases(self) -> tuple[float, float, float, float]:
        """(g, s, t, w): the seconds of generating, scoring, training and weight transfer."""
        return self.generate_s, self.score_s, self.learn_s, self.pack_s + self.load_s


class Engine:
    """An engine that generates one chunk after the other, and pauses during a weight update.

    With work.spread it generates all chunks concurrently, and they do not slow each other.
    """

    def __init__(
        self, settings: RunSettings, *, model: object, device: str, backend: str, source: Source
    ) -> None:
        self.work = Work()
        self.version = -1
        self.device = asyncio.Lock()
        self.free_at = 0.0
        self.stopped_s = 0.0
        # The event that aborts a chunk, by "wave/uid" of its first prompt.
        self.ends: dict[str, asyncio.Event] = {}

    async def ping(self) -> str:
        return "here"

    async def assign(self, work: Work) -> None:
        self.work = work

    async def generate(
        self, order: GenerateOrder, prompts: Sequence[Prompt]
    ) -> tuple[ChunkHeader, RolloutBatch]:
        arrived = time.monotonic()
        if order.wave == PROBE:  # the few tokens of a probe take no time
            batch = rollouts(order, prompts, max(self.version, 0))
            return header(batch, 0.0), batch
        if self.work.spread:
            completed = await self._alone(
                f"{order.wave}/{prompts[0].uid}",
                self.work.generate_s * stretch(order, prompts, self.work.spread),
            )
            batch = rollouts(
                order if completed else replace(order, max_new_tokens=0),
                prompts,
                max(self.version, 0),
            )
            return header(batch, time.monotonic() - arrived), batch
        async with self.device:
            end = (
                max(arrived, self.free_at)
                + self.work.generate_s / order.num_chunks
                - self.stopped_s
            )
            while (remaining_s := end + self.stopped_s - time.monotonic()) > 0:
                await asyncio.sleep(remaining_s)
            self.free_at = end + self.stopped_s
            batch = rollouts(order, prompts, max(self.version, 0))
        return header(batch, time.monotonic() - arrived), batch

    async def _alone(self, name: str, seconds: float) -> bool:
        """Wait for the end of a chunk; returns False if it was aborted."""
        self.ends[name] = asyncio.Event()
        try:
            await asyncio.wait_for(self.ends[name].wait(), seconds)
        except TimeoutError:
            return True
        finally:
            del self.ends[name]
        return False

    async def abort(self, groups: Sequence[str] | None = None) -> int:
        chosen = [name for name in self.ends if groups is None or name in groups]
        for name in chosen:
            self.ends[name].set()
        return len(chosen)

    async def load_weights(self, manifest: WeightManifest, packed: np.ndarray) -> str:
        time.sleep(self.work.load_s)  # block the event loop: a loading engine does nothing else
        self.stopped_s += self.work.load_s
        self.version = manifest.version
        return manifest.digest


class Scorer:
    def __init__(
        self,
        settings: RunSettings,
        *,
        teacher: str,
        device: str,
        evidence: Evidence,
        rule: HeadRule,
    ) -> None:
        self.teacher = teacher
        self.prompts = settings.train.prompts_per_step
        self.work = Work()

    def ping(self) -> str:
        return "here"

    def assign(self, work: Work) -> None:
        self.work = work

    def score(self, batch: RolloutBatch) -> tuple[ScoreHeader, TokenScores]:
        started = time.monotonic()
        tokens = len(batch.input_ids)
        rows = int(batch.response_mask.sum())
        # An aborted batch has no tokens to score.
        time.sleep(self.work.score_s * len(batch.uids) / self.prompts * (rows > 0))
        shape = (rows, self.work.support)
        scores = TokenScores(
            teacher=self.teacher,
            logprobs=np.zeros(tokens, np.float32),
            rows=np.zeros(shape, np.float32),
            support_ids=np.zeros(shape, np.int32),
        )
        nbytes = {"teacher_support": per_token_bytes(scores)}
        return ScoreHeader(
            teacher=self.teacher, nbytes=nbytes, score_s=time.monotonic() - started
        ), scores


class Judge:
    """A reward worker that gives the rewards 0 and 1 alternately."""

    def __init__(
        self,
        config: RewardConfig,
        *,
        tokenizer_path: str,
        revision: str | None,
        eos: str | None,
        watch_only: bool,
        deadline_s: float,
        start_s: float,
        device: str,
    ) -> None:
        self.names = tuple(config.functions)

    def ping(self) -> str:
        return "here"

    def score(
        self, batch: RolloutBatch, weights: Sequence[float], only: str | None = None
    ) -> Rewards:
        n = batch.num_sequences
        values = (np.arange(n) % 2).astype(np.float32)
        return Rewards(
            uids=batch.uids,
            values=values,
            part_names=self.names,
            parts=np.tile(values, (len(self.names), 1)),
            errors=np.zeros(n, bool),
            keep=np.ones(n, bool),
            compressed=np.full(n, np.nan, np.float32),
            repeated=np.full(n, np.nan, np.float32),
        )


class Learner:
    def __init__(
        self, settings: RunSettings, *, rank: int, master: tuple[str, int], device: str
    ) -> None:
        self.work = Work()

    def ping(self) -> str:
        return "here"

    def assign(self, work: Work) -> None:
        self.work = work

    def learn(
        self, plan: BatchPlan, groups: Sequence[Sequence[Sequence[int]]], *values: object
    ) -> LearnerStats:
        time.sleep(self.work.learn_s)
        return LearnerStats(
            logprob_gap=None,
            token_kl=None,
            sparse_norm=0.0,
            metrics={},
            learn_s=self.work.learn_s,
            optimizer_steps=plan.step + 1,
        )

    def logprob_gaps(self, *batches: RolloutBatch) -> list[float]:
        return [0.0] * len(batches)

    def pack_weights(self, version: int) -> tuple[WeightManifest, np.ndarray]:
        time.sleep(self.work.pack_s)
        nothing = {
            "names": (),
            "dtypes": (),
            "shapes": (),
            "offsets": (),
            "nbytes": self.work.weight_bytes,
            "digest": "none",
        }
        packed = np.zeros(self.work.weight_bytes, np.uint8)
        return WeightManifest(version=version, **nothing), packed


def stretch(order: GenerateOrder, prompts: Sequence[Prompt], spread: float) -> float:
    """A log-normal factor of median 1 that is determined by the seed and the first prompt."""
    return float(
        np.random.default_rng([order.seed, zlib.crc32(prompts[0].uid.encode())]).lognormal(
            sigma=spread
        )
    )


def rollouts(order: GenerateOrder, prompts: Sequence[Prompt], version: int) -> RolloutBatch:
    """A batch whose responses have order.max_new_tokens tokens each."""
    lengths = np.repeat([len(p.input_ids) for p in prompts], order.group_size)
    offsets = np.concatenate([[0], np.cumsum(lengths + order.max_new_tokens)]).astype(np.int64)
    mask = np.concatenate([np.arange(n + order.max_new_tokens) >= n for n in lengths])
    return RolloutBatch(
        uids=tuple(p.uid for p in prompts),
        columns=tuple(p.columns for p in prompts),
        prompt_texts=tuple(p.text for p in prompts),
        prompt_lengths=tuple(len(p.input_ids) for p in prompts),
        teacher_prompts=tuple(p.teacher_prompts for p in prompts),
        group_size=order.group_size,
        offsets=offsets,
        input_ids=np.ones(offsets[-1], np.int32),
        response_mask=mask,
        rollout_logprobs=np.zeros(offsets[-1], np.float32),
        policy_versions=np.where(mask, version, 0).astype(np.int32),
        finish_reasons=(FinishReason.length,) * len(lengths),
        source=Source.student,
        support_ids=np.zeros((int(mask.sum()), order.support), np.int32),
    )


def header(batch: RolloutBatch, finish_s: float) -> ChunkHeader:
    n = batch.num_sequences
    version = int(batch.policy_versions.max())
    return ChunkHeader(
        uids=batch.uids,
        source=batch.source,
        group_size=batch.group_size,
        num_tokens=np.diff(batch.offsets),
        response_lengths=batch.response_lengths,
        truncated=batch.response_lengths > 0,
        aborted=batch.response_lengths == 0,
        oldest_version=np.full(n, version),
        newest_version=np.full(n, version),
        mean_policy_version=float(version),
        nbytes=per_token_bytes(batch),
        finish_s=np.full(n, finish_s, np.float32),
    )
