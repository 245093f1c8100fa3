"""A trained model against its teacher on held-out problems, the same for every arm.

It is independent of the run's own statistics, which an arm without a teacher does not have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from countdown_models import greedy_answers

from hybridrl.models.loading import load_model, load_tokenizer
from reproduction.sampling import sample
from reproduction.task import COUNTDOWN, P, Task

BATCH = 512  # responses that are sampled at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """Means over held-out problems, and what they are made from."""

    greedy: float  # share of right answers at temperature 0
    reward: float  # share of right answers at temperature 1
    divergence: float  # KL(student || teacher) of a response at temperature 1, in nats
    texts: Sequence[str]  # the responses at temperature 1, those of a problem in succession


@torch.no_grad()
def examine(
    student: str | Path,
    teacher: str,
    task: Task[P] = COUNTDOWN,
    *,
    problems: int = 512,
    samples: int = 4,
) -> Examination:
    """Sample responses with a constant seed, and compute KL(student || teacher) exactly at each of
    their tokens, the end token included.

    Args:
        student, teacher: as model.path; both with the tokenizer of the student.
        problems: the first held-out ones of the task.
        samples: of each problem, for `reward` and `divergence`.
    """
    tokenizer = load_tokenizer(str(student))
    policy = load_model(str(student))
    frozen = load_model(teacher)
    heldout = task.heldout(problems)
    prompts = [problem.prompt for problem in heldout]
    answers = greedy_answers(policy, tokenizer, prompts, task.max_new_tokens)
    repeated = [problem for problem in heldout for _ in range(samples)]
    rewards: list[float] = []
    texts: list[str] = []
    divergence = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for start in range(0, len(repeated), BATCH):
            sampled = sample(policy, tokenizer, repeated[start : start + BATCH], task)
            rewards += sampled.rewards
            texts += sampled.texts
            log_p = sampled.log_probs(policy)
            each = (log_p.exp() * (log_p - sampled.log_probs(frozen))).sum(dim=-1)
            divergence += (each * sampled.counted).sum().item()
    return Examination(
        greedy=_mean(task.rewards(answers, heldout)),
        reward=_mean(rewards),
        divergence=divergence / len(repeated),
        texts=texts,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
