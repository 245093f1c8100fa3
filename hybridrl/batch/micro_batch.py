"""The tensors of one forward pass, made from scored sequences."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from hybridrl.kernels.teacher_rows import Teacher
from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.settings.choices import Source
from hybridrl.types import NO_VERSION, RolloutBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The input of one forward pass: S sequences with R response tokens in all, and everything that
    the head pass needs of these tokens.

    The sequences are padded on the right, with B = S and T the length of the longest; or they are
    packed one after the other, with B = 1. In a packed row positions start anew at each sequence,
    and a missing attention mask tells transformers that each sequence attends only to itself. The
    hidden state at position t predicts token t+1, so the hidden row of a response token at position
    t is that of t-1.
    """

    input_ids: Tensor  # [B, T] int64, 0 in the padding
    attention_mask: Tensor | None  # [B, T] int64; None: packed
    position_ids: Tensor  # [B, T] int64
    owner: Tensor  # [R] int64, the sequence of each response token
    hidden_rows: Tensor  # [R] int64, into the flattened [B*T] hidden states
    columns: TokenColumns  # R rows
    teachers: tuple[Teacher, ...]  # R rows each
    sources: tuple[Source, ...]  # [S] who wrote the response
    oldest_versions: Tensor  # [S] int64, of the weights that sampled it

    @property
    def num_tokens(self) -> int:
        """T, the tokens of a row including padding; the length of a single sequence."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> "MicroBatch":
        mask = self.attention_mask
        return MicroBatch(
            input_ids=self.input_ids.to(device),
            attention_mask=None if mask is None else mask.to(device),
            position_ids=self.position_ids.to(device),
            owner=self.owner.to(device),
            hidden_rows=self.hidden_rows.to(device),
            columns=self.columns.to(device),
            teachers=tuple(teacher.to(device) for teacher in self.teachers),
            sources=self.sources,
            oldest_versions=self.oldest_versions.to(device),
        )

    def arguments(self) -> tuple:
        """The positional arguments of Student.forward. DeepSpeed's hooks look for tensors only
        among positional arguments.
        """
        return (
            self.input_ids,
            self.attention_mask,
            self.position_ids,
            self.hidden_rows,
            self.teachers,
            self.columns,
        )

    def sparse_alone(self) -> "MicroBatch":
        """A copy without teachers and without the regression of a value head."""
        none = torch.zeros_like(self.columns.value_slope)
        return replace(self, teachers=(), columns=self.columns._replace(value_slope=none))

    def without_sparse(self) -> "MicroBatch":
        """A copy with only the dense term."""
        return replace(self, columns=self.columns.without_sparse())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, for a file that a person inspects."""
        values = {f.name: getattr(self, f.name) for f in fields(self)} | self.columns._asdict()
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return tensors | {
            f"teachers/{i}/{name}": getattr(teacher, name)
            for i, teacher in enumerate(self.teachers)
            for name in teacher.per_token
        }


def train_sequences(
    rollout: RolloutBatch,
    columns: TokenColumns,
    teachers: Sequence[Teacher] = (),
) -> list[MicroBatch]:
    """Cut a batch into micro-batches of one sequence each.

    Args:
        columns, teachers: of all R response tokens of the batch, in its order.
    """
    first_rows = np.concatenate([[0], np.cumsum(rollout.response_lengths)]).tolist()
    sequences = []
    for i, (start, stop) in enumerate(pairwise(rollout.offsets.tolist())):
        span = slice(start, stop)
        rows = slice(first_rows[i], first_rows[i + 1])
        at = np.flatnonzero(rollout.response_mask[span])
        sequences.append(
            sequence(
                rollout.input_ids[span],
                response_at=at,
                columns=columns.at(rows),
                teachers=[teacher.at(rows) for teacher in teachers],
                source=rollout.source,
                oldest_version=int(rollout.policy_versions[span][at].min(initial=NO_VERSION)),
            )
        )
    return sequences


def sequence(
    input_ids: np.ndarray,
    *,
    response_at: np.ndarray,
    columns: TokenColumns,
    teachers: Sequence[Teacher] = (),
    source: Source = Source.student,
    oldest_version: int = NO_VERSION,
) -> MicroBatch:
    """A micro-batch of one sequence of T tokens, of which r are its response.

    Args:
        input_ids: [T] int32.
        response_at: [r] positions of the response tokens, never 0.
        columns, teachers: r rows each.
    """
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids.astype(np.int64))[None],
        attention_mask=None,
        position_ids=torch.arange(len(input_ids))[None],
        owner=torch.zeros(len(response_at), dtype=torch.int64),
        hidden_rows=torch.from_numpy(response_at - 1),
        columns=columns,
        teachers=tuple(teachers),
        sources=(source,),
        oldest_versions=torch.tensor([oldest_version]),
    )


def unlearned_sequences(rollout: RolloutBatch) -> list[MicroBatch]:
    """Cut a batch into sequences of weight 0 without teachers, for passes that do not learn."""
    mask = rollout.response_mask
    columns = TokenColumns.unlearned(
        torch.from_numpy(rollout.input_ids[mask].astype(np.int64)),
        torch.from_numpy(rollout.rollout_logprobs[mask]),
    )
    return train_sequences(rollout, columns)


def idle_sequence(teachers: Sequence[Teacher]) -> MicroBatch:
    """A sequence of weight 0, which a rank runs while others still have micro-batches.

    Args:
        teachers: one row each, with the widths and dtypes of the run.
    """
    return sequence(
        np.zeros(2, np.int32),
        response_at=np.array([1]),
        columns=TokenColumns.unlearned(torch.zeros(1, dtype=torch.int64), torch.zeros(1)),
        teachers=teachers,
    )


def collate(sequences: Sequence[MicroBatch], *, packed: bool = False) -> MicroBatch:
    """Combine micro-batches of one sequence each, at least one: pad them on the right and stack
    them, or, if packed, put them one after the other in a row.
    """
    lengths = [s.num_tokens for s in sequences]
    shape = (1, sum(lengths)) if packed else (len(sequences), max(lengths))
    # The first position of each sequence in the flattened [B*T].
    steps = lengths if packed else [shape[1]] * len(lengths)
    starts = list(accumulate(steps[:-1], initial=0))
    ids = torch.zeros(shape[0] * shape[1], dtype=torch.int64)
    mask = torch.zeros_like(ids)
    positions = torch.zeros_like(ids)
    for part, start, length in zip(sequences, starts, lengths, strict=True):
        span = slice(start, start + length)
        ids[span] = part.input_ids[0]
        mask[span] = 1
        positions[span] = part.position_ids[0]
    return MicroBatch(
        input_ids=ids.reshape(shape),
        attention_mask=None if packed else mask.reshape(shape),
        position_ids=positions.reshape(shape),
        owner=torch.cat([s.owner + i for i, s in enumerate(sequences)]),
        hidden_rows=torch.cat(
            [s.hidden_rows + start for s, start in zip(sequences, starts, strict=True)]
        ),
        columns=TokenColumns.join([s.columns for s in sequences]),
        teachers=tuple(
            first.join(others)
            for first, *others in zip(*(s.teachers for s in sequences), strict=True)
        ),
        sources=tuple(source for s in sequences for source in s.sources),
        oldest_versions=torch.cat([s.oldest_versions for s in sequences]),
    )
