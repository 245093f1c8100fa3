"""What one step trains on: who answers which prompts, and which of the answered groups are used."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hybridrl.choices import OnStale, PairLoss, Source
from hybridrl.config import RunSettings
from hybridrl.objectives import make_objective
from hybridrl.objectives.credit import Signal
from hybridrl.runtime.calls import Pending, first_done, gather
from hybridrl.runtime.groups import Chunk, RolloutGroup
from hybridrl.runtime.workers import Workers
from hybridrl.types import ChunkHeader, Prompt, Rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A chunk under way, with what others are asked to say of it."""

    chunk: Chunk
    scores: list[tuple[Pending, Pending]]  # per teacher: -> ScoreHeader, -> TokenScores
    rewards: Pending  # -> Rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A chunk whose header and rewards are here. Tokens are not."""

    drawn: Drawn
    header: ChunkHeader
    rewards: Rewards
    groups: tuple[int, ...]  # which of its groups are trained on

    def of_groups(self, per_sequence: np.ndarray) -> np.ndarray:
        """[N] -> [G', K] the used groups' rows."""
        return per_sequence.reshape(-1, self.header.group_size)[list(self.groups)]


class Sampling:
    """Asks student engines, the teacher's engine and the data for responses, in the shares that algorithm.* sets."""

    def __init__(self, settings: RunSettings, workers: Workers) -> None:
        self.settings, self.workers = settings, workers
        self.support = settings.algorithm.topk.k if Signal.sampler_support in make_objective(settings).signals else 0

    def draw(self, prompts: Sequence[Prompt], *, wave: str, seed: int, reward_weights: Sequence[float]) -> list[Drawn]:
        """Start a wave. Chunks of the student come first, then the teacher's, then the data's, each in prompt order."""
        algorithm, k = self.settings.algorithm, self.settings.train.samples_per_prompt
        by_data = round(algorithm.data_fraction * len(prompts))
        by_teacher = round(algorithm.teacher_fraction * len(prompts))
        by_student = len(prompts) - by_data - by_teacher
        sampled: list[Chunk] = []
        order = {"wave": wave, "group_size": k, "temperature": algorithm.temperature, "seed": seed, "support": self.support}
        if by_student:
            sampled += self.workers.rollout.generate(prompts[:by_student], **order)
        if by_teacher:
            assert self.workers.teacher_rollout is not None, "algorithm.teacher_fraction starts one"
            sampled += self.workers.teacher_rollout.generate(prompts[by_student : by_student + by_teacher], **order)
        rewards = self.workers.rewards.score(sampled, reward_weights)
        if by_data:
            assert self.workers.replay is not None, "algorithm.data_fraction starts one"
            given = self.workers.replay.generate(prompts[by_student + by_teacher :], wave=wave)
            sampled, rewards = sampled + given, rewards + self.workers.replay.rank(given)
        scores = [scorer.score(sampled) for scorer in self.workers.scorers]
        return [
            Drawn(chunk=chunk, rewards=reward, scores=[teacher[i] for teacher in scores])
            for i, (chunk, reward) in enumerate(zip(sampled, rewards, strict=True))
        ]

    def headers(self, drawn: Sequence[Drawn]) -> list[ChunkHeader]:
        return gather([d.chunk.header for d in drawn])

    def first(self, drawn: Sequence[Drawn], count: int) -> tuple[list[Drawn], list[Drawn]]:
        """Wait until `count` chunks are done, stop the others; -> those that are done, in order, and the others."""
        done = first_done([d.chunk.header for d in drawn], count)
        late = [d for d, is_done in zip(drawn, done, strict=True) if not is_done]
        gather([pending for engines in self._engines() for pending in engines.cancel([d.chunk for d in late])])
        return [d for d, is_done in zip(drawn, done, strict=True) if is_done], late

    def _engines(self) -> list[RolloutGroup]:
        return [group for group in (self.workers.rollout, self.workers.teacher_rollout) if group is not None]

    def arrived(self, drawn: Sequence[Drawn], headers: Sequence[ChunkHeader], step: int) -> list[Arrived]:
        """Wait for the rewards. Groups with an aborted response are not used; under algorithm.dynamic_sampling nor are those
        whose rewards are all equal; under pipeline.on_stale=drop nor are those with a token too old at `step`."""
        rewards = gather([d.rewards for d in drawn])
        return [
            Arrived(drawn=d, header=h, rewards=r, groups=self._used(h, r, step))
            for d, h, r in zip(drawn, headers, rewards, strict=True)
        ]  # fmt: skip

    def _used(self, header: ChunkHeader, rewards: Rewards, step: int) -> tuple[int, ...]:
        usable = ~header.aborted.reshape(-1, header.group_size).any(axis=1) & ~self._stale(header, step)
        if self.settings.algorithm.dynamic_sampling:
            usable &= differing(header, rewards)
        return tuple(np.flatnonzero(usable).tolist())

    def _stale(self, header: ChunkHeader, step: int) -> np.ndarray:
        """[G] bool: not trained on, because some token of the group is older than pipeline.max_staleness."""
        pipeline, oldest = self.settings.pipeline, header.oldest_version.reshape(-1, header.group_size).min(axis=1)
        if pipeline.on_stale is not OnStale.drop or header.source is not Source.student:
            return np.zeros(len(oldest), bool)
        return oldest < step - pipeline.max_staleness

    def stale_prompts(self, arrived: Sequence[Arrived], step: int) -> list[Prompt]:
        """Of the groups that are too old."""
        return [a.drawn.chunk.prompts[g] for a in arrived for g in np.flatnonzero(self._stale(a.header, step))]

    def num_pairs(self, arrived: Sequence[Arrived]) -> int:
        """Groups that the loss is averaged over: those with a best and a worst response, or all that are kept."""
        if self.settings.algorithm.pair.loss is PairLoss.none:
            return int(sum(a.of_groups(a.rewards.keep).all(axis=1).sum() for a in arrived))
        return int(sum(differing(a.header, a.rewards)[list(a.groups)].sum() for a in arrived))


def differing(header: ChunkHeader, rewards: Rewards) -> np.ndarray:
    """[G] bool: the group is kept and its rewards are not all equal."""
    values = rewards.values.reshape(-1, header.group_size)
    return rewards.keep.reshape(-1, header.group_size).all(axis=1) & (values.max(axis=1) > values.min(axis=1))


def first_groups(arrived: Sequence[Arrived], count: int) -> list[Arrived]:
    """At most `count` used groups, in order; chunks left without one are dropped."""
    kept = []
    for a in arrived:
        groups = a.groups[: max(count, 0)]
        count -= len(groups)
        if groups:
            kept.append(Arrived(drawn=a.drawn, header=a.header, rewards=a.rewards, groups=groups))
    return kept
