"""The learner's side of the teachers: from the columns that scorers sent to what the head pass
compares the student with.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridrl.batch.micro_batch import TeacherColumns
from hybridrl.kernels.teacher_rows import Teacher
from hybridrl.models.loading import head_rows
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.evidence import Evidence
from hybridrl.teachers.teacher_model import load_teacher_head


class TeacherInbox:
    """What the learner keeps of each scored teacher: its evidence, and its output embedding where
    the evidence needs one.
    """

    def __init__(
        self,
        evidence: Sequence[Evidence],
        heads: Sequence[Tensor | None],
        vocabulary: int,
        device: torch.device,
    ) -> None:
        """heads: of each teacher [V, H], on the device; None: its evidence needs none."""
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
        """What the head pass compares the student with; a teacher whose evidence is the drawn
        token's log-prob alone is not among them.

        Args:
            columns: of each teacher, on the device.
        """
        inputs = (
            evidence.head_input(of_teacher, head)
            for evidence, head, of_teacher in zip(self.evidence, self.heads, columns, strict=True)
        )
        return tuple(teacher for teacher in inputs if teacher is not None)

    def idle(self) -> list[TeacherColumns]:
        """One row of weight 0 per teacher, in the widths and dtypes of the run."""
        return [
            TeacherColumns(
                rows=self._idle_rows(evidence, head),
                support_ids=torch.arange(evidence.support)[None],
                weight=torch.zeros(1),
            )
            for evidence, head in zip(self.evidence, self.heads, strict=True)
        ]

    def _idle_rows(self, evidence: Evidence, head: Tensor | None) -> Tensor:
        hidden = 0 if head is None else head.shape[1]
        dtype = torch.float32 if head is None else head.dtype
        width = evidence.width(self.vocabulary, hidden)
        return torch.zeros(1, width, dtype=evidence.row_dtype(dtype))
