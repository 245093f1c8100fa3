"""A frozen teacher: hidden states and log-probs of tokens that somebody else sampled."""

import time

import numpy as np
import torch

from hybridrl.config import RunSettings
from hybridrl.data.collate import to_wire
from hybridrl.data.shards import micro_batches
from hybridrl.models.loading import load_model
from hybridrl.objectives.hybrid import HybridObjective, Signal
from hybridrl.ops.head import chosen_logprobs
from hybridrl.types import RolloutBatch, ScoreHeader, TokenScores, per_token_bytes
from hybridrl.workers.student import output_weight


class Scorer:
    """One replica of one teacher.

    It sends its last hidden state per response token; the learner holds the teacher's lm_head. log q(y_t), which
    costs a pass over the vocabulary here, is made only when the objective's returns need it (gamma > 0).
    """

    def __init__(self, settings: RunSettings, *, teacher: str, device: str) -> None:
        config = settings.teachers[teacher]
        self.teacher, self.device = teacher, torch.device(device)
        revision = None if config.path else settings.model.revision
        self.model = load_model(config.path or settings.model.path, config.dtype, revision).to(self.device).eval()
        self.head = output_weight(self.model)
        self.temperature, self.head_chunk = settings.algorithm.temperature, settings.train.head_chunk
        self.max_tokens = settings.scorer.max_tokens_per_micro_batch
        self.wants_logprobs = Signal.teacher_logprobs in HybridObjective(settings.algorithm, 1).signals

    def ping(self) -> str:
        return self.teacher

    @torch.no_grad()
    def score(self, batch: RolloutBatch) -> tuple[ScoreHeader, TokenScores]:
        """One forward pass over every sequence: logprobs [T] (0 unless gamma > 0) and hidden [R, H] in batch order."""
        started = time.monotonic()
        lengths = np.diff(batch.offsets)
        rows = np.concatenate([[0], np.cumsum(batch.response_lengths)])
        hidden = torch.empty(int(rows[-1]), self.head.shape[1], dtype=self.head.dtype)
        logprobs = np.zeros(len(batch.input_ids), np.float32)
        for indices in micro_batches(lengths.tolist(), self.max_tokens):
            for i, states in zip(indices, self._forward(batch, indices), strict=True):
                span = slice(int(batch.offsets[i]), int(batch.offsets[i + 1]))
                at = np.flatnonzero(batch.response_mask[span])
                picked = states[torch.from_numpy(at - 1).to(self.device)]  # [r, H], the state that predicts each token
                hidden[int(rows[i]) : int(rows[i + 1])] = picked.cpu()
                if self.wants_logprobs:
                    ids = torch.from_numpy(batch.input_ids[span][at].astype(np.int64)).to(self.device)
                    logprobs[span][at] = chosen_logprobs(picked, self.head, ids, temperature=self.temperature, chunk=self.head_chunk).cpu()
        scores = TokenScores(teacher=self.teacher, logprobs=logprobs, hidden=to_wire(hidden))
        return ScoreHeader(teacher=self.teacher, nbytes=per_token_bytes(scores), score_s=time.monotonic() - started), scores

    def _forward(self, batch: RolloutBatch, indices: list[int]) -> torch.Tensor:
        """[B, T, H] last hidden states, padded on the right."""
        parts = [batch.input_ids[int(batch.offsets[i]) : int(batch.offsets[i + 1])] for i in indices]
        width = max(map(len, parts))
        ids = np.zeros((len(parts), width), np.int64)
        mask = np.zeros_like(ids)
        for b, part in enumerate(parts):
            ids[b, : len(part)], mask[b, : len(part)] = part, 1
        to = lambda a: torch.from_numpy(a).to(self.device)  # noqa: E731
        return self.model.base_model(input_ids=to(ids), attention_mask=to(mask), use_cache=False).last_hidden_state
