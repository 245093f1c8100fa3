"""A worker that scores responses with a frozen teacher."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from hybridrl.batch.balance import micro_batches
from hybridrl.core import failpoints
from hybridrl.core.errors import CheckpointError
from hybridrl.core.peak_memory import PeakMemory
from hybridrl.data.route import takes
from hybridrl.kernels.head import HeadRule
from hybridrl.models.loading import head_rows
from hybridrl.run_dir.saved_file import seal
from hybridrl.settings.choices import Source
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.context import Context
from hybridrl.teachers.evidence import Evidence
from hybridrl.teachers.scores import empty_scores, fill_scores
from hybridrl.teachers.sharded_model import ReplicaRank
from hybridrl.teachers.teacher_model import TeacherModel, load_teacher
from hybridrl.types import RolloutBatch, SavedFile, ScoreHeader, TokenScores, Work


class Scorer:
    """One replica of one teacher, or one rank of a replica with several devices.

    It makes one forward pass over each sequence and returns its evidence about the response tokens.
    If the evidence is only log-probs of drawn tokens, those of the data's responses are cached.

    The ranks of a replica get the same calls in the same order. They share the forward passes, and
    each has the whole result; rank 0 sends it.
    """

    def __init__(
        self,
        settings: RunSettings,
        *,
        teacher: str,
        device: str,
        evidence: Evidence,
        rule: HeadRule,
        place: ReplicaRank | None = None,
        model: TeacherModel | None = None,
    ) -> None:
        """
        Args:
            place: this process's rank in a replica with several devices; None: one device.
            model: a model that this process has already, whose scores are never cached; None: the
                teacher's model is loaded.
        """
        self.teacher = teacher
        self.device = torch.device(device)
        self.peaks = PeakMemory.of_device(device)
        self.place = place
        self.may_cache = model is None
        self.model = model or load_teacher(settings, teacher, self.device, place)
        # Rows beyond the student's vocabulary are padding, which must have no probability.
        rows = head_rows(settings.model.path, settings.model.revision)
        self.head = self.model.head[:rows].to(self.device)
        self.configure(settings, evidence, rule)

    def configure(self, settings: RunSettings, evidence: Evidence, rule: HeadRule) -> None:
        """Use these settings from now on, with the same teacher.

        Args:
            evidence: what is sent about each response token.
            rule: the settings of the head pass: temperature, and the tokens computed at once.
        """
        self.route: Mapping[str, Any] = settings.teachers[self.teacher].route
        self.context = Context.of(settings, self.teacher)
        self.evidence = evidence
        self.rule = rule
        model = settings.teacher_model(self.teacher)
        # Everything that log q depends on besides the tokens.
        weights = settings.teachers[self.teacher].model or model.path
        self.identity = f"{weights} {model.revision} {model.dtype} {rule.temperature}"
        ranks = 1 if self.place is None else self.place.ranks
        self.max_tokens = settings.scorer.max_tokens_per_micro_batch * ranks
        self.caches = self.may_cache and evidence.width(*self.head.shape) == 0
        self.cached: dict[str, np.ndarray] = {}  # data_key -> [r] log q

    def ping(self) -> str:
        return self.teacher

    def score(self, batch: RolloutBatch) -> tuple[ScoreHeader, TokenScores]:
        """The header of a batch's scores, and the scores."""
        rank = 0 if self.place is None else self.place.rank
        failpoints.hit("scorer.score", uid=batch.uids[0], rank=rank)
        started = time.monotonic()
        with self.peaks.phase("score"):
            scores = self.scores(batch)
        took = time.monotonic() - started
        work = Work(tokens=len(batch.input_ids), busy_s=took, peak_bytes=self.peaks.take())
        header = ScoreHeader(
            teacher=self.teacher, nbytes=self._nbytes(scores), score_s=took, work=work
        )
        return header, scores

    @torch.no_grad()
    def scores(self, given: RolloutBatch) -> TokenScores:
        """Score all sequences whose prompts are routed to this teacher; others have scores of 0."""
        batch = self.context.read(given)
        scores = empty_scores(self.evidence, self.teacher, batch, self.head)
        routed = [i for i in range(batch.num_sequences) if self._is_routed(batch, i)]
        cached = self._cached(batch, routed)
        for sequence, logprobs in cached.items():
            scores.logprobs[response_tokens(batch, sequence)] = logprobs
        self._score_sequences(scores, batch, [i for i in routed if i not in cached])
        return self.context.answer(scores, batch, given, self.evidence)

    def follow(self, batch: RolloutBatch) -> None:
        """`score` on a rank other than 0 of a replica, without sending the result."""
        self.score(batch)

    def _score_sequences(
        self, scores: TokenScores, batch: RolloutBatch, sequences: Sequence[int]
    ) -> None:
        """Write the evidence about these sequences into `scores`, and cache it if possible."""
        first_rows = np.concatenate([[0], np.cumsum(batch.response_lengths)])
        lengths = np.diff(batch.offsets)[list(sequences)].tolist()
        for indices in micro_batches(lengths, self.max_tokens):
            part = [sequences[i] for i in indices]
            rows = np.concatenate([np.arange(first_rows[i], first_rows[i + 1]) for i in part])
            tokens = np.concatenate([response_tokens(batch, i) for i in part])
            hidden = self._states(batch, part)
            fill_scores(scores, self.evidence, batch, hidden, self.head, self.rule, rows, tokens)
            self._remember(scores, batch, part)

    def _remember(self, scores: TokenScores, batch: RolloutBatch, sequences: Sequence[int]) -> None:
        """Cache the log-probs of these sequences if they come from the data."""
        if self.caches and batch.source is Source.data:
            for i in sequences:
                logprobs = scores.logprobs[response_tokens(batch, i)]
                self.cached[data_key(batch, i)] = logprobs.copy()

    def _nbytes(self, scores: TokenScores) -> dict[str, int]:
        """The bytes that are sent, by name: of the rows, and of the drawn tokens' log-probs."""
        drawn = {"teacher_logprobs": scores.logprobs.nbytes}
        if not self.evidence.name:
            return drawn
        return {self.evidence.name: scores.rows.nbytes + scores.support_ids.nbytes} | drawn

    def _states(self, batch: RolloutBatch, sequences: Sequence[int]) -> Tensor:
        """[R', H] the last hidden state before each response token. The sequences are padded on the
        right.
        """
        parts = [batch.trajectory(i) for i in sequences]
        width = max(len(part.input_ids) for part in parts)
        ids = np.zeros((len(parts), width), np.int64)
        mask = np.zeros_like(ids)
        positions = np.tile(np.arange(width), (len(parts), 1))
        for row, part in enumerate(parts):
            ids[row, : len(part.input_ids)] = part.input_ids
            mask[row, : len(part.input_ids)] = 1
        states = self.model.states(
            self._on_device(ids), self._on_device(mask), self._on_device(positions)
        )
        before = [
            row * width + np.flatnonzero(part.response_mask) - 1 for row, part in enumerate(parts)
        ]
        return states.flatten(0, 1).index_select(0, self._on_device(np.concatenate(before)))

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _is_routed(self, batch: RolloutBatch, sequence: int) -> bool:
        return takes(self.route, batch.columns[sequence // batch.group_size])

    def _cached(self, batch: RolloutBatch, sequences: Sequence[int]) -> dict[int, np.ndarray]:
        """The cached log-probs [r] by the index of the sequence, for sequences that have some."""
        if not self.caches or batch.source is not Source.data:
            return {}
        keys = {i: data_key(batch, i) for i in sequences}
        return {i: self.cached[key] for i, key in keys.items() if key in self.cached}

    # -- checkpoint --------------------------------------------------------------------------------

    def state_bytes(self) -> int:
        """The size of the cached log-probs in bytes."""
        return sum(logprobs.nbytes for logprobs in self.cached.values())

    def save_state(self, folder: str, replica: int, replicas: int) -> list[SavedFile]:
        """Write the cached log-probs to a file, if there are any.

        They are saved because a log-prob that is computed again, in a micro-batch with other
        sequences, could differ in its last bit.

        Raises:
            CheckpointError: the file cannot be written.
        """
        if not self.cached:
            return []
        path = Path(folder) / f"scorer-{self.teacher}-{replica:05d}-of-{replicas:05d}.safetensors"
        try:
            save_file(self.cached, path, {"identity": self.identity})
            return [seal(path)]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: {self.state_bytes()} bytes could not be written: {error}"
            ) from error

    def load_state(self, folder: str, replica: int, replicas: int) -> list[SavedFile]:
        """Load the log-probs that this replica cached, or those of all replicas if the number of
        replicas has changed. Log-probs of another teacher, dtype or temperature are not loaded.

        Raises:
            CheckpointError: a file cannot be read as safetensors.
        """
        all_files = sorted(Path(folder).glob(f"scorer-{self.teacher}-?????-of-?????.safetensors"))
        same_count = [path for path in all_files if path.stem.endswith(f"-of-{replicas:05d}")]
        self.cached = {}
        for path in (
            [p for p in same_count if p.stem.endswith(f"-{replica:05d}-of-{replicas:05d}")]
            if same_count
            else all_files
        ):
            try:
                with safe_open(path, framework="numpy") as file:
                    if (file.metadata() or {}).get("identity") == self.identity:
                        names = file.keys()
                        self.cached |= {name: file.get_tensor(name) for name in names}
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path}: is not a readable safetensors file: {error}"
                ) from error
        return []


def data_key(batch: RolloutBatch, sequence: int) -> str:
    """A key of one response of the data, the same in every epoch: the digest of its tokens,
    including those of the prompt, and of its mask.
    """
    part = batch.trajectory(sequence)
    return hashlib.sha256(part.input_ids.tobytes() + part.response_mask.tobytes()).hexdigest()


def response_tokens(batch: RolloutBatch, sequence: int) -> np.ndarray:
    """[r] int64, the indices of a sequence's response tokens in the per-token columns."""
    start = int(batch.offsets[sequence])
    end = int(batch.offsets[sequence + 1])
    return start + np.flatnonzero(batch.response_mask[start:end])
