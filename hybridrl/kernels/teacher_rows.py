"""The ways a teacher's distribution reaches the head pass, one row per response token.

A teacher holds tensors of all rows. Its `evidence` about a chunk of rows is a tuple of plain
tensors, and a `Form` or a Correction says how to read it. So the work on rows can be one function
of tensors (kernels.rows).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar, Self

import torch
from torch import Tensor

from hybridrl.kernels.workspace import Workspace, softmax_dtype
from hybridrl.ops.divergence import Measure, dense, dense_on_support
from hybridrl.settings.choices import Correction


class Form(StrEnum):
    """The form of a teacher's evidence about the whole vocabulary."""

    logits = "logits"  # [c, V] before temperature and softmax
    logprobs = "logprobs"  # [c, V] normalised


class TeacherRows:
    """The evidence of one teacher about R response tokens. Instances can be sliced and joined, and
    are never modified.
    """

    __slots__ = ()

    per_token: ClassVar[tuple[str, ...]]
    """The fields with one entry for each token."""

    def at(self, rows: slice) -> Self:
        """The given tokens."""
        return self._with({name: getattr(self, name)[rows] for name in self.per_token})

    def to(self, device: torch.device) -> Self:
        """A copy whose per-token fields are on another device; shared fields are not moved."""
        return self._with({name: getattr(self, name).to(device) for name in self.per_token})

    def join(self, others: Sequence[Self]) -> Self:
        """These tokens, followed by those of `others`, which are of the same teacher."""
        parts = (self, *others)
        return self._with(
            {name: torch.cat([getattr(part, name) for part in parts]) for name in self.per_token}
        )

    def _with(self, changes: dict[str, Tensor]) -> Self:
        return replace(self, **changes)  # type: ignore[type-var]  # each subclass is a dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenTeacher(TeacherRows):
    """A teacher's last hidden states; its distribution is recomputed chunk by chunk."""

    per_token = ("hidden", "weight")

    hidden: Tensor  # [R, Ht] last hidden state before each token
    lm_head: Tensor  # [V, Ht] or longer: rows past the student's vocabulary are padding
    weight: Tensor  # [R] w_i of each token

    @property
    def form(self) -> Form:
        return Form.logits

    def evidence(self, at: slice, vocabulary: int, workspace: Workspace) -> tuple[Tensor, ...]:
        """[c, V] logits over the student's vocabulary, until `workspace` reuses their memory."""
        return (workspace.logits(self.hidden[at], self.lm_head[:vocabulary]),)


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyTeacher(TeacherRows):
    """A teacher's log-probs of the whole vocabulary."""

    per_token = ("logprobs", "weight")

    logprobs: Tensor  # [R, V] log q
    weight: Tensor  # [R]

    @property
    def form(self) -> Form:
        return Form.logprobs

    def evidence(self, at: slice, vocabulary: int, workspace: Workspace) -> tuple[Tensor, ...]:
        return (self.logprobs[at],)


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportTeacher(TeacherRows):
    """A teacher's log-probs of K tokens, whose choice does not depend on the drawn token."""

    per_token = ("ids", "logprobs", "weight")

    ids: Tensor  # [R, K] int64
    logprobs: Tensor  # [R, K] log q at them
    weight: Tensor  # [R]
    correction: Correction

    @property
    def form(self) -> Correction:
        return self.correction

    def evidence(self, at: slice, vocabulary: int, workspace: Workspace) -> tuple[Tensor, ...]:
        return self.ids[at], self.logprobs[at]


Teacher = HiddenTeacher | VocabularyTeacher | SupportTeacher


def divergence(
    form: Form | Correction,
    evidence: tuple[Tensor, ...],
    logp: Tensor,
    measure: Measure,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The divergence [c] of a teacher from the student's log p [c, V], and its gradient [c, V] at
    the student's logits.
    """
    if isinstance(form, Correction):
        ids, logq = evidence
        return dense_on_support(logp, ids, logq.to(logp.dtype), measure, form)
    return dense(logp, distribution(form, evidence, logp.dtype, temperature), measure)


def distribution(
    form: Form, evidence: tuple[Tensor, ...], dtype: torch.dtype, temperature: float
) -> Tensor:
    """[c, V] log q in `dtype`, from evidence of the given form."""
    (rows,) = evidence
    return rows.to(dtype) if form is Form.logprobs else log_softmax(rows, temperature).to(dtype)


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """[c, V] -> [c, V] normalised log-probabilities in fp32 (fp64 for fp64 logits)."""
    wide = logits.to(softmax_dtype(logits))
    return torch.log_softmax(wide if temperature == 1.0 else wide / temperature, dim=-1)
