"""Responses that a model samples in this process."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reproduction.task import COUNTDOWN, P, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One response for each of N problems; T tokens with the padding, R of them of responses."""

    sequences: Tensor  # [N, T] int64, the prompts padded on the left, the responses on the right
    attended: Tensor  # [N, T] bool, without the padding
    counted: Tensor  # [N, R] bool, the tokens of the response, its end token included
    ended: Sequence[bool]  # N: with an end token
    texts: Sequence[str]  # N
    rewards: Sequence[float]  # N, 0 or 1

    @property
    def responses(self) -> Tensor:
        """[N, R]"""
        return self.sequences[:, -self.counted.shape[1] :]

    def log_probs(self, model: PreTrainedModel) -> Tensor:
        """Of the whole vocabulary at each token of the responses, [N, R, V]."""
        positions = (self.attended.long().cumsum(dim=1) - 1).clamp(min=0)
        logits = model(
            input_ids=self.sequences,
            attention_mask=self.attended.long(),
            position_ids=positions,
        ).logits
        return logits[:, -self.counted.shape[1] - 1 : -1].log_softmax(dim=-1)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[P],
    task: Task[P] = COUNTDOWN,
) -> Sampled:
    """At temperature 1, by torch's global generator."""
    prompts = tokenizer(
        [problem.prompt for problem in problems],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    sequences = model.generate(
        input_ids=prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        max_new_tokens=task.max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    responses = sequences[:, prompts["input_ids"].shape[1] :]
    is_end = responses == tokenizer.eos_token_id
    counted = is_end.cumsum(dim=1) - is_end.long() == 0
    answers = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return Sampled(
        sequences=sequences,
        attended=torch.cat([prompts["attention_mask"].bool(), counted], dim=1),
        counted=counted,
        ended=is_end.any(dim=1).tolist(),
        texts=answers,
        rewards=task.rewards(answers, problems),
    )
