"""The ways a teacher's distribution reaches the head pass, one row per response token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridrl.choices import Correction
from hybridrl.ops.divergence import Measure, dense, dense_on_support


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenTeacher:
    """Last hidden states; the distribution is rebuilt chunk by chunk."""

    hidden: Tensor  # [R, Ht] last hidden state before each token
    lm_head: Tensor  # [V, Ht] or longer: rows past the student's vocabulary are padding
    weight: Tensor  # [R] w_i of each token

    def compare(self, at: slice, logp: Tensor, measure: Measure, temperature: float) -> tuple[Tensor, Tensor]:
        """Divergence [c] and its logit gradient [c, V] of rows `at`, given log p [c, V]."""
        return dense(logp, self.distribution(at, logp, temperature), measure)

    def distribution(self, at: slice, logp: Tensor, temperature: float) -> Tensor:
        """[c, V] log q over the student's vocabulary."""
        return log_softmax(self.hidden[at], self.lm_head[: logp.shape[-1]], temperature).to(logp.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyTeacher:
    """Log-probs of the whole vocabulary."""

    logprobs: Tensor  # [R, V] log q
    weight: Tensor  # [R]

    def compare(self, at: slice, logp: Tensor, measure: Measure, temperature: float) -> tuple[Tensor, Tensor]:
        return dense(logp, self.distribution(at, logp, temperature), measure)

    def distribution(self, at: slice, logp: Tensor, temperature: float) -> Tensor:
        return self.logprobs[at].to(logp.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportTeacher:
    """Log-probs of K tokens that were chosen without looking at the drawn one."""

    ids: Tensor  # [R, K] int64
    logprobs: Tensor  # [R, K] log q at them
    weight: Tensor  # [R]
    correction: Correction

    def compare(self, at: slice, logp: Tensor, measure: Measure, temperature: float) -> tuple[Tensor, Tensor]:
        return dense_on_support(logp, self.ids[at], self.logprobs[at].to(logp.dtype), measure, self.correction)


Teacher = HiddenTeacher | VocabularyTeacher | SupportTeacher


def log_softmax(hidden: Tensor, lm_head: Tensor, temperature: float) -> Tensor:
    """[c, H] x [V, H] -> [c, V] normalised log-probabilities in fp32 (fp64 for fp64 inputs)."""
    logits = hidden @ lm_head.to(hidden.dtype).T
    return torch.log_softmax(logits.to(softmax_dtype(hidden)) / temperature, dim=-1)


def softmax_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
