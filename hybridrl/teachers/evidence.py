"""The evidence that a teacher sends about a response token, and how scorer and learner compute with
it.

There is one class for each kind of evidence. It defines the width of its rows in the object store,
how a scorer computes them from the teacher's hidden states, the input of the learner's head pass,
and how many of the sampler's tokens it needs. Scorer, inbox, objective and oracle call these
classes and do not depend on the kind; the teachers of one run may have different kinds.

Shapes: R' response tokens of one forward pass, V vocabulary, H the teacher's hidden size, W width
of a row, K tokens of a support.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hybridrl.batch.wire import from_wire
from hybridrl.kernels.head import HeadRule, chosen_logprobs, top_logprobs, vocabulary_logprobs
from hybridrl.kernels.teacher_rows import HiddenTeacher, SupportTeacher, Teacher, VocabularyTeacher
from hybridrl.kernels.workspace import softmax_dtype
from hybridrl.settings.algorithm import AlgorithmConfig
from hybridrl.settings.choices import Correction, EvidenceKind, SupportSource
from hybridrl.types import TokenScores


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """The result of a teacher's forward pass for R' response tokens."""

    hidden: Tensor  # [R', H] the last hidden state before each token
    head: Tensor  # [V, H] the teacher's output embedding
    rule: HeadRule
    token_ids: Tensor  # [R'] int64, y_t
    sampler_support: Tensor  # [R', K] int64, the sampler's most likely tokens; K=0 unless requested


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A scorer's evidence about R' response tokens."""

    rows: Tensor  # [R', W]
    support_ids: Tensor  # [R', K] int64, the tokens that `rows` are about; K=0 without a support
    logprobs: Tensor  # [R'] log q(y_t); 0 if it is not requested


