"""The learner's side of the teachers: from the columns that scorers sent to what the head pass
compares with.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from hybridrl.batch.micro_batch import TeacherColumns, from_wire
from hybridrl.kernels.teacher_rows import HiddenTeacher, SupportTeacher, Teacher, VocabularyTeacher
from hybridrl.models.loading import head_rows, load_output_head
from hybridrl.objectives.credit import Signal
from hybridrl.settings.run import RunSettings


class TeacherSide:
    """One entry per scored teacher. Output heads are kept here only when hidden states are what
    travels.
    """

    def __init__(
        self, settings: RunSettings, signals: Collection[Signal], device: torch.device
    ) -> None:
        self.device, self.signals, self.correction = (
            device,
            signals,
            settings.algorithm.topk.correction,
        )
        self.vocabulary = head_rows(settings.model.path, settings.model.revision)
        self.k = settings.algorithm.topk.k if Signal.teacher_support in signals else 0
        self.num_teachers = len(settings.scored_teachers)
        self.heads: list[Tensor] = []
        if Signal.teacher_hidden in signals:
            for name in settings.scored_teachers:
                model = settings.teacher_model(name)
                setting = settings.model_setting(name)
                head = load_output_head(model.path, model.dtype, model.revision, setting=setting)
                self.heads.append(head[: self.vocabulary].to(device).clone())

    def of(self, columns: Sequence[TeacherColumns]) -> tuple[Teacher, ...]:
        """What the head pass compares the student with; none where the drawn token's log-prob was
        all.
        """

        def to(t):
            return t.to(self.device)

        weights = [to(torch.from_numpy(c.weight)) for c in columns]
        rows = [to(from_wire(c.rows)) for c in columns]
        if Signal.teacher_hidden in self.signals:
            named = zip(rows, self.heads, weights, strict=True)
            return tuple(HiddenTeacher(hidden=r, lm_head=h, weight=w) for r, h, w in named)
        if Signal.teacher_vocabulary in self.signals:
            return tuple(
                VocabularyTeacher(logprobs=r, weight=w) for r, w in zip(rows, weights, strict=True)
            )
        if Signal.teacher_support in self.signals:
            ids = [to(torch.from_numpy(c.support_ids.astype(np.int64))) for c in columns]
            named = zip(ids, rows, weights, strict=True)
            return tuple(
                SupportTeacher(ids=i, logprobs=r, weight=w, correction=self.correction)
                for i, r, w in named
            )
        return ()

    def idle(self) -> list[TeacherColumns]:
        """One row of weight 0 per teacher."""
        return [
            TeacherColumns(
                rows=self._idle_rows(k),
                support_ids=np.arange(self.k, dtype=np.int32)[None],
                weight=np.zeros(1, np.float32),
            )
            for k in range(self.num_teachers)
        ]

    def _idle_rows(self, teacher: int) -> np.ndarray:
        if Signal.teacher_hidden in self.signals:
            head = self.heads[teacher]
            return np.zeros(
                (1, head.shape[1]), np.uint16 if head.dtype == torch.bfloat16 else np.float32
            )
        width = self.vocabulary if Signal.teacher_vocabulary in self.signals else self.k
        return np.zeros((1, width), np.float32)
