"""The responses that one step trains on: their sources, and which of their groups are used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hybridrl.controller.evaluation import with_questions
from hybridrl.controller.preemption import Preemption
from hybridrl.core.errors import WorkerError
from hybridrl.objectives import make_objective
from hybridrl.runtime.calls import Pending, settle
from hybridrl.runtime.chunk import Chunk
from hybridrl.runtime.replay_group import ReplayGroup
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.runtime.scorer_group import ScoreCall
from hybridrl.runtime.workers import Workers
from hybridrl.settings.choices import OnStale, Source
from hybridrl.settings.run import RunSettings
from hybridrl.settings.shares import shares
from hybridrl.types import ChunkHeader, Prompt, Rewards, Sample, ScoreHeader


@dataclass(slots=True, kw_only=True)
class PendingChunk:
    """A chunk under way, with the calls that reward and score it. If a worker fails, new calls
    replace those to it.
    """

    writer: RolloutGroup | ReplayGroup
    chunk: Chunk
    reward_weights: Sequence[float]
    rewards: Pending  # -> Rewards
    scores: list[ScoreCall] = field(default_factory=list)  # one per teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A chunk whose header and rewards, but not its tokens, have arrived at the controller."""

    drawn: PendingChunk
    header: ChunkHeader
    rewards: Rewards
    groups: tuple[int, ...]  # which of its groups are trained on

    def of_groups(self, per_sequence: np.ndarray) -> np.ndarray:
        """[N] -> [G', K]: the entries of the groups that are trained on."""
        return per_sequence.reshape(-1, self.header.group_size)[list(self.groups)]


