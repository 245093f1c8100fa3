"""The groups that one step trains on, cut into mini-batches, divided among the learner's ranks, and
the plan of the updates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hybridrl.batch.balance import balance_groups, micro_batches
from hybridrl.controller.coefficients import Coefficients
from hybridrl.controller.sampling import Arrived
from hybridrl.runtime.calls import Reference
from hybridrl.settings.run import RunSettings
from hybridrl.types import Prompt, UpdatePlan

Place = tuple[int, int]
"""A group of a step: the index of its chunk in GlobalBatch.used, and its index in the chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShare:
    """The part of a batch that one learner rank trains on."""

    chunks: tuple[int, ...]  # which chunks hold the rank's groups: indices into GlobalBatch.used
    # groups[m][c]: the indices of the rank's groups of mini-batch m in chunks[c]; may be empty
    groups: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalBatch:
    """The used groups of a step, by reference, divided into mini-batches and among ranks.

    Example: two chunks of two groups each, two ranks, one mini-batch: shares[0] may have the groups
    (((0,), (1,)),) of the chunks (0, 1), and shares[1] the others.
    """

    used: Sequence[Arrived]
    mini_batches: Sequence[Sequence[Place]]  # the groups of each, in ascending order
    shares: Sequence[RankShare]  # one per rank

    def part(self, mini_batches: Sequence[int]) -> list[Arrived]:
        """The used groups of these mini-batches; chunks without one are left out."""
        places = {place for index in mini_batches for place in self.mini_batches[index]}
        parts = [
            replace(a, groups=tuple(g for g in a.groups if (chunk, g) in places))
            for chunk, a in enumerate(self.used)
        ]
        return [a for a in parts if a.groups]

    @property
    def groups(self) -> list[tuple[tuple[tuple[int, ...], ...], ...]]:
        """groups[rank][m][c]: the indices of the rank's groups of mini-batch m in its chunk c."""
        return [share.groups for share in self.shares]

    @property
    def values(self) -> list[list[Reference]]:
        """Per rank, the references of its chunks: for each chunk the batch, the rewards and each
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


def divide(
    used: Sequence[Arrived], *, num_ranks: int, num_mini_batches: int = 1, seed: int = 0
) -> GlobalBatch:
    """Cut the groups of a step into mini-batches at random, and divide the groups of each among the
    ranks so that all ranks have about the same number of tokens.

    Args:
        num_mini_batches: fewer result if there are fewer groups; the numbers of groups differ by at
            most one.
        seed: seed of the random cut.
    """
    tokens = {
        (chunk, group): int(n)
        for chunk, a in enumerate(used)
        for group, n in zip(a.groups, a.of_groups(a.header.num_tokens).sum(axis=1), strict=True)
    }
    mini_batches = cut(list(tokens), num_mini_batches, seed)
    of_ranks: list[list[list[Place]]] = [[] for _ in range(num_ranks)]  # per rank and mini-batch
    for places in mini_batches:
        balanced = balance_groups([tokens[place] for place in places], num_ranks)
        for of_rank, indices in zip(of_ranks, balanced, strict=True):
            of_rank.append([places[i] for i in indices])
    shares = [rank_share(of_rank) for of_rank in of_ranks]
    return GlobalBatch(used=used, mini_batches=mini_batches, shares=shares)


def cut(places: Sequence[Place], num_parts: int, seed: int) -> list[list[Place]]:
    """Cut groups at random into parts whose sizes differ by at most one, each in ascending order.

    Example: cut([(0, 0), (0, 1), (1, 0)], 2, seed) is [[(0, 0), (1, 0)], [(0, 1)]] with some seeds.
    """
    shuffled = np.random.default_rng(seed).permutation(len(places))
    parts = np.array_split(shuffled, min(num_parts, max(len(places), 1)))
    return [[places[i] for i in sorted(part)] for part in parts]


def rank_share(mini_batches: Sequence[Sequence[Place]]) -> RankShare:
    """The share of a rank that has these groups of each mini-batch."""
    chunks = sorted({chunk for places in mini_batches for chunk, _ in places})
    groups = tuple(
        tuple(tuple(g for at, g in places if at == chunk) for chunk in chunks)
        for places in mini_batches
    )
    return RankShare(chunks=tuple(chunks), groups=groups)


def update_order(num_mini_batches: int, epochs: int, seed: int) -> tuple[int, ...]:
    """The index of the mini-batch of each update. Every epoch has all of them: the first one in the
    order of the (random) cut, each later one in a new random order.
    """
    rng = np.random.default_rng(seed)
    later = [rng.permutation(num_mini_batches).tolist() for _ in range(epochs - 1)]
    return tuple(i for epoch in (range(num_mini_batches), *later) for i in epoch)


def update_plan(
    batch: GlobalBatch,
    index: int,
    settings: RunSettings,
    coefficients: Coefficients,
    *,
    step: int,
    num_groups: int,
) -> UpdatePlan:
    """The plan for mini-batch `index`: its counts, and the coefficients of `step`.

    Args:
        num_groups: number of groups, or pairs, of the mini-batch that the loss is averaged over.
    """
    part = batch.part([index])
    keep = [a.of_groups(a.rewards.keep) for a in part]  # per chunk [G', K] bool
    tokens = [a.of_groups(a.header.response_lengths) for a in part]
    every = settings.diagnostics.every
    return UpdatePlan(
        step=step,
        num_tokens=int(sum(t[k].sum() for t, k in zip(tokens, keep, strict=True))),
        num_sequences=int(sum(k.sum() for k in keep)),
        num_groups=num_groups,
        num_micro_batches=max(
            _num_micro_batches(share.chunks, share.groups[index], batch, settings)
            for share in batch.shares
        ),
        lr=learning_rate(settings, step),
        teacher_weights=coefficients.teachers(step),
        teacher_routes=tuple(settings.teachers[name].route for name in settings.scored_teachers),
        reward_weight=coefficients.reward(step),
        diagnose=bool(every) and step % every == 0,
    )


def _num_micro_batches(
    chunks: Sequence[int],
    groups: Sequence[Sequence[int]],
    batch: GlobalBatch,
    settings: RunSettings,
) -> int:
    """The number of forward passes of one rank in one update.

    Args:
        chunks: the rank's chunks, as in RankShare.
        groups: the indices of the rank's groups in each of these chunks.
    """
    lengths: list[int] = []
    for chunk, of_chunk in zip(chunks, groups, strict=True):
        header = batch.used[chunk].header
        per_group = header.num_tokens.reshape(-1, header.group_size)  # [G, K] int64
        lengths += per_group[list(of_chunk)].flatten().tolist()
    train = settings.train
    batches = micro_batches(lengths, train.max_tokens_per_micro_batch, packed=train.packing)
    return max(len(batches), 1)


def learning_rate(settings: RunSettings, step: int) -> float:
    """The learning rate at a step: linear warm-up, then constant or half a cosine to lr_end."""
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

    A prompt is passed over if its group is not used or its rewards are not kept. Prompts that are
    drawn again are in neither list.
    """
    trained = [
        a.header.uids[group]
        for a in used
        for group in a.groups
        if a.rewards.keep.reshape(-1, a.header.group_size)[group].all()
    ]
    not_passed_over = {*trained, *(prompt.uid for prompt in returning)}
    return trained, [uid for a in arrived for uid in a.header.uids if uid not in not_passed_over]


def num_token_samples(settings: RunSettings, step: int) -> int:
    """The number of responses of a batch whose tokens are recorded.

    Args:
        step: the number of training steps done before the batch.
    """
    number = step + 1
    every = settings.eval.every
    due = number in (1, settings.train.steps) or bool(every and number % every == 0)
    return settings.diagnostics.token_samples if due and settings.scored_teachers else 0
