"""Scores that are reported by a server or an engine of vLLM, which has the teacher's weights."""

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
"""Nats by which a log-prob may exceed 0 because of rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedScores:
    """The reported log-probs of one sequence of T tokens.

    Entry t is about token t given the tokens before it; the first entry is 0.

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
    """A scorer without weights. Its evidence are log-probs that a server or engine reports: those
    of the drawn tokens, and of the teacher's own most likely ones, at temperature 1.

    A subclass obtains them in `answers`, and gives their origin for error messages in `source`.
    """

    source: str
    """the setting that names the origin, e.g. "teachers.big.url=http://host:8000/v1" """

    def __init__(
        self, settings: RunSettings, *, teacher: str, evidence: Evidence, rule: HeadRule
    ) -> None:
        self.teacher = teacher
        self.place = None  # it has no devices of its own
        self.peaks = PeakMemory.of_device("cpu")
        self.may_cache = True
        rows = head_rows(settings.model.path, settings.model.revision)
        # [V, 0]: this process has no output embedding; only the number of rows is used.
        self.head = torch.empty(rows, 0)
        self.configure(settings, evidence, rule)

    @abstractmethod
    def answers(self, sequences: Sequence[Sequence[int]]) -> Sequence[ReportedScores]:
        """The scores of sequences of token ids.

        Raises:
            ServerError: the scores cannot be obtained.
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
        """Refuse tokens that the student does not have.

        Raises:
            ServerError: padding rows of the teacher's output head are among its most likely tokens.
        """
        largest = max(answer.top_ids.max(initial=-1) for answer in answers)
        if largest >= len(self.head):
            raise ServerError(
                f"{self.source}: token {largest} is among the teacher's most likely tokens, but "
                f"the student has only {len(self.head)} tokens; lower algorithm.topk.k"
            )
