"""From scored chunks to the padded tensors of one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hybridrl.objectives.credit import Credit
from hybridrl.settings.choices import Source
from hybridrl.types import NO_VERSION, RolloutBatch, ScoredBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherColumns:
    """One teacher's say on a sequence or micro-batch: R response tokens."""

    rows: np.ndarray  # [R, W] hidden states, or log-probs; float32 or uint16 (bf16 bits)
    support_ids: np.ndarray  # [R, K] int32
    weight: np.ndarray  # [R] float32, w_i


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSequence:
    """One trajectory with everything the head pass needs; [r] columns are its response tokens."""

    input_ids: np.ndarray  # [T] int32
    response_at: np.ndarray  # [r] int64, positions of response tokens, never 0
    rollout_logprobs: np.ndarray  # [r] float32
    token_weight: np.ndarray  # [r] float32
    sparse: np.ndarray  # [r] float32, cost minus baseline
    value_slope: np.ndarray  # [r] float32
    teachers: tuple[TeacherColumns, ...]
    source: Source  # who wrote the response
    oldest_version: int  # of the weights that sampled it


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """S sequences; R response tokens over all of them.

    Padded on the right, B = S, T the longest; or packed one after the other, B = 1, where positions
    start anew at each sequence and a missing attention mask tells transformers that each attends to
    itself alone. Column t of the hidden states predicts token t+1, so the row of a response token
    at position t points to t-1.
    """

    input_ids: Tensor  # [B, T] int64, 0 in the padding
    attention_mask: Tensor | None  # [B, T] int64; None: packed
    position_ids: Tensor  # [B, T] int64
    owner: Tensor  # [R] int64, the sequence of each response token
    hidden_rows: Tensor  # [R] int64, into the flattened [B*T] hidden states
    token_ids: Tensor  # [R] int64
    token_weight: Tensor  # [R] float32
    sparse: Tensor  # [R] float32
    value_slope: Tensor  # [R] float32
    rollout_logprobs: Tensor  # [R] float32
    teachers: tuple[TeacherColumns, ...]  # R rows each
    sources: tuple[Source, ...]  # [S]
    oldest_versions: Tensor  # [S] int64

    def tensors(self) -> dict[str, Tensor]:
        """The columns by name, teachers' rows too, to look at."""
        own = {
            f.name: value
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return own | {
            f"teachers/{i}/rows": from_wire(t.rows).float() for i, t in enumerate(self.teachers)
        }


def train_sequences(
    batch: ScoredBatch, credit: Credit, teacher_weights: Sequence[Tensor]
) -> list[TrainSequence]:
    """Cut a batch into its sequences.

    Args:
        teacher_weights: per teacher [N], w_i of each sequence.
    """
    rollout = batch.rollout
    rows = np.concatenate([[0], np.cumsum(rollout.response_lengths)])
    weight, sparse, slope = (
        c.float().numpy() for c in (credit.token_weight, credit.cost, credit.value_slope)
    )
    sequences = []
    for i in range(rollout.num_sequences):
        span = slice(int(rollout.offsets[i]), int(rollout.offsets[i + 1]))
        row = slice(int(rows[i]), int(rows[i + 1]))
        at = np.flatnonzero(rollout.response_mask[span])
        teachers = tuple(
            TeacherColumns(
                rows=s.rows[row],
                support_ids=s.support_ids[row],
                weight=np.full(len(at), float(w[i]), np.float32),
            )
            for s, w in zip(batch.scores, teacher_weights, strict=True)
        )
        sequences.append(
            TrainSequence(
                input_ids=rollout.input_ids[span],
                response_at=at,
                rollout_logprobs=rollout.rollout_logprobs[span][at],
                token_weight=weight[row],
                sparse=sparse[row],
                value_slope=slope[row],
                teachers=teachers,
                source=rollout.source,
                oldest_version=int(rollout.policy_versions[span][at].min(initial=NO_VERSION)),
            )
        )
    return sequences


def collate(sequences: Sequence[TrainSequence], *, packed: bool = False) -> MicroBatch:
    """Pad on the right and stack, or put one after the other. At least one sequence."""
    lengths = [len(s.input_ids) for s in sequences]
    shape = (1, sum(lengths)) if packed else (len(sequences), max(lengths))
    starts = (
        np.cumsum([0, *lengths[:-1]]) if packed else np.arange(len(sequences)) * shape[1]
    )  # in the flattened [B*T]
    ids, mask, positions = (np.zeros(shape[0] * shape[1], np.int64) for _ in range(3))
    for s, start, length in zip(sequences, starts, lengths, strict=True):
        (
            ids[start : start + length],
            mask[start : start + length],
            positions[start : start + length],
        ) = s.input_ids, 1, np.arange(length)
    owners = [np.full(len(s.response_at), i) for i, s in enumerate(sequences)]

    def column(name):
        return torch.from_numpy(
            np.concatenate([getattr(s, name) for s in sequences]).astype(np.float32)
        )

    return MicroBatch(
        input_ids=torch.from_numpy(ids.reshape(shape)),
        attention_mask=None if packed else torch.from_numpy(mask.reshape(shape)),
        position_ids=torch.from_numpy(positions.reshape(shape)),
        owner=torch.from_numpy(np.concatenate(owners)),
        hidden_rows=torch.from_numpy(
            np.concatenate(
                [start + s.response_at - 1 for s, start in zip(sequences, starts, strict=True)]
            )
        ),
        token_ids=torch.from_numpy(
            np.concatenate([s.input_ids[s.response_at] for s in sequences]).astype(np.int64)
        ),
        token_weight=column("token_weight"),
        sparse=column("sparse"),
        value_slope=column("value_slope"),
        rollout_logprobs=column("rollout_logprobs"),
        teachers=tuple(
            stack_teachers(columns)
            for columns in zip(*(s.teachers for s in sequences), strict=True)
        ),
        sources=tuple(s.source for s in sequences),
        oldest_versions=torch.tensor([s.oldest_version for s in sequences]),
    )


def stack_teachers(columns: Sequence[TeacherColumns]) -> TeacherColumns:
    def join(name):
        return np.concatenate([getattr(c, name) for c in columns])

    return TeacherColumns(rows=join("rows"), support_ids=join("support_ids"), weight=join("weight"))


def idle_sequence(teachers: Sequence[TeacherColumns]) -> TrainSequence:
    """A sequence of weight 0: what a rank runs while others still have micro-batches.

    Args:
        teachers: one row each, in the widths and dtypes of the run.
    """
    return unlearned_sequence(
        np.zeros(2, np.int32), np.array([1]), np.zeros(1, np.float32), tuple(teachers)
    )


def plain_sequences(rollout: RolloutBatch) -> list[TrainSequence]:
    """Cut a batch into sequences that nobody learns from, without teachers."""
    found = []
    for start, stop in pairwise(rollout.offsets.tolist()):
        at = np.flatnonzero(rollout.response_mask[start:stop])
        found.append(
            unlearned_sequence(
                rollout.input_ids[start:stop], at, rollout.rollout_logprobs[start:stop][at]
            )
        )
    return found


def unlearned_sequence(
    ids: np.ndarray, at: np.ndarray, logprobs: np.ndarray, teachers: tuple[TeacherColumns, ...] = ()
) -> TrainSequence:
    """A sequence that has no part in the loss.

    Args:
        ids: [T] int32, prompt and response.
        at: [R] where the response tokens are.
        logprobs: [R] float32, the sampler's.
        teachers: R rows each.
    """
    zero = np.zeros(len(at), np.float32)
    return TrainSequence(
        input_ids=ids,
        response_at=at,
        rollout_logprobs=logprobs,
        token_weight=zero,
        sparse=zero,
        value_slope=zero,
        teachers=teachers,
        source=Source.student,
        oldest_version=NO_VERSION,
    )


def to_wire(tensor: Tensor) -> np.ndarray:
    """A CPU tensor as numpy: bf16 travels as its bits in uint16, fp32 as it is."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    return tensor.contiguous().numpy()


def from_wire(array: np.ndarray) -> Tensor:
    """The inverse of to_wire; `array` must own its memory (what the object store hands out is
    read-only).
    """
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
