"""The learner's side of the teachers: converts the scorers' columns to input of the head pass."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hybridrl.batch.views import per_token
from hybridrl.batch.wire import to_wire
from hybridrl.kernels.teacher_rows import Teacher
from hybridrl.models.loading import head_rows
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.context import end_tokens
from hybridrl.teachers.evidence import Evidence
from hybridrl.teachers.teacher_model import load_teacher_head
from hybridrl.types import ScoredBatch, TokenScores


class TeacherInbox:
    """What the learner keeps of each scored teacher: its kind of evidence, and its output embedding
    if the evidence needs it.
    """

    def __init__(
        self,
        evidence: Sequence[Evidence],
        heads: Sequence[Tensor | None],
        vocabulary: int,
    ) -> None:
        """
        Args:
            evidence: of each scored teacher.
            heads: the output embedding [V, H] of each scored teacher, on the device; None: its
                evidence needs none.
            vocabulary: V of the student.
        """
        self.evidence = tuple(evidence)
        self.heads = tuple(heads)
        self.vocabulary = vocabulary

    @classmethod
    def load(
        cls,
        settings: RunSettings,
        evidence: Sequence[Evidence],
        device: torch.device,
        base_head: Tensor | None = None,
    ) -> "TeacherInbox":
        """Read the output embeddings that the evidence of the scored teachers needs.

        Args:
            base_head: [V, H] the output embedding of the student before training, on the device,
                for the teachers with share_base; None: there are no such teachers.

        Raises:
            ConfigError: a teacher cannot be loaded.
        """
        vocabulary = head_rows(settings.model.path, settings.model.revision)
        heads: list[Tensor | None] = []
        for name, kind in zip(settings.scored_teachers, evidence, strict=True):
            if not kind.needs_head:
                heads.append(None)
                continue
            ends = end_tokens(settings, name)
            if settings.teachers[name].share_base and base_head is not None:
                head = base_head[:vocabulary] if ends is None else base_head[:vocabulary].clone()
            else:
                head = load_teacher_head(settings, name)[:vocabulary].to(device).clone()
            if ends is not None:
                ends.exchange_rows(head)
            heads.append(head)
        return cls(evidence, heads, vocabulary)

    def head_inputs(
        self, batch: ScoredBatch, teacher_weights: Sequence[Tensor]
    ) -> tuple[Teacher, ...]:
        """The teachers with which the head pass compares the student, R rows each, without those
        that send only the drawn token's log-prob.

        Args:
            teacher_weights: for each scored teacher [N] the weight w_i of each sequence.
        """
        of_tokens = [per_token(weight, batch.rollout).float() for weight in teacher_weights]
        return self._head_inputs(batch.scores, of_tokens)

    def idle(self) -> tuple[Teacher, ...]:
        """One dummy row of each teacher, of weight 0, for a rank that must run a forward pass with
        the others but has no data left.
        """
        scores = [
            TokenScores(
                teacher="",
                logprobs=np.zeros(1, np.float32),
                rows=self._idle_rows(evidence, head),
                support_ids=np.arange(evidence.support, dtype=np.int32)[None],
            )
            for evidence, head in zip(self.evidence, self.heads, strict=True)
        ]
        return self._head_inputs(scores, [torch.zeros(1)] * len(scores))

    def _head_inputs(
        self, scores: Sequence[TokenScores], weights: Sequence[Tensor]
    ) -> tuple[Teacher, ...]:
        inputs = (
            evidence.head_input(of_teacher, weight, head)
            for evidence, of_teacher, weight, head in zip(
                self.evidence, scores, weights, self.heads, strict=True
            )
        )
        return tuple(teacher for teacher in inputs if teacher is not None)

    def _idle_rows(self, evidence: Evidence, head: Tensor | None) -> np.ndarray:
        hidden = 0 if head is None else head.shape[1]
        dtype = torch.float32 if head is None else head.dtype
        width = evidence.width(self.vocabulary, hidden)
        return to_wire(torch.zeros(1, width, dtype=evidence.row_dtype(dtype)))
