"""Selects the groups of one learner rank from the chunks that it received, and joins them."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar, cast

import numpy as np

from hybridrl.settings.choices import Source
from hybridrl.types import Rewards, RolloutBatch, ScoredBatch, TokenScores

T = TypeVar("T", RolloutBatch, TokenScores, Rewards)


def scored_batches(
    groups: Sequence[Sequence[int]], values: Sequence[RolloutBatch | Rewards | TokenScores]
) -> list[ScoredBatch]:
    """This rank's groups of a mini-batch, one batch per source, in the order of the chunks.

    Args:
        groups: for each chunk, the indices of its groups that belong to this rank.
        values: for each chunk its RolloutBatch, its Rewards and one TokenScores per teacher.

    Returns:
        Batches whose sequences have one source and one group size each.
    """
    stride = len(values) // max(len(groups), 1)
    by_source: dict[tuple[Source, int], list[ScoredBatch]] = {}
    for chunk, own in enumerate(groups):
        if not own:
            continue
        rollout, rewards, *scores = values[chunk * stride : (chunk + 1) * stride]
        assert isinstance(rollout, RolloutBatch) and isinstance(rewards, Rewards)
        batch = ScoredBatch(
            rollout=rollout, scores=tuple(cast("list[TokenScores]", scores)), rewards=rewards
        )
        by_source.setdefault((rollout.source, rollout.group_size), []).append(
            select_groups(batch, own)
        )
    return [join(parts) for parts in by_source.values()]


def select_groups(batch: ScoredBatch, groups: Sequence[int]) -> ScoredBatch:
    """A batch of the given groups in the given order, with their scores and rewards."""
    rollout = batch.rollout
    k = rollout.group_size
    sequences = [i for g in groups for i in range(g * k, (g + 1) * k)]
    tokens = spans(rollout.offsets, sequences)
    rows = spans(np.concatenate([[0], np.cumsum(rollout.response_lengths)]), sequences)
    lengths = np.diff(rollout.offsets)[sequences]

    def pick(values):
        return tuple(values[g] for g in groups)

    return ScoredBatch(
        rollout=replace(
            rollout,
            uids=pick(rollout.uids),
            columns=pick(rollout.columns),
            prompt_texts=pick(rollout.prompt_texts),
            prompt_lengths=pick(rollout.prompt_lengths),
            teacher_prompts=pick(rollout.teacher_prompts),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            input_ids=rollout.input_ids[tokens],
            response_mask=rollout.response_mask[tokens],
            rollout_logprobs=rollout.rollout_logprobs[tokens],
            policy_versions=rollout.policy_versions[tokens],
            support_ids=rollout.support_ids[rows],
            finish_reasons=tuple(rollout.finish_reasons[i] for i in sequences),
        ),
        scores=tuple(
            replace(
                s, logprobs=s.logprobs[tokens], rows=s.rows[rows], support_ids=s.support_ids[rows]
            )
            for s in batch.scores
        ),
        rewards=replace(
            batch.rewards,
            uids=pick(batch.rewards.uids),
            values=batch.rewards.values[sequences],
            parts=batch.rewards.parts[:, sequences],
            errors=batch.rewards.errors[sequences],
            keep=batch.rewards.keep[sequences],
            compressed=batch.rewards.compressed[sequences],
            repeated=batch.rewards.repeated[sequences],
        ),
    )


def join(batches: Sequence[ScoredBatch]) -> ScoredBatch:
    """Several batches with the same source, group size and teachers as one batch."""
    if len(batches) == 1:
        return batches[0]
    rollouts = [b.rollout for b in batches]
    assert len({(r.source, r.group_size) for r in rollouts}) == 1, "one source, one group size"
    lengths = np.concatenate([np.diff(r.offsets) for r in rollouts])
    rollout = _concatenated(rollouts, source=rollouts[0].source, group_size=rollouts[0].group_size)
    scores = [
        _concatenated(list(of_teacher), teacher=of_teacher[0].teacher)
        for of_teacher in zip(*(b.scores for b in batches), strict=True)
    ]
    rewards = [b.rewards for b in batches]
    parts = np.concatenate([r.parts for r in rewards], axis=1)
    return ScoredBatch(
        rollout=replace(rollout, offsets=np.concatenate([[0], np.cumsum(lengths)])),
        scores=tuple(scores),
        rewards=_concatenated(rewards, part_names=rewards[0].part_names, parts=parts),
    )


def spans(offsets: np.ndarray, sequences: Sequence[int]) -> np.ndarray:
    """Indices of all entries of the given sequences, in their order."""
    return np.concatenate(
        [np.arange(offsets[i], offsets[i + 1]) for i in sequences] or [np.zeros(0, np.int64)]
    )


def _concatenated(values: Sequence[T], **given: Any) -> T:
    """An object whose tuples and arrays are those of `values` concatenated, except for the fields
    in `given`.
    """
    joined: dict[str, Any] = dict(given)
    for f in fields(values[0]):
        if f.name not in given:
            parts = [getattr(v, f.name) for v in values]
            joined[f.name] = (
                np.concatenate(parts) if isinstance(parts[0], np.ndarray) else sum(parts, ())
            )
    return replace(values[0], **joined)
