"""What a teacher can say about a response token, from its hidden states to the learner's head pass.

There is one class for each kind of evidence. It knows how wide its rows are in the object store,
how a scorer reads them from the teacher's hidden states, what the learner's head pass is given, and
what it needs of the sampler. Scorer, inbox, objective and oracle call these classes; nothing else
asks which kind a teacher has, and the teachers of one run may differ.

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
    """R' response tokens as a teacher's forward pass leaves them."""

    hidden: Tensor  # [R', H] the last hidden state before each token
    head: Tensor  # [V, H] the teacher's output embedding
    rule: HeadRule
    token_ids: Tensor  # [R'] int64, y_t
    sampler_support: Tensor  # [R', K] int64, the sampler's most likely tokens; K=0 unless requested


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is sent of R' response tokens."""

    rows: Tensor  # [R', W]
    support_ids: Tensor  # [R', K] int64, the tokens that `rows` are about; K=0 without a support
    logprobs: Tensor  # [R'] log q(y_t); 0 where it is not requested


class Evidence(ABC):
    """One kind of evidence. Instances are small frozen values that travel to the scorers.

    A subclass overrides what differs from the log-probs of the whole vocabulary.
    """

    __slots__ = ()

    name: ClassVar[str]
    """The part of a metric's name that counts the bytes of its rows; empty: it has no rows."""
    needs_head: ClassVar[bool] = False
    """Whether the learner keeps a copy of the teacher's output embedding."""

    @property
    def estimates(self) -> bool:
        """Whether a part of the dense term is estimated from the drawn token's log q."""
        return False

    @property
    def support(self) -> int:
        """Tokens that a row is about: K; 0 where it is not about a selection of tokens."""
        return 0

    @property
    def sampler_support(self) -> int:
        """How many of the sampler's most likely tokens it reads; 0: none."""
        return 0

    @abstractmethod
    def width(self, vocabulary: int, hidden: int) -> int:
        """Numbers in a row: W."""

    def row_dtype(self, head: torch.dtype) -> torch.dtype:
        """The dtype of a row in the object store, by that of the teacher's output embedding."""
        return _logprob_dtype(head)

    @abstractmethod
    def read(self, states: States) -> Reading:
        """What is sent of these tokens; no gradient. Runs on the scorer."""

    @abstractmethod
    def head_input(
        self, scores: TokenScores, weight: Tensor, head: Tensor | None
    ) -> Teacher | None:
        """What the head pass compares the student with; None: nothing beyond the drawn token. Runs
        on the learner.

        Args:
            scores: of R response tokens; its arrays are writable.
            weight: [R] float32, w_i.
            head: [V, H] the teacher's output embedding; None unless `needs_head`.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden(Evidence):
    """The last hidden state: H numbers a token. The learner rebuilds log q over the vocabulary."""

    drawn: bool  # log q(y_t) is sent too, which costs the scorer one pass over the vocabulary
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary(Evidence):
    """Log-probs of the whole vocabulary: V numbers a token."""

    drawn: bool  # as of Hidden
    name = "teacher_vocabulary"

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Support(Evidence):
    """Log-probs of K tokens that are chosen from the prefix alone, and of the drawn token."""

    k: int
    source: SupportSource
    correction: Correction  # what accounts for the tokens outside the K
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
        drawn: log q(y_t) is needed besides the rows, as for costs of future tokens.
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
