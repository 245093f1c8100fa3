"""The groups that one step trains on, divided among the learner's ranks, and the step's plan."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hybridrl.batch.balance import balance_groups, micro_batches
from hybridrl.controller.coefficients import Coefficients
from hybridrl.controller.sampling import Arrived
from hybridrl.runtime.calls import Reference
from hybridrl.settings.run import RunSettings
from hybridrl.types import Prompt, UpdatePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShare:
    """The part of a batch that one learner rank trains on."""

    chunks: tuple[int, ...]  # which chunks hold the rank's groups: indices into GlobalBatch.used
    groups: tuple[tuple[int, ...], ...]  # of each of these chunks, which groups


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalBatch:
    """The used groups of a step, by reference, and each rank's share of them.

    Example: two chunks of two groups each over two ranks, of about the same number of tokens:
    shares[0] may have the groups ((0,), (1,)) of the chunks (0, 1), and shares[1] the others.
    """

    used: Sequence[Arrived]
    shares: Sequence[RankShare]

    @property
    def groups(self) -> list[tuple[tuple[int, ...], ...]]:
        """Per rank, of each of its chunks which groups are its own."""
        return [share.groups for share in self.shares]

    @property
    def values(self) -> list[list[Reference]]:
        """Per rank, the references of its chunks: of each the batch, the rewards and each
        teacher's scores.
        """
        of_chunk = [
            [
                a.drawn.chunk.batch.ref,
                a.drawn.rewards.ref,
                *(call.scores.ref for call in a.drawn.scores),
            ]
            for a in self.used
        ]
        return [[ref for chunk in share.chunks for ref in of_chunk[chunk]] for share in self.shares]


def divide(used: Sequence[Arrived], *, num_ranks: int) -> GlobalBatch:
    """Give each rank whole groups, so that all have about the same number of tokens."""
    tokens = [a.of_groups(a.header.num_tokens).sum(axis=1) for a in used]  # per chunk [G'] int64
    places = [(chunk, group) for chunk, a in enumerate(used) for group in a.groups]
    shares = []
    for indices in balance_groups([int(n) for t in tokens for n in t], num_ranks):
        by_chunk: dict[int, list[int]] = {}
        for chunk, group in (places[i] for i in indices):
            by_chunk.setdefault(chunk, []).append(group)
        groups = tuple(map(tuple, by_chunk.values()))
        shares.append(RankShare(chunks=tuple(by_chunk), groups=groups))
    return GlobalBatch(used=used, shares=shares)


def update_plan(
    batch: GlobalBatch,
    settings: RunSettings,
    coefficients: Coefficients,
    *,
    step: int,
    num_groups: int,
) -> UpdatePlan:
    """The counts of the whole batch and the coefficients of `step`.

    Args:
        num_groups: groups, or pairs, that the loss is averaged over.
    """
    keep = [a.of_groups(a.rewards.keep) for a in batch.used]  # per chunk [G', K] bool
    tokens = [a.of_groups(a.header.response_lengths) for a in batch.used]
    every = settings.diagnostics.every
    return UpdatePlan(
        step=step,
        num_tokens=int(sum(t[k].sum() for t, k in zip(tokens, keep, strict=True))),
        num_sequences=int(sum(k.sum() for k in keep)),
        num_groups=num_groups,
        num_micro_batches=max(_num_micro_batches(share, batch, settings) for share in batch.shares),
        lr=learning_rate(settings, step),
        teacher_weights=coefficients.teachers(step),
        teacher_routes=tuple(settings.teachers[name].route for name in settings.scored_teachers),
        reward_weight=coefficients.reward(step),
        diagnose=bool(every) and step % every == 0,
    )


def _num_micro_batches(share: RankShare, batch: GlobalBatch, settings: RunSettings) -> int:
    lengths: list[int] = []
    for chunk, groups in zip(share.chunks, share.groups, strict=True):
        header = batch.used[chunk].header
        per_group = header.num_tokens.reshape(-1, header.group_size)  # [G, K] int64
        lengths += per_group[list(groups)].flatten().tolist()
    train = settings.train
    batches = micro_batches(lengths, train.max_tokens_per_micro_batch, packed=train.packing)
    return max(len(batches), 1)


def learning_rate(settings: RunSettings, step: int) -> float:
    """Linear warm-up, then constant or half a cosine down to lr_end."""
    train = settings.train
    if step < train.lr_warmup_steps:
        return train.lr * (step + 1) / train.lr_warmup_steps
    if train.lr_end is None:
        return train.lr
    done = (step - train.lr_warmup_steps) / max(train.steps - train.lr_warmup_steps, 1)
    return train.lr_end + (train.lr - train.lr_end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def trained_uids(
    arrived: Sequence[Arrived], used: Sequence[Arrived], returning: Sequence[Prompt]
) -> tuple[list[str], list[str]]:
    """The uids of the drawn prompts that were trained on, and of those that were passed over.

    A group that is not used, or whose reward failed, is passed over. Prompts that are drawn again
    are neither.
    """
    trained = [
        a.header.uids[group]
        for a in used
        for group in a.groups
        if a.rewards.keep.reshape(-1, a.header.group_size)[group].all()
    ]
    not_passed_over = {*trained, *(prompt.uid for prompt in returning)}
    return trained, [uid for a in arrived for uid in a.header.uids if uid not in not_passed_over]