class Evidence(ABC):
    """One kind of evidence. Instances are small frozen values that are sent to the scorers."""

    __slots__ = ()

    name: ClassVar[str]
    """The name of its rows in the metric transfer/token_bytes/<name>; empty: it has no rows."""
    needs_head: ClassVar[bool] = False
    """Whether the learner keeps a copy of the teacher's output embedding."""
    covers_vocabulary: ClassVar[bool] = False
    """Whether a row has one number for each token of the vocabulary."""

    @property
    def estimates(self) -> bool:
        """Whether a part of the dense term is estimated from the drawn token's log q."""
        return False

    @property
    def support(self) -> int:
        """K, the number of tokens that a row is about; 0: a row is about no selection of tokens."""
        return 0

    @property
    def sampler_support(self) -> int:
        """The number of the sampler's most likely tokens that `read` needs; 0: none."""
        return 0

    @abstractmethod
    def width(self, vocabulary: int, hidden: int) -> int:
        """W, the number of entries of a row, for a vocabulary of V tokens and a hidden size H."""

    def row_dtype(self, head: torch.dtype) -> torch.dtype:
        """The dtype of a row in the object store.

        Args:
            head: the dtype of the teacher's output embedding.
        """
        return _logprob_dtype(head)

    @abstractmethod
    def read(self, states: States) -> Reading:
        """Compute the evidence about these tokens, without gradients. Runs on the scorer."""

    @abstractmethod
    def head_input(
        self, scores: TokenScores, weight: Tensor, head: Tensor | None
    ) -> Teacher | None:
        """The input with which the head pass compares student and teacher; None: only the drawn
        token's log-prob is known. Runs on the learner.

        Args:
            scores: of R response tokens; its arrays are writable.
            weight: [R] float32, w_i.
            head: [V, H] the teacher's output embedding; None unless `needs_head`.
        """

    def drawn_logprobs(
        self, rows: np.ndarray, token_ids: Tensor, head: Tensor | None, rule: HeadRule
    ) -> Tensor | None:
        """[R] log q(y_t) from the rows; None: TokenScores.logprobs always contains it.

        Args:
            rows: [R, W] as in TokenScores; writable.
            token_ids: [R] int64, y_t.
            head: as in head_input.
        """
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden(Evidence):
    """The last hidden state: H numbers a token. The learner computes log q over the vocabulary."""

    drawn: bool  # also send log q(y_t), which costs the scorer one pass over the vocabulary
    name = "teacher_hidden"
    needs_head = True

    def width(self, vocabulary: int, hidden: int) -> int:
        return hidden

    def row_dtype(self, head: torch.dtype) -> torch.dtype:
        return head

    def read(self, states: States) -> Reading:
        logprobs = _drawn(states) if self.drawn else _zeros(states)
        return Reading(
            rows=states.hidden.to(states.head.dtype),
            support_ids=_no_support(states),
            logprobs=logprobs,
        )

    def head_input(self, scores: TokenScores, weight: Tensor, head: Tensor | None) -> Teacher:
        assert head is not None, "the learner keeps this teacher's output embedding"
        return HiddenTeacher(hidden=from_wire(scores.rows), lm_head=head, weight=weight)

    def drawn_logprobs(
        self, rows: np.ndarray, token_ids: Tensor, head: Tensor | None, rule: HeadRule
    ) -> Tensor:
        assert head is not None, "the learner keeps this teacher's output embedding"
        hidden = from_wire(rows).to(head.device)
        ids = token_ids[:, None].to(head.device)
        return chosen_logprobs(hidden, head, ids, rule)[:, 0].cpu()


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary(Evidence):
    """Log-probs of the whole vocabulary: V numbers a token."""

    drawn: bool  # as in Hidden
    name = "teacher_vocabulary"
    covers_vocabulary = True

    def width(self, vocabulary: int, hidden: int) -> int:
        return vocabulary

    def read(self, states: States) -> Reading:
        return Reading(
            rows=vocabulary_logprobs(states.hidden, states.head, states.rule),
            support_ids=_no_support(states),
            logprobs=_drawn(states) if self.drawn else _zeros(states),
        )

    def head_input(self, scores: TokenScores, weight: Tensor, head: Tensor | None) -> Teacher:
        return VocabularyTeacher(logprobs=from_wire(scores.rows), weight=weight)

    def drawn_logprobs(
        self, rows: np.ndarray, token_ids: Tensor, head: Tensor | None, rule: HeadRule
    ) -> Tensor:
        return from_wire(rows).gather(1, token_ids[:, None])[:, 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Support(Evidence):
    """Log-probs of K tokens that are chosen from the prefix alone, and of the drawn token."""

    k: int
    source: SupportSource
    correction: Correction  # how tokens other than the K are accounted for
    name = "teacher_support"

    @property
    def estimates(self) -> bool:
        return self.correction is Correction.unbiased

    @property
    def sampler_support(self) -> int:
        return self.k if self.source is SupportSource.sampler else 0

    def width(self, vocabulary: int, hidden: int) -> int:
        return self.k

    @property
    def support(self) -> int:
        return self.k

    def read(self, states: States) -> Reading:
        if self.source is SupportSource.teacher:
            ids = top_logprobs(states.hidden, states.head, self.k, states.rule)[0]
        else:
            ids = states.sampler_support
        both = torch.cat([ids, states.token_ids[:, None]], 1)
        logprobs = chosen_logprobs(states.hidden, states.head, both, states.rule)
        return Reading(rows=logprobs[:, :-1], support_ids=ids, logprobs=logprobs[:, -1])

    def head_input(self, scores: TokenScores, weight: Tensor, head: Tensor | None) -> Teacher:
        return SupportTeacher(
            ids=torch.from_numpy(scores.support_ids.astype(np.int64)),
            logprobs=from_wire(scores.rows),
            weight=weight,
            correction=self.correction,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn(Evidence):
    """log q(y_t) alone: one number a token."""

    name = ""

    @property
    def estimates(self) -> bool:
        return True

    def width(self, vocabulary: int, hidden: int) -> int:
        return 0

    def read(self, states: States) -> Reading:
        return Reading(
            rows=states.hidden[:, :0],
            support_ids=_no_support(states),
            logprobs=_drawn(states),
        )

    def head_input(self, scores: TokenScores, weight: Tensor, head: Tensor | None) -> None:
        return None


def make_evidence(kind: EvidenceKind, algorithm: AlgorithmConfig, *, drawn: bool) -> Evidence:
    """The evidence of one teacher.

    Args:
        drawn: log q(y_t) is needed in addition to the rows, e.g. for costs of future tokens.
    """
    match kind:
        case EvidenceKind.hidden:
            return Hidden(drawn=drawn)
        case EvidenceKind.vocabulary:
            return Vocabulary(drawn=drawn)
        case EvidenceKind.support:
            topk = algorithm.topk
            return Support(k=topk.k, source=topk.source, correction=topk.correction)
        case EvidenceKind.drawn:
            return Drawn()


def _drawn(states: States) -> Tensor:
    ids = states.token_ids[:, None]
    return chosen_logprobs(states.hidden, states.head, ids, states.rule)[:, 0]


def _zeros(states: States) -> Tensor:
    return torch.zeros(len(states.hidden), dtype=_logprob_dtype(states.head.dtype))


def _no_support(states: States) -> Tensor:
    return torch.zeros(len(states.hidden), 0, dtype=torch.int64)


def _logprob_dtype(head: torch.dtype) -> torch.dtype:
    return softmax_dtype(torch.empty(0, dtype=head))
