"""What one step trains on: who answers which prompts, and which of the answered groups are used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hybridrl.controller.preemption import Preemption
from hybridrl.core.errors import WorkerError
from hybridrl.objectives import make_objective
from hybridrl.runtime.calls import Pending, settle
from hybridrl.runtime.chunk import Chunk
from hybridrl.runtime.replay_group import ReplayGroup
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.runtime.scorer_group import ScorerGroup
from hybridrl.runtime.workers import Workers
from hybridrl.settings.choices import OnStale, Source
from hybridrl.settings.run import RunSettings
from hybridrl.settings.shares import shares
from hybridrl.types import ChunkHeader, Prompt, Rewards, ScoreHeader


@dataclass(slots=True, kw_only=True)
class Drawn:
    """A chunk under way, with what others are asked to say of it. Calls are replaced when their
    worker is lost.
    """

    writer: RolloutGroup | ReplayGroup
    chunk: Chunk
    reward_weights: Sequence[float]
    scores: list[tuple[Pending, Pending]] = field(
        default_factory=list
    )  # per teacher: -> ScoreHeader, -> TokenScores
    rewards: list[Pending] = field(default_factory=list)  # the one call -> Rewards


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
    """Asks student engines, the teacher's engine and the data for responses, in the shares that
    algorithm.* sets.
    """

    def __init__(self, settings: RunSettings, workers: Workers, preemption: Preemption) -> None:
        self.settings, self.workers, self.preemption = settings, workers, preemption
        self.support = make_objective(settings).needs.sampler_support

    def draw(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        wave: str,
        seed: int,
        reward_weights: Sequence[float],
    ) -> list[Drawn]:
        """Start a wave for `step`. Chunks of the student come first, then the teacher's, then the
        data's, each in prompt order.
        """
        algorithm, k = self.settings.algorithm, self.settings.train.samples_per_prompt
        by_student, by_teacher, by_data = shares(len(prompts), algorithm, step)
        order = {
            "wave": wave,
            "group_size": k,
            "temperature": algorithm.temperature,
            "seed": seed,
            "support": self.support,
        }
        rollout, teacher, replay = (
            self.workers.rollout,
            self.workers.teacher_rollout,
            self.workers.replay,
        )
        drawn: list[Drawn] = []
        if by_student:
            drawn += [
                self._drawn(rollout, c, reward_weights)
                for c in rollout.generate(prompts[:by_student], **order)
            ]
        if by_teacher:
            assert teacher is not None, "algorithm.teacher_fraction starts one"
            written = teacher.generate(prompts[by_student : by_student + by_teacher], **order)
            drawn += [self._drawn(teacher, c, reward_weights) for c in written]
        if by_data:
            assert replay is not None, "algorithm.data_fraction starts one"
            drawn += self._given(replay, prompts[by_student + by_teacher :], wave, reward_weights)
        self._ask(drawn)
        return drawn

    def heldout(self, prompts: Sequence[Prompt], *, wave: str) -> list[Drawn]:
        """Start a wave of the data's own responses to held-out prompts, ranked by the data and
        scored by the teachers.
        """
        replay = self.workers.replay
        assert replay is not None, "algorithm.data_fraction starts one"
        drawn = self._given(replay, prompts, wave, ())
        self._ask(drawn)
        return drawn

    def _given(
        self,
        replay: ReplayGroup,
        prompts: Sequence[Prompt],
        wave: str,
        reward_weights: Sequence[float],
    ) -> list[Drawn]:
        return [
            self._drawn(replay, chunk, reward_weights)
            for chunk in replay.generate(prompts, wave=wave)
        ]

    def _drawn(
        self, writer: RolloutGroup | ReplayGroup, chunk: Chunk, reward_weights: Sequence[float]
    ) -> Drawn:
        return Drawn(writer=writer, chunk=chunk, reward_weights=reward_weights)

    def _ask(self, drawn: Sequence[Drawn]) -> None:
        """Have the chunks judged and scored."""
        self._ask_rewards(drawn)
        by_teacher = [scorer.score([d.chunk for d in drawn]) for scorer in self.workers.scorers]
        for i, d in enumerate(drawn):
            d.scores = [scores[i] for scores in by_teacher]

    def _ask_rewards(self, drawn: Sequence[Drawn]) -> None:
        """The data ranks its own responses; the others are judged by the reward functions."""
        given = [d for d in drawn if d.writer is self.workers.replay]
        judged = [d for d in drawn if d.writer is not self.workers.replay]
        calls = (
            self.workers.rewards.score([d.chunk for d in judged], judged[0].reward_weights)
            if judged
            else []
        )
        calls += self.workers.replay.rank([d.chunk for d in given]) if given else []
        for d, call in zip([*judged, *given], calls, strict=True):
            d.rewards = [call]

    # -- waiting, whatever workers are lost meanwhile ----------------------------------------------

    def headers(self, drawn: Sequence[Drawn]) -> list[ChunkHeader]:
        """Of every chunk. Those of a lost engine are sampled again elsewhere, with the same seeds,
        and asked about again.
        """
        return self._settled(drawn, lambda d: d.chunk.header, self._sample_again)

    def _sample_again(self, d: Drawn) -> None:
        d.chunk = d.writer.again(d.chunk)
        self._ask([d])

    def rewards(self, drawn: Sequence[Drawn]) -> list[Rewards]:
        return self._settled(drawn, lambda d: d.rewards[0], lambda d: self._ask_rewards([d]))

    def scores(self, drawn: Sequence[Drawn]) -> list[ScoreHeader]:
        """Of every teacher for every chunk, teacher by teacher."""
        found = []
        for k, scorer in enumerate(self.workers.scorers):

            def again(d: Drawn, k: int = k, scorer: ScorerGroup = scorer) -> None:
                d.scores[k] = scorer.score([d.chunk])[0]

            found += self._settled(drawn, lambda d, k=k: d.scores[k][0], again)
        return found

    def _settled(
        self,
        drawn: Sequence[Drawn],
        call: Callable[[Drawn], Pending],
        again: Callable[[Drawn], None],
        count: int | None = None,
    ) -> list[Any]:
        """Results in order, at least `count` of them (None: all), None for the others. A call whose
        worker is lost is made again.
        """
        while True:
            outcomes, lost = settle([call(d) for d in drawn], self._watch, count)
            if not lost:
                return outcomes
            for error in lost:
                self.workers.lose(error)
            for d, outcome in zip(drawn, outcomes, strict=True):
                if isinstance(outcome, WorkerError):
                    again(d)

    def _watch(self) -> Pending | None:
        """While waiting for responses nothing would be lost: the place to end, if the run was told
        to.
        """
        self.preemption.check()
        return self.workers.silent()

    def first(self, drawn: Sequence[Drawn], count: int) -> tuple[list[Drawn], list[Drawn]]:
        """Wait until `count` chunks are done, stop the others; -> those that are done, in order,
        and the others.
        """
        headers = self._settled(drawn, lambda d: d.chunk.header, self._sample_again, count)
        done = [d for d, header in zip(drawn, headers, strict=True) if header is not None][:count]
        late = [d for d in drawn if all(d is not other for other in done)]
        if late:
            for engines in self.workers.engines:
                engines.cancel([d.chunk for d in late])
        return done, late

    def arrived(
        self, drawn: Sequence[Drawn], headers: Sequence[ChunkHeader], step: int
    ) -> list[Arrived]:
        """Wait for the rewards. Groups with an aborted response are not used; under
        algorithm.dynamic_sampling nor are those sampled whose rewards are all equal; under
        pipeline.on_stale=drop nor are those with a token too old at `step`.
        """
        rewards = self.rewards(drawn)
        return [
            Arrived(drawn=d, header=h, rewards=r, groups=self._used(h, r, step))
            for d, h, r in zip(drawn, headers, rewards, strict=True)
        ]

    def _used(self, header: ChunkHeader, rewards: Rewards, step: int) -> tuple[int, ...]:
        usable = ~header.aborted.reshape(-1, header.group_size).any(axis=1) & ~self._stale(
            header, step
        )
        if self.settings.algorithm.dynamic_sampling:
            usable &= differing(header, rewards) | (
                header.source is Source.data
            )  # the data is not compared
        return tuple(np.flatnonzero(usable).tolist())

    def _stale(self, header: ChunkHeader, step: int) -> np.ndarray:
        """[G] bool: not trained on, because some token of the group is older than
        pipeline.max_staleness.
        """
        pipeline, oldest = (
            self.settings.pipeline,
            header.oldest_version.reshape(-1, header.group_size).min(axis=1),
        )
        if pipeline.on_stale is not OnStale.drop or header.source is not Source.student:
            return np.zeros(len(oldest), bool)
        return oldest < step - pipeline.max_staleness

    def stale_prompts(self, arrived: Sequence[Arrived], step: int) -> list[Prompt]:
        """Of the groups that are too old."""
        return [
            a.drawn.chunk.prompts[g]
            for a in arrived
            for g in np.flatnonzero(self._stale(a.header, step))
        ]

    def num_pairs(self, arrived: Sequence[Arrived]) -> int:
        """Groups that the loss is averaged over: those with a best and a worst response, or all
        that are kept.
        """
        if self.settings.algorithm.ranks_pairs:
            return int(sum(differing(a.header, a.rewards)[list(a.groups)].sum() for a in arrived))
        return int(sum(a.of_groups(a.rewards.keep).all(axis=1).sum() for a in arrived))


def differing(header: ChunkHeader, rewards: Rewards) -> np.ndarray:
    """[G] bool: the group is kept and its rewards are not all equal."""
    values = rewards.values.reshape(-1, header.group_size)
    return rewards.keep.reshape(-1, header.group_size).all(axis=1) & (
        values.max(axis=1) > values.min(axis=1)
    )


def first_groups(arrived: Sequence[Arrived], count: int) -> list[Arrived]:
    """At most `count` used groups, in order; chunks left without one are dropped."""
    kept = []
    for a in arrived:
        groups = a.groups[: max(count, 0)]
        count -= len(groups)
        if groups:
            kept.append(Arrived(drawn=a.drawn, header=a.header, rewards=a.rewards, groups=groups))
    return kept
