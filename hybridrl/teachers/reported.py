"""Scores that a server or an engine of vLLM reports, which holds the teacher's weights."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hybridrl.core.errors import ServerError
from hybridrl.core.peak_memory import PeakMemory
from hybridrl.kernels.head import HeadRule
from hybridrl.models.loading import head_rows
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.evidence import Evidence
from hybridrl.teachers.scorer import Scorer, response_tokens
from hybridrl.types import RolloutBatch, TokenScores

ROUNDING = 1e-3
"""nats by which rounding may lift a log-prob above 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedScores:
    """The reported log-probs of one sequence of T tokens.

    Entry t is about token t given those before it; the first one is 0.

    Raises:
        ValueError: a log-prob is not finite, or above 0.
    """

    logprobs: NDArray[np.float32]  # [T] log q(token t | tokens before)
    top_ids: NDArray[np.int32]  # [T, K] the teacher's most likely tokens, the most likely first
    top_logprobs: NDArray[np.float32]  # [T, K]

    def __post_init__(self) -> None:
        if not np.isfinite(self.logprobs).all() or not np.isfinite(self.top_logprobs).all():
            raise ValueError("it has a log-prob that is not finite")
        if max(self.logprobs.max(initial=0.0), self.top_logprobs.max(initial=0.0)) > ROUNDING:
            raise ValueError("it has a log-prob above 0")


class ReportedScorer(Scorer, ABC):
    """A scorer without weights, whose evidence is log-probs that something else reports: those of
    the drawn tokens, and of the teacher's own most likely ones, at temperature 1.

    A class of this kind says in `answers` where they come from, and in `source` how an error names
    that.
    """

    source: str
    """the setting and its value, e.g. "teachers.big.url=http://host:8000/v1" """

    def __init__(
        self, settings: RunSettings, *, teacher: str, evidence: Evidence, rule: HeadRule
    ) -> None:
        self.teacher = teacher
        self.place = None  # it has no devices of its own
        self.peaks = PeakMemory.of_device("cpu")
        self.may_cache = True
        rows = head_rows(settings.model.path, settings.model.revision)
        # [V, 0]: the columns have the widths of a teacher without an output embedding here.
        self.head = torch.empty(rows, 0)
        self.configure(settings, evidence, rule)

    @abstractmethod
    def answers(self, sequences: Sequence[Sequence[int]]) -> Sequence[ReportedScores]:
        """The scores of sequences of token ids.

        Raises:
            ServerError: there are none.
        """

    def _score_sequences(
        self, scores: TokenScores, batch: RolloutBatch, sequences: Sequence[int]
    ) -> None:
        if not sequences:
            return
        ids = [batch.trajectory(i).input_ids.tolist() for i in sequences]
        answers = self.answers(ids)
        self._check_tokens(answers)
        first_rows = np.concatenate([[0], np.cumsum(batch.response_lengths)])
        for i, answer in zip(sequences, answers, strict=True):
            tokens = response_tokens(batch, i)
            within = tokens - int(batch.offsets[i])
            rows = slice(int(first_rows[i]), int(first_rows[i + 1]))
            scores.logprobs[tokens] = answer.logprobs[within]
            scores.rows[rows] = answer.top_logprobs[within]
            scores.support_ids[rows] = answer.top_ids[within]
        self._remember(scores, batch, sequences)

    def _check_tokens(self, answers: Sequence[ReportedScores]) -> None:
        """Refuse tokens of which the student has no probability.

        Raises:
            ServerError: rows that only pad the teacher's output head are among its most likely
                tokens.
        """
        largest = max(answer.top_ids.max(initial=-1) for answer in answers)
        if largest >= len(self.head):
            raise ServerError(
                f"{self.source}: token {largest} is among the most likely ones, and the student "
                f"has {len(self.head)} tokens; lower algorithm.topk.k"
            )
