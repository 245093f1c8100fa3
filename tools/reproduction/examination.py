"""A trained model against its teacher on held-out Countdown problems, the same for every arm.

It is independent of the run's own statistics, which an arm without a teacher does not have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from countdown_models import greedy_answers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybridrl.data.countdown_puzzles import Countdown, Equation
from hybridrl.models.loading import load_model, load_tokenizer
from hybridrl.rewards.countdown import countdown

MAX_NEW_TOKENS = 16
BATCH = 512  # responses that are sampled at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """Means over held-out problems."""

    greedy: float  # share of right answers at temperature 0
    reward: float  # share of right answers at temperature 1
    divergence: float  # KL(student || teacher) of a response at temperature 1, in nats


@torch.no_grad()
def examine(
    student: str | Path,
    teacher: str,
    *,
    problems: int = 512,
    samples: int = 4,
) -> Examination:
    """Sample responses with a constant seed, and compute KL(student || teacher) exactly at each of
    their tokens, the end token included.

    Args:
        student, teacher: as model.path; both with the tokenizer of the student.
        problems: of data.task=countdown, the first held-out ones.
        samples: of each problem, for `reward` and `divergence`.
    """
    tokenizer = load_tokenizer(str(student), setting="student")
    policy = _load(student)
    frozen = _load(teacher)
    equations = Countdown().heldout(problems)
    answers = greedy_answers(policy, tokenizer, [e.prompt for e in equations], MAX_NEW_TOKENS)
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    repeated = [equation for equation in equations for _ in range(samples)]
    rewards: list[float] = []
    divergence = 0.0
    for start in range(0, len(repeated), BATCH):
        some = repeated[start : start + BATCH]
        sequences, prompt_length = _sample(policy, tokenizer, some)
        texts = tokenizer.batch_decode(sequences[:, prompt_length:], skip_special_tokens=True)
        rewards += _rewards(texts, some)
        divergence += _divergence(policy, frozen, sequences, prompt_length, tokenizer).sum().item()
    torch.set_rng_state(generator_state)
    return Examination(
        greedy=_mean(_rewards(answers, equations)),
        reward=_mean(rewards),
        divergence=divergence / len(repeated),
    )


def _load(path: str | Path) -> PreTrainedModel:
    return load_model(str(path), setting="model")


def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, equations: Sequence[Equation]
) -> tuple[Tensor, int]:
    """Token ids [N, T] with the prompts padded on the left, and the prompts' length."""
    batch = tokenizer(
        [e.prompt for e in equations], padding=True, padding_side="left", return_tensors="pt"
    )
    sequences = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    return sequences, batch["input_ids"].shape[1]


def _divergence(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    sequences: Tensor,
    prompt_length: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Tensor:
    """KL(student || teacher) summed over the tokens of each response, [N]."""
    responses = sequences[:, prompt_length:]
    ended = (responses == tokenizer.eos_token_id).cumsum(dim=1)
    after_end = (ended - (responses == tokenizer.eos_token_id).long()) > 0
    attended = torch.cat([sequences[:, :prompt_length] != tokenizer.pad_token_id, ~after_end], 1)
    positions = (attended.long().cumsum(dim=1) - 1).clamp(min=0)

    def log_probs(model: PreTrainedModel) -> Tensor:
        logits = model(
            input_ids=sequences, attention_mask=attended.long(), position_ids=positions
        ).logits
        return logits[:, prompt_length - 1 : -1].log_softmax(dim=-1)

    log_p = log_probs(student)
    log_q = log_probs(teacher)
    each = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return (each * ~after_end).sum(dim=1)


def _rewards(texts: Sequence[str], equations: Sequence[Equation]) -> list[float]:
    return countdown(
        list(texts), [list(e.numbers) for e in equations], [e.target for e in equations]
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
