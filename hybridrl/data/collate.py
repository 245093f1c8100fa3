"""From scored chunks to the padded tensors of one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hybridrl.types import RolloutBatch, TokenScores


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSequence:
    """One trajectory with everything the head pass needs; [r] and [r, H] are its response tokens."""

    input_ids: np.ndarray  # [T] int32
    response_at: np.ndarray  # [r] int64, positions of response tokens, never 0
    rollout_logprobs: np.ndarray  # [r] float32
    sparse: np.ndarray  # [r] float32, cost minus baseline
    token_weight: float
    teacher_hidden: tuple[np.ndarray, ...]  # per teacher [r, H], float32 or uint16 (bf16 bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """B sequences padded on the right to T; R response tokens over all of them.

    Column t of the hidden states predicts token t+1, so the row of a response token at position t points to t-1.
    """

    input_ids: Tensor  # [B, T] int64, 0 in the padding
    attention_mask: Tensor  # [B, T] int64
    hidden_rows: Tensor  # [R] int64, into the flattened [B*T] hidden states
    token_ids: Tensor  # [R] int64
    token_weight: Tensor  # [R] float32
    sparse: Tensor  # [R] float32
    rollout_logprobs: Tensor  # [R] float32
    teacher_hidden: tuple[Tensor, ...]  # per teacher [R, H]


def train_sequences(
    batch: RolloutBatch,
    scores: Sequence[TokenScores],
    sparse: np.ndarray,
    keep: np.ndarray,
    groups: Sequence[int],
    token_weight: float,
) -> list[TrainSequence]:
    """Cut a chunk into the sequences of the given groups.

    Args:
        sparse: [R] float32 for the whole chunk, in batch order.
        keep: [N] bool, False takes a sequence out (weight 0).
    """
    rows = np.concatenate([[0], np.cumsum(batch.response_lengths)])
    sequences = []
    for group in groups:
        for i in range(group * batch.group_size, (group + 1) * batch.group_size):
            span = slice(int(batch.offsets[i]), int(batch.offsets[i + 1]))
            row = slice(int(rows[i]), int(rows[i + 1]))
            at = np.flatnonzero(batch.response_mask[span])
            sequences.append(
                TrainSequence(
                    input_ids=batch.input_ids[span],
                    response_at=at,
                    rollout_logprobs=batch.rollout_logprobs[span][at],
                    sparse=sparse[row] if keep[i] else np.zeros_like(sparse[row]),  # a dropped reward is NaN, and 0 * NaN is NaN
                    token_weight=token_weight if keep[i] else 0.0,
                    teacher_hidden=tuple(s.hidden[row] for s in scores),
                )
            )
    return sequences


def collate(sequences: Sequence[TrainSequence]) -> MicroBatch:
    """Pad on the right and stack. At least one sequence."""
    width = max(len(s.input_ids) for s in sequences)
    ids = np.zeros((len(sequences), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for b, s in enumerate(sequences):
        ids[b, : len(s.input_ids)] = s.input_ids
        mask[b, : len(s.input_ids)] = 1
    join = np.concatenate
    num_teachers = len(sequences[0].teacher_hidden)
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        hidden_rows=torch.from_numpy(join([b * width + s.response_at - 1 for b, s in enumerate(sequences)])),
        token_ids=torch.from_numpy(join([s.input_ids[s.response_at] for s in sequences]).astype(np.int64)),
        token_weight=torch.from_numpy(join([np.full(len(s.response_at), s.token_weight, np.float32) for s in sequences])),
        sparse=torch.from_numpy(join([s.sparse for s in sequences]).astype(np.float32)),
        rollout_logprobs=torch.from_numpy(join([s.rollout_logprobs for s in sequences]).astype(np.float32)),
        teacher_hidden=tuple(from_wire(join([s.teacher_hidden[k] for s in sequences])) for k in range(num_teachers)),
    )


def idle_sequence(teacher_widths: Sequence[int], wire_dtypes: Sequence[np.dtype]) -> TrainSequence:
    """A sequence of weight 0: what a rank runs while others still have micro-batches."""
    return TrainSequence(
        input_ids=np.zeros(2, np.int32),
        response_at=np.array([1]),
        rollout_logprobs=np.zeros(1, np.float32),
        sparse=np.zeros(1, np.float32),
        token_weight=0.0,
        teacher_hidden=tuple(np.zeros((1, w), d) for w, d in zip(teacher_widths, wire_dtypes, strict=True)),
    )


def to_wire(tensor: Tensor) -> np.ndarray:
    """A CPU tensor as numpy: bf16 travels as its bits in uint16, fp32 as it is."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    return tensor.contiguous().numpy()


def from_wire(array: np.ndarray) -> Tensor:
    """The inverse of to_wire; `array` must own its memory (what the object store hands out is read-only)."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
