"""A frozen teacher: hidden states and log-probs of tokens that somebody else wrote."""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from hybridrl.batch.balance import micro_batches
from hybridrl.batch.micro_batch import to_wire
from hybridrl.core import failpoints
from hybridrl.core.errors import CheckpointError
from hybridrl.kernels.head import chosen_logprobs, top_logprobs, vocabulary_logprobs
from hybridrl.models.decoder_layers import compile_layers
from hybridrl.models.loading import head_rows, load_model
from hybridrl.models.output_head import output_weight
from hybridrl.objectives import make_objective
from hybridrl.objectives.credit import ROWS, Signal
from hybridrl.policy.student import head_rule
from hybridrl.run_dir.saved_file import seal
from hybridrl.settings.choices import Source, SupportSource
from hybridrl.settings.run import RunSettings
from hybridrl.types import RolloutBatch, SavedFile, ScoreHeader, TokenScores


class Scorer:
    """One replica of one teacher.

    For a dense term over the whole vocabulary it sends its last hidden state per response token;
    the learner holds the teacher's lm_head. Passes over the vocabulary here are made only for what
    the objective asks: log q(y_t), the log-probs of a support, or of everything. Log-probs of data
    are computed once and remembered.
    """

    def __init__(self, settings: RunSettings, *, teacher: str, device: str) -> None:
        model = settings.teacher_model(teacher)
        self.teacher, self.device = teacher, torch.device(device)
        setting = settings.model_setting(teacher)
        loaded = load_model(model.path, model.dtype, model.revision, setting=setting)
        self.model = loaded.to(self.device).eval()
        compile_layers(
            self.model, tokens=settings.rollout.max_model_len, packed=False, learns=False
        )
        # Rows past the student's vocabulary are padding: no probability may stand on them.
        self.head = output_weight(self.model, setting=f"{setting}={model.path}")[
            : head_rows(settings.model.path, settings.model.revision)
        ]
        self.configure(settings)

    def configure(self, settings: RunSettings) -> None:
        """Answer what other settings ask for from here on. The teacher stays."""
        self.route = settings.teachers[self.teacher].route
        model, self.rule, self.topk = (
            settings.teacher_model(self.teacher),
            head_rule(settings),
            settings.algorithm.topk,
        )
        # what log q depends on besides the tokens
        self.identity = f"{model.path} {model.revision} {model.dtype} {self.rule.temperature}"
        self.max_tokens = settings.scorer.max_tokens_per_micro_batch
        self.signals = make_objective(settings).signals
        self.remembers = self.signals & ROWS == frozenset()
        self.remembered: dict[str, np.ndarray] = {}  # data_key -> [r] log q

    def ping(self) -> str:
        return self.teacher

    @torch.no_grad()
    def score(self, batch: RolloutBatch) -> tuple[ScoreHeader, TokenScores]:
        """One forward pass over every sequence whose prompt is routed here; the rest stays 0."""
        failpoints.hit("scorer.score", uid=batch.uids[0])
        started = time.monotonic()
        first_row = np.concatenate([[0], np.cumsum(batch.response_lengths)])
        scores = self._empty(batch, int(first_row[-1]))
        asked = [
            i
            for i in range(batch.num_sequences)
            if self._is_asked(batch, i) and not self._remembers(batch, i, scores.logprobs)
        ]
        lengths = np.diff(batch.offsets)[asked].tolist()
        for indices in micro_batches(lengths, self.max_tokens):
            sequences = [asked[i] for i in indices]
            rows = np.concatenate([np.arange(first_row[i], first_row[i + 1]) for i in sequences])
            tokens = np.concatenate([response_tokens(batch, i) for i in sequences])
            self._fill(scores, batch, self._states(batch, sequences), rows, tokens)
            for i in sequences:
                self._remember(batch, i, scores.logprobs)
        return ScoreHeader(
            teacher=self.teacher, nbytes=self._nbytes(scores), score_s=time.monotonic() - started
        ), scores

    def _nbytes(self, scores: TokenScores) -> dict[str, int]:
        """Of what travels, by signal: rows are of one, a number a token of another."""
        rows = {
            str(signal): scores.rows.nbytes + scores.support_ids.nbytes
            for signal in self.signals & ROWS
        }
        return rows | {str(Signal.teacher_logprobs): scores.logprobs.nbytes}

    def _empty(self, batch: RolloutBatch, num_rows: int) -> TokenScores:
        width, support = 0, 0
        if Signal.teacher_hidden in self.signals:
            width = self.head.shape[1]
        elif Signal.teacher_vocabulary in self.signals:
            width = self.head.shape[0]
        elif Signal.teacher_support in self.signals:
            width = support = self.topk.k
        states = Signal.teacher_hidden in self.signals and self.head.dtype == torch.bfloat16
        return TokenScores(
            teacher=self.teacher,
            logprobs=np.zeros(len(batch.input_ids), np.float32),
            rows=np.zeros((num_rows, width), np.uint16 if states else np.float32),
            support_ids=np.tile(
                np.arange(support, dtype=np.int32), (num_rows, 1)
            ),  # distinct, where nobody asks
        )

    def _fill(
        self,
        scores: TokenScores,
        batch: RolloutBatch,
        states: Tensor,
        rows: np.ndarray,
        tokens: np.ndarray,
    ) -> None:
        """Write what the signals ask of R' tokens. states [R', H]; rows, tokens [R'] where they are
        in rows and columns.
        """
        head, rule = self.head, self.rule
        if Signal.teacher_hidden in self.signals:
            scores.rows[rows] = to_wire(states.to(head.dtype).cpu())
        elif Signal.teacher_vocabulary in self.signals:
            scores.rows[rows] = vocabulary_logprobs(states, head, rule).cpu().numpy()
        drawn = torch.from_numpy(batch.input_ids[tokens].astype(np.int64)).to(self.device)[:, None]
        if Signal.teacher_support in self.signals:
            if self.topk.source is SupportSource.teacher:
                ids = top_logprobs(states, head, self.topk.k, rule)[0]
            else:
                ids = torch.from_numpy(batch.support_ids[rows].astype(np.int64)).to(self.device)
            scores.support_ids[rows] = ids.cpu().numpy()
            found = chosen_logprobs(states, head, torch.cat([ids, drawn], 1), rule).cpu().numpy()
            scores.rows[rows], scores.logprobs[tokens] = found[:, :-1], found[:, -1]
        elif Signal.teacher_logprobs in self.signals:
            scores.logprobs[tokens] = chosen_logprobs(states, head, drawn, rule)[:, 0].cpu().numpy()

    def _states(self, batch: RolloutBatch, sequences: Sequence[int]) -> Tensor:
        """[R', H] the last hidden state before each response token; sequences padded on the
        right.
        """
        parts = [batch.trajectory(i) for i in sequences]
        width = max(len(part.input_ids) for part in parts)
        ids, mask = (np.zeros((len(parts), width), np.int64) for _ in range(2))
        positions = np.tile(np.arange(width), (len(parts), 1))
        for b, part in enumerate(parts):
            ids[b, : len(part.input_ids)], mask[b, : len(part.input_ids)] = part.input_ids, 1

        def to(a):
            return torch.from_numpy(a).to(self.device)

        inputs = {"input_ids": to(ids), "attention_mask": to(mask), "position_ids": to(positions)}
        states = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        before = np.concatenate(
            [b * width + np.flatnonzero(part.response_mask) - 1 for b, part in enumerate(parts)]
        )
        return states.flatten(0, 1).index_select(0, to(before))

    def _is_asked(self, batch: RolloutBatch, sequence: int) -> bool:
        columns = batch.columns[sequence // batch.group_size]
        return all(columns.get(key) == value for key, value in self.route.items())

    # -- data is scored once -----------------------------------------------------------------------

    def _remembers(self, batch: RolloutBatch, sequence: int, logprobs: np.ndarray) -> bool:
        if not self.remembers or batch.source is not Source.data:
            return False
        known = self.remembered.get(data_key(batch, sequence))
        if known is None:
            return False
        logprobs[response_tokens(batch, sequence)] = known
        return True

    def _remember(self, batch: RolloutBatch, sequence: int, logprobs: np.ndarray) -> None:
        if batch.source is Source.data and self.remembers:
            self.remembered[data_key(batch, sequence)] = logprobs[
                response_tokens(batch, sequence)
            ].copy()

    # -- checkpoint --------------------------------------------------------------------------------

    def state_bytes(self) -> int:
        return sum(known.nbytes for known in self.remembered.values())

    def save_state(self, folder: str, replica: int, replicas: int) -> list[SavedFile]:
        """What it remembers, if anything: computed again in other company, a log-prob could differ
        in its last bit.

        Raises:
            CheckpointError: the file cannot be written.
        """
        if not self.remembered:
            return []
        path = Path(folder) / f"scorer-{self.teacher}-{replica:05d}-of-{replicas:05d}.safetensors"
        try:
            save_file(self.remembered, path, {"identity": self.identity})
            return [seal(path)]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: {self.state_bytes()} bytes could not be written: {error}"
            ) from error

    def load_state(self, folder: str, replica: int, replicas: int) -> list[SavedFile]:
        """What this replica remembered; where there were more or fewer replicas, what any of them
        did. Nothing, where the teacher was another one, or the distribution that it was asked for.

        Raises:
            CheckpointError: a file is none of ours.
        """
        every = sorted(Path(folder).glob(f"scorer-{self.teacher}-?????-of-?????.safetensors"))
        alike = [path for path in every if path.stem.endswith(f"-of-{replicas:05d}")]
        self.remembered = {}
        for path in (
            [p for p in alike if p.stem.endswith(f"-{replica:05d}-of-{replicas:05d}")]
            if alike
            else every
        ):
            try:
                with safe_open(path, framework="numpy") as file:
                    if (file.metadata() or {}).get("identity") == self.identity:
                        self.remembered |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: no safetensors file: {error}") from error
        return []


def data_key(batch: RolloutBatch, sequence: int) -> str:
    """A response to a prompt of the data, by their tokens and which of these are the response: the
    same in every epoch.
    """
    part = batch.trajectory(sequence)
    return hashlib.sha256(part.input_ids.tobytes() + part.response_mask.tobytes()).hexdigest()


def response_tokens(batch: RolloutBatch, sequence: int) -> np.ndarray:
    """Indices of a sequence's response tokens in the per-token columns."""
    start, end = int(batch.offsets[sequence]), int(batch.offsets[sequence + 1])
    return start + np.flatnonzero(batch.response_mask[start:end])
