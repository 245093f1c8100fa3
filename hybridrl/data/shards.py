"""Who trains on what: groups to learner ranks, sequences to micro-batches. Pure functions of lengths."""

from collections.abc import Sequence


def balance_groups(group_tokens: Sequence[int], ranks: int) -> list[list[int]]:
    """Give each rank whole groups with nearly equal tokens: largest first, to the lightest rank.

    Example: tokens (5, 1, 4, 2) on 2 ranks -> [[0, 1], [2, 3]].

    Returns:
        group indices per rank, ascending; together each index exactly once.
    """
    load, shards = [0] * ranks, [[] for _ in range(ranks)]
    for group in sorted(range(len(group_tokens)), key=lambda g: (-group_tokens[g], g)):
        rank = min(range(ranks), key=lambda r: (load[r], len(shards[r]), r))
        load[rank] += group_tokens[group]
        shards[rank].append(group)
    return [sorted(s) for s in shards]


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Pack sequences into micro-batches of at most `max_tokens` padded tokens (longest x count).

    Sequences of similar length go together; one longer than the budget gets a micro-batch of its own.
    Example: lengths (2, 9, 3) with 9 tokens -> [[0, 2], [1]].
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
