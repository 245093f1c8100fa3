"""From scored sequences to the padded tensors of one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hybridrl.batch.wire import from_wire
from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.settings.choices import Source
from hybridrl.types import NO_VERSION, RolloutBatch, TokenScores


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherColumns:
    """What one teacher sent of R response tokens of a sequence or micro-batch."""

    rows: np.ndarray  # [R, W] hidden states, or log-probs; float32 or uint16 (bf16 bits)
    support_ids: np.ndarray  # [R, K] int32
    weight: np.ndarray  # [R] float32, w_i


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSequence:
    """One trajectory with everything that the head pass needs of its r response tokens."""

    input_ids: np.ndarray  # [T] int32
    response_at: np.ndarray  # [r] int64, positions of response tokens, never 0
    columns: TokenColumns  # r rows
    teachers: tuple[TeacherColumns, ...]  # r rows each
    source: Source  # who wrote the response
    oldest_version: int  # of the weights that sampled it


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """S sequences with R response tokens in all.

    Padded on the right, B = S and T is the longest sequence; or packed one after the other, B = 1,
    where positions start anew at each sequence and a missing attention mask tells transformers that
    each attends to itself alone. Column t of the hidden states predicts token t+1, so the row of a
    response token at position t points to t-1.
    """

    input_ids: Tensor  # [B, T] int64, 0 in the padding
    attention_mask: Tensor | None  # [B, T] int64; None: packed
    position_ids: Tensor  # [B, T] int64
    owner: Tensor  # [R] int64, the sequence of each response token
    hidden_rows: Tensor  # [R] int64, into the flattened [B*T] hidden states
    columns: TokenColumns  # R rows
    teachers: tuple[TeacherColumns, ...]  # R rows each
    sources: tuple[Source, ...]  # [S]
    oldest_versions: Tensor  # [S] int64

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, for a file that a person looks at."""
        parts = (self, self.columns)
        named = {f.name: getattr(part, f.name) for part in parts for f in fields(part)}
        own = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        return own | {
            f"teachers/{i}/rows": from_wire(t.rows).float() for i, t in enumerate(self.teachers)
        }


def train_sequences(
    rollout: RolloutBatch,
    columns: TokenColumns,
    scores: Sequence[TokenScores] = (),
    teacher_weights: Sequence[Tensor] = (),
) -> list[TrainSequence]:
    """Cut a batch into its sequences.

    Args:
        columns: of all its R response tokens, in batch order.
        scores: of each teacher.
        teacher_weights: of each teacher [N], w_i of each sequence.
    """
    first_rows = np.concatenate([[0], np.cumsum(rollout.response_lengths)]).tolist()
    sequences = []
    for i, (start, stop) in enumerate(pairwise(rollout.offsets.tolist())):
        span = slice(start, stop)
        rows = slice(first_rows[i], first_rows[i + 1])
        at = np.flatnonzero(rollout.response_mask[span])
        teachers = tuple(
            TeacherColumns(
                rows=s.rows[rows],
                support_ids=s.support_ids[rows],
                weight=np.full(len(at), float(w[i]), np.float32),
            )
            for s, w in zip(scores, teacher_weights, strict=True)
        )
        sequences.append(
            TrainSequence(
                input_ids=rollout.input_ids[span],
                response_at=at,
                columns=columns.at(rows),
                teachers=teachers,
                source=rollout.source,
                oldest_version=int(rollout.policy_versions[span][at].min(initial=NO_VERSION)),
            )
        )
    return sequences


def unlearned_sequences(rollout: RolloutBatch) -> list[TrainSequence]:
    """Cut a batch into sequences that have no part in the loss, without teachers."""
    mask = rollout.response_mask
    columns = TokenColumns.unlearned(
        torch.from_numpy(rollout.input_ids[mask].astype(np.int64)),
        torch.from_numpy(rollout.rollout_logprobs[mask]),
    )
    return train_sequences(rollout, columns)


def idle_sequence(teachers: Sequence[TeacherColumns]) -> TrainSequence:
    """A sequence of weight 0: what a rank runs while others still have micro-batches.

    Args:
        teachers: one row each, in the widths and dtypes of the run.
    """
    return TrainSequence(
        input_ids=np.zeros(2, np.int32),
        response_at=np.array([1]),
        columns=TokenColumns.unlearned(torch.zeros(1, dtype=torch.int64), torch.zeros(1)),
        teachers=tuple(teachers),
        source=Source.student,
        oldest_version=NO_VERSION,
    )


def collate(sequences: Sequence[TrainSequence], *, packed: bool = False) -> MicroBatch:
    """Pad on the right and stack, or put one after the other. At least one sequence."""
    lengths = [len(s.input_ids) for s in sequences]
    shape = (1, sum(lengths)) if packed else (len(sequences), max(lengths))
    # In the flattened [B*T].
    starts = np.cumsum([0, *lengths[:-1]]) if packed else np.arange(len(sequences)) * shape[1]
    ids = np.zeros(shape[0] * shape[1], np.int64)
    mask = np.zeros_like(ids)
    positions = np.zeros_like(ids)
    for sequence, start, length in zip(sequences, starts, lengths, strict=True):
        ids[start : start + length] = sequence.input_ids
        mask[start : start + length] = 1
        positions[start : start + length] = np.arange(length)
    owners = [np.full(len(s.response_at), i) for i, s in enumerate(sequences)]
    hidden_rows = [start + s.response_at - 1 for s, start in zip(sequences, starts, strict=True)]
    return MicroBatch(
        input_ids=torch.from_numpy(ids.reshape(shape)),
        attention_mask=None if packed else torch.from_numpy(mask.reshape(shape)),
        position_ids=torch.from_numpy(positions.reshape(shape)),
        owner=torch.from_numpy(np.concatenate(owners)),
        hidden_rows=torch.from_numpy(np.concatenate(hidden_rows)),
        columns=TokenColumns.join([s.columns for s in sequences]),
        teachers=tuple(
            stack_teachers(columns)
            for columns in zip(*(s.teachers for s in sequences), strict=True)
        ),
        sources=tuple(s.source for s in sequences),
        oldest_versions=torch.tensor([s.oldest_version for s in sequences]),
    )


def stack_teachers(columns: Sequence[TeacherColumns]) -> TeacherColumns:
    """The rows of one teacher for several sequences, one after the other."""
    return TeacherColumns(
        rows=np.concatenate([c.rows for c in columns]),
        support_ids=np.concatenate([c.support_ids for c in columns]),
        weight=np.concatenate([c.weight for c in columns]),
    )
