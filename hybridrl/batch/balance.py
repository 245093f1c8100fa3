"""Divides groups among learner ranks and sequences among micro-batches, by their lengths alone."""

import heapq
from collections.abc import Sequence


def balance_groups(group_tokens: Sequence[int], ranks: int) -> list[list[int]]:
    """Divide whole groups among the ranks so that these have nearly equal numbers of tokens: the
    largest group first, each to the rank with the fewest tokens so far.

    Example: tokens (5, 1, 4, 2) on 2 ranks -> [[0, 1], [2, 3]].

    Returns:
        The group indices of each rank, ascending; each index occurs exactly once.
    """
    loads = [(0, 0, rank) for rank in range(ranks)]  # a heap of (tokens, groups, rank)
    shards: list[list[int]] = [[] for _ in range(ranks)]
    for group in sorted(range(len(group_tokens)), key=lambda g: (-group_tokens[g], g)):
        tokens, count, rank = loads[0]
        heapq.heapreplace(loads, (tokens + group_tokens[group], count + 1, rank))
        shards[rank].append(group)
    return [sorted(s) for s in shards]


def micro_batches(
    lengths: Sequence[int], max_tokens: int, *, packed: bool = False
) -> list[list[int]]:
    """Put sequences into micro-batches of at most `max_tokens` padded tokens (longest x count), or,
    if packed, of at most `max_tokens` tokens without padding.

    Sequences of similar length go together; one longer than `max_tokens` gets a micro-batch of its
    own. Example: lengths (2, 9, 3) with 9 tokens -> [[0, 2], [1]]; (2, 4, 3) are 3 x 4 = 12 padded
    tokens, or 9 packed ones.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        joined = sum(lengths[i] for i in batches[-1]) + lengths[index] if packed and batches else 0
        if (
            batches
            and (joined if packed else (len(batches[-1]) + 1) * lengths[index]) <= max_tokens
        ):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
