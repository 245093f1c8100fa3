"""The ways a teacher's distribution reaches the head pass, one row per response token.

A teacher is tensors of all rows; `evidence` is what it says about a chunk of them, a tuple of plain
tensors, and `Form` or a Correction says how to read it. The split lets the work on rows be one
function of tensors (kernels.rows).
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
    """How a chunk of a teacher that knows the whole vocabulary is written."""

    logits = "logits"  # [c, V] before temperature and softmax
    logprobs = "logprobs"  # [c, V] normalised


class TeacherRows:
    """R response tokens of one teacher. Instances can be cut and joined, and are never edited."""

    __slots__ = ()

    per_token: ClassVar[tuple[str, ...]]
    """The fields with one entry for each token."""

    def at(self, rows: slice) -> Self:
        """The given tokens."""
        return self._with({name: getattr(self, name)[rows] for name in self.per_token})

    def to(self, device: torch.device) -> Self:
        """With the tokens on another device. What all tokens share stays where it is."""
        return self._with({name: getattr(self, name).to(device) for name in self.per_token})

    def join(self, others: Sequence[Self]) -> Self:
        """These tokens, and those of others of the same teacher after them."""
        parts = (self, *others)
        return self._with(
            {name: torch.cat([getattr(part, name) for part in parts]) for name in self.per_token}
        )

    def _with(self, changes: dict[str, Tensor]) -> Self:
        return replace(self, **changes)  # type: ignore[type-var]  # each subclass is a dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenTeacher(TeacherRows):
    """Last hidden states; the distribution is rebuilt chunk by chunk."""

    per_token = ("hidden", "weight")

    hidden: Tensor  # [R, Ht] last hidden state before each token
    lm_head: Tensor  # [V, Ht] or longer: rows past the student's vocabulary are padding
    weight: Tensor  # [R] w_i of each token

    @property
    def form(self) -> Form:
        return Form.logits

    def evidence(self, at: slice, vocabulary: int, workspace: Workspace) -> tuple[Tensor, ...]:
        """[c, V] logits over the student's vocabulary, valid until `workspace` makes others in
        their place.
        """
        return (workspace.logits(self.hidden[at], self.lm_head[:vocabulary]),)


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyTeacher(TeacherRows):
    """Log-probs of the whole vocabulary."""

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
    """Log-probs of K tokens that were chosen without looking at the drawn one."""

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
    """Divergence [c] and its logit gradient [c, V], given log p [c, V]."""
    if isinstance(form, Correction):
        ids, logq = evidence
        return dense_on_support(logp, ids, logq.to(logp.dtype), measure, form)
    return dense(logp, distribution(form, evidence, logp.dtype, temperature), measure)


def distribution(
    form: Form, evidence: tuple[Tensor, ...], dtype: torch.dtype, temperature: float
) -> Tensor:
    """[c, V] log q."""
    (rows,) = evidence
    return rows.to(dtype) if form is Form.logprobs else log_softmax(rows, temperature).to(dtype)


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """[c, V] -> [c, V] normalised log-probabilities in fp32 (fp64 for fp64 logits)."""
    wide = logits.to(softmax_dtype(logits))
    return torch.log_softmax(wide if temperature == 1.0 else wide / temperature, dim=-1)
