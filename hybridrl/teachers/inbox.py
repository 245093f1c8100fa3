"""The learner's side of the teachers: from columns that scorers sent to the head pass's input."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hybridrl.batch.micro_batch import TeacherColumns
from hybridrl.batch.wire import from_wire, to_wire
from hybridrl.kernels.teacher_rows import Teacher
from hybridrl.models.loading import head_rows
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.evidence import Evidence, Received
from hybridrl.teachers.teacher_model import load_teacher_head


class TeacherInbox:
    """The learner's copy of each scored teacher: its evidence, and its output embedding where the
    evidence needs one.
    """

    def __init__(
        self,
        evidence: Sequence[Evidence],
        heads: Sequence[Tensor | None],
        vocabulary: int,
        device: torch.device,
    ) -> None:
        """
        Args:
            evidence: of each scored teacher.
            heads: the output embedding [V, H] of each of them, on the device; None: its evidence
                needs none.
            vocabulary: V, the student's.
        """
        self.evidence = tuple(evidence)
        self.heads = tuple(heads)
        self.vocabulary = vocabulary
        self.device = device

    @classmethod
    def load(
        cls, settings: RunSettings, evidence: Sequence[Evidence], device: torch.device
    ) -> "TeacherInbox":
        """Read the output embeddings that the evidence of the scored teachers needs.

        Raises:
            ConfigError: a teacher cannot be loaded.
        """
        vocabulary = head_rows(settings.model.path, settings.model.revision)
        heads: list[Tensor | None] = []
        for name, kind in zip(settings.scored_teachers, evidence, strict=True):
            if not kind.needs_head:
                heads.append(None)
                continue
            head = load_teacher_head(settings, name)
            heads.append(head[:vocabulary].to(device).clone())
        return cls(evidence, heads, vocabulary, device)

    @property
    def compares_rows(self) -> bool:
        """Whether the head pass compares the student with a teacher over more than the drawn
        token.
        """
        return any(evidence.name for evidence in self.evidence)

    def head_inputs(self, columns: Sequence[TeacherColumns]) -> tuple[Teacher, ...]:
        """The teachers with which the head pass compares the student. A teacher that sends only the
        drawn token's log-prob is not among them.

        Args:
            columns: of each scored teacher, for the tokens of one micro-batch.
        """
        teachers = []
        for evidence, head, column in zip(self.evidence, self.heads, columns, strict=True):
            received = Received(
                rows=from_wire(column.rows).to(self.device),
                support_ids=torch.from_numpy(column.support_ids.astype(np.int64)).to(self.device),
                weight=torch.from_numpy(column.weight).to(self.device),
                head=head,
            )
            teacher = evidence.head_input(received)
            if teacher is not None:
                teachers.append(teacher)
        return tuple(teachers)

    def idle(self) -> list[TeacherColumns]:
        """Columns of one row of weight 0 for each teacher, in the widths and dtypes of the run.

        They are for a micro-batch of a rank that has no sequence left.
        """
        return [
            TeacherColumns(
                rows=self._idle_rows(evidence, head),
                support_ids=np.arange(evidence.support, dtype=np.int32)[None],
                weight=np.zeros(1, np.float32),
            )
            for evidence, head in zip(self.evidence, self.heads, strict=True)
        ]

    def _idle_rows(self, evidence: Evidence, head: Tensor | None) -> np.ndarray:
        hidden = 0 if head is None else head.shape[1]
        dtype = torch.float32 if head is None else head.dtype
        width = evidence.width(self.vocabulary, hidden)
        return to_wire(torch.zeros(1, width, dtype=evidence.row_dtype(dtype)))