class Sampling:
    """Gets responses from the student's engines, the teacher's engine and the data, in the shares
    of algorithm.teacher_fraction and data_fraction, with their rewards and scores.

    consumes prompts / produces chunks under way, then their headers, rewards and scores /
    `heldout` waits for nothing, `draw` only while no engine serves, the other methods for the
    workers whose results they return. A worker that fails during a wait is replaced, and its calls
    are made again.
    """

    def __init__(
        self, settings: RunSettings, workers: Workers, preemption: Preemption | None
    ) -> None:
        """
        Args:
            preemption: lets a stop signal end the waits, when nothing would be lost; None: no
                signal ends them, because a step that is done is not logged yet.
        """
        self.settings = settings
        self.workers = workers
        self.preemption = preemption
        self.needs = make_objective(settings).needs

    def draw(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        wave: str,
        seed: int,
        reward_weights: Sequence[float],
    ) -> list[PendingChunk]:
        """Start a wave for `step`. Chunks of the student come first, then the teacher's, then the
        data's, each in prompt order.

        Raises:
            Preempted: a stop signal came while no engine served; no chunk is returned.
        """
        by_student, by_teacher, by_data = shares(len(prompts), self.settings.algorithm, step)
        teacher = self.workers.teacher_rollout
        replay = self.workers.replay
        written: list[tuple[RolloutGroup | ReplayGroup, Chunk]] = []
        if by_student:
            written += self._sampled(self.workers.rollout, prompts[:by_student], wave, seed)
        if by_teacher:
            assert teacher is not None, "a run with algorithm.teacher_fraction has such an engine"
            for_teacher = prompts[by_student : by_student + by_teacher]
            written += self._sampled(teacher, for_teacher, wave, seed)
        if by_data:
            assert replay is not None, "a run with algorithm.data_fraction has such a worker"
            from_data = replay.generate(prompts[by_student + by_teacher :], wave=wave)
            written += [(replay, chunk) for chunk in from_data]
        return self._started(written, reward_weights)

    def heldout(self, prompts: Sequence[Prompt], *, wave: str) -> list[PendingChunk]:
        """Start a wave of the data's own responses to held-out prompts. Their rewards are their
        ranks in the data, and the teachers score them. A chunk has as many prompts as that of a
        training step, since the deadlines are chosen for those.
        """
        settings = self.settings
        replay = self.workers.replay
        assert replay is not None, "a run with algorithm.data_fraction has such a worker"
        size = max(1, int(settings.train.prompts_per_step * settings.algorithm.data_fraction))
        pieces = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        chunks = [chunk for piece in pieces for chunk in replay.generate(piece, wave=wave)]
        return self._started([(replay, chunk) for chunk in chunks], ())

    def _sampled(
        self, engines: RolloutGroup, prompts: Sequence[Prompt], wave: str, seed: int
    ) -> list[tuple[RolloutGroup | ReplayGroup, Chunk]]:
        chunks = engines.generate(
            prompts,
            wave=wave,
            group_size=self.settings.train.samples_per_prompt,
            temperature=self.settings.algorithm.temperature,
            seed=seed,
            support=self.needs.sampler_support,
            watch=self._check,
        )
        return [(engines, chunk) for chunk in chunks]

    def _started(
        self,
        written: Sequence[tuple[RolloutGroup | ReplayGroup, Chunk]],
        reward_weights: Sequence[float],
    ) -> list[PendingChunk]:
        """Submit the calls to reward workers and scorers, which start when their chunk is done."""
        calls = self._reward_calls(written, reward_weights)
        drawn = [
            PendingChunk(writer=writer, chunk=chunk, reward_weights=reward_weights, rewards=call)
            for (writer, chunk), call in zip(written, calls, strict=True)
        ]
        self._start_scores(drawn)
        return drawn

    def _reward_calls(
        self,
        written: Sequence[tuple[RolloutGroup | ReplayGroup, Chunk]],
        weights: Sequence[float],
    ) -> list[Pending]:
        """One call per chunk, in order. The rewards of the data's responses are their ranks; reward
        functions reward the others.
        """
        replay = self.workers.replay
        from_data = [chunk for writer, chunk in written if writer is replay]
        sampled = [chunk for writer, chunk in written if writer is not replay]
        rewards = iter(self.workers.rewards.score(sampled, weights) if sampled else [])
        ranks = iter(replay.rank(from_data) if from_data and replay is not None else [])
        return [next(ranks if writer is replay else rewards) for writer, _ in written]

    def _start_rewards(self, drawn: PendingChunk) -> None:
        """Submit the reward call of one chunk again."""
        if isinstance(drawn.writer, ReplayGroup):
            [drawn.rewards] = drawn.writer.rank([drawn.chunk])
        else:
            drawn.rewards = self.workers.rewards.score_one(drawn.chunk, drawn.reward_weights)

    def _start_scores(self, drawn: Sequence[PendingChunk]) -> None:
        chunks = [d.chunk for d in drawn]
        calls_by_teacher = [scorer.score(chunks) for scorer in self.workers.scorers]
        for i, d in enumerate(drawn):
            d.scores = [calls[i] for calls in calls_by_teacher]

    # -- waiting, while failed workers are replaced ------------------------------------------------

    def headers(self, drawn: Sequence[PendingChunk]) -> list[ChunkHeader]:
        """Wait for every chunk and return the headers. The chunks of a failed engine are sampled
        again by another one with the same seeds, then rewarded and scored again.
        """
        return self._settled(drawn, _header_call, self._sample_again)

    def _sample_again(self, drawn: PendingChunk) -> None:
        drawn.chunk = drawn.writer.again(drawn.chunk, self._check)
        self._start_rewards(drawn)
        drawn.scores = [scorer.score_one(drawn.chunk) for scorer in self.workers.scorers]

    def rewards(self, drawn: Sequence[PendingChunk]) -> list[Rewards]:
        """Wait for the rewards of every chunk."""
        return self._settled(drawn, _reward_call, self._start_rewards)

    def scores(self, drawn: Sequence[PendingChunk]) -> list[ScoreHeader]:
        """Wait for every teacher's scores of every chunk; returns the headers, teacher by
        teacher.
        """
        headers: list[ScoreHeader] = []
        for k in range(len(self.workers.scorers)):
            headers += self._scores_of(k, drawn)
        return headers

    def _scores_of(self, teacher: int, drawn: Sequence[PendingChunk]) -> list[ScoreHeader]:
        """Wait for the scores of the teacher with this index."""
        scorer = self.workers.scorers[teacher]

        def score_calls(d: PendingChunk) -> Sequence[Pending]:
            return d.scores[teacher].header, *d.scores[teacher].followers

        def score_again(d: PendingChunk) -> None:
            d.scores[teacher] = scorer.score_one(d.chunk)

        return self._settled(drawn, score_calls, score_again)

    def _settled(
        self,
        drawn: Sequence[PendingChunk],
        calls: Callable[[PendingChunk], Sequence[Pending]],
        again: Callable[[PendingChunk], None],
        count: int | None = None,
    ) -> list[Any]:
        """Wait for the calls of each chunk.

        consumes calls / produces their results / waits for `count` results / unblocked by results,
        and by the failure of a worker: the worker is replaced, and `again` repeats the calls of
        each chunk that failed.

        Args:
            calls: returns the calls of a chunk. The first one has the result; the others end with
                it, and are waited for because their workers may fail.
            count: how many results to wait for, at least; None: all.

        Returns:
            The results in order; None for a call that is still under way.
        """
        while True:
            of_chunks = [calls(d) for d in drawn]
            results, failures = settle(
                [c for of_one in of_chunks for c in of_one], self._watch, count
            )
            remaining = iter(results)
            by_chunk = [[next(remaining) for _ in of_one] for of_one in of_chunks]
            if not failures:
                return [first for first, *_ in by_chunk]
            for error in failures:
                self.workers.lose(error, self._check)
            for d, of_one in zip(drawn, by_chunk, strict=True):
                if any(isinstance(result, WorkerError) for result in of_one):
                    again(d)

    def _check(self) -> None:
        """Called about once a second during a wait: raises Preempted if a stop signal came."""
        if self.preemption is not None:
            self.preemption.check()

    def _watch(self) -> Pending | None:
        """As `_check`; returns the overdue ping of an engine that does not answer, or None."""
        self._check()
        return self.workers.silent()

    def first(
        self, drawn: Sequence[PendingChunk], count: int
    ) -> tuple[list[PendingChunk], list[PendingChunk]]:
        """Wait until `count` chunks are done and cancel the others.

        Returns:
            The first `count` chunks that are done, in the order of `drawn`, and the cancelled ones.
        """
        headers = self._settled(drawn, _header_call, self._sample_again, count)
        done = [d for d, header in zip(drawn, headers, strict=True) if header is not None][:count]
        chosen = set(map(id, done))
        late = [d for d in drawn if id(d) not in chosen]
        if late:
            for engines in self.workers.engines:
                engines.cancel([d.chunk for d in late])
        return done, late

    def arrived(
        self, drawn: Sequence[PendingChunk], headers: Sequence[ChunkHeader], step: int
    ) -> list[Arrived]:
        """Wait for the rewards, and decide which groups are used. All are used except groups with
        an aborted response; with algorithm.dynamic_sampling, sampled groups whose rewards are all
        equal; with pipeline.on_stale=drop, groups with a token that is too old at `step`.
        """
        rewards = self.rewards(drawn)
        return [
            Arrived(drawn=d, header=h, rewards=r, groups=self._used(h, r, step))
            for d, h, r in zip(drawn, headers, rewards, strict=True)
        ]

    def _used(self, header: ChunkHeader, rewards: Rewards, step: int) -> tuple[int, ...]:
        aborted = header.aborted.reshape(-1, header.group_size).any(axis=1)  # [G] bool
        usable = ~aborted & ~self._stale(header, step)
        if self.settings.algorithm.dynamic_sampling:
            # The rewards of the data's responses are only their ranks, so they are not compared.
            usable &= differing(header, rewards) | (header.source is Source.data)
        return tuple(np.flatnonzero(usable).tolist())

    def _stale(self, header: ChunkHeader, step: int) -> np.ndarray:
        """[G] bool: the group has a token older than pipeline.max_staleness, for which
        pipeline.on_stale=drop excludes it from training.
        """
        pipeline = self.settings.pipeline
        oldest = header.oldest_version.reshape(-1, header.group_size).min(axis=1)  # [G] int64
        if pipeline.on_stale is not OnStale.drop or header.source is not Source.student:
            return np.zeros(len(oldest), bool)
        return oldest < step - pipeline.max_staleness

    def stale_prompts(self, arrived: Sequence[Arrived], step: int) -> list[Prompt]:
        """The prompts of the groups that are dropped as too old."""
        return [
            a.drawn.chunk.prompts[g]
            for a in arrived
            for g in np.flatnonzero(self._stale(a.header, step))
        ]

    def rollouts(self, arrived: Sequence[Arrived], step: int, count: int) -> list[Sample]:
        """At most `count` responses of the first chunk with a group that is trained on, as text.

        Raises:
            WorkerError: the reward worker that decodes them failed.
        """
        for a in arrived:
            if a.groups:
                chunk = a.drawn.chunk
                rows = self.workers.rewards.samples(chunk, a.drawn.rewards, step, count)
                return with_questions(rows, chunk.prompts)
        return []

    def num_pairs(self, arrived: Sequence[Arrived]) -> int:
        """The number of groups over which the loss is averaged.

        Where pairs are ranked, these are the groups with a best and a worst response, otherwise
        those whose rewards are kept.
        """
        if self.needs.pairs:
            return int(sum(differing(a.header, a.rewards)[list(a.groups)].sum() for a in arrived))
        return int(sum(a.of_groups(a.rewards.keep).all(axis=1).sum() for a in arrived))


def _header_call(drawn: PendingChunk) -> Sequence[Pending]:
    return (drawn.chunk.header,)


def _reward_call(drawn: PendingChunk) -> Sequence[Pending]:
    return (drawn.rewards,)


def differing(header: ChunkHeader, rewards: Rewards) -> np.ndarray:
    """[G] bool: all rewards of the group are kept, and they are not all equal."""
    values = rewards.values.reshape(-1, header.group_size)
    keep = rewards.keep.reshape(-1, header.group_size).all(axis=1)
    return keep & (values.max(axis=1) > values.min(axis=1))


def first_groups(arrived: Sequence[Arrived], count: int) -> list[Arrived]:
    """The first `count` used groups, or all if there are fewer; chunks without one are left out."""
    selected = []
    for a in arrived:
        groups = a.groups[: max(count, 0)]
        count -= len(groups)
        if groups:
            selected.append(
                Arrived(drawn=a.drawn, header=a.header, rewards=a.rewards, groups=groups)
            )
    return selected
