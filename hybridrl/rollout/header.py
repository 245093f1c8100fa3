"""The header of a chunk, which the controller receives instead of the batch."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from hybridrl.types import NO_VERSION, ChunkHeader, FinishReason, RolloutBatch, per_token_bytes


def chunk_header(batch: RolloutBatch, finish_s: Sequence[float]) -> ChunkHeader:
    """The scalars of a batch.

    Args:
        finish_s: [N] seconds from the arrival of the order to the end of each response.
    """
    versions = [
        batch.policy_versions[a:b][batch.response_mask[a:b]]
        for a, b in pairwise(batch.offsets.tolist())
    ]
    sampled = batch.policy_versions[batch.response_mask]
    return ChunkHeader(
        uids=batch.uids,
        source=batch.source,
        group_size=batch.group_size,
        num_tokens=np.diff(batch.offsets),
        response_lengths=batch.response_lengths,
        truncated=np.asarray([reason is FinishReason.length for reason in batch.finish_reasons]),
        aborted=np.asarray([reason is FinishReason.aborted for reason in batch.finish_reasons]),
        oldest_version=np.asarray([v.min(initial=NO_VERSION) for v in versions], np.int64),
        newest_version=np.asarray([v.max(initial=-1) for v in versions], np.int64),
        mean_policy_version=float(sampled.mean()) if len(sampled) else -1.0,
        nbytes=per_token_bytes(batch),
        finish_s=np.asarray(finish_s, np.float32),
    )
