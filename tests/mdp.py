"""A language model small enough to enumerate: 5 tokens, 3 steps, 31 prefixes, one logit row per prefix, float64.

Its 125 sequences, weighted by their probability, give every expectation exactly, so that the production ops can be
held against finite differences of J and not against another estimate.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from hybridrl.ops.head import HeadRule, TokenTerms, hybrid_head_loss
from hybridrl.ops.returns import future_cost
from hybridrl.ops.teachers import HiddenTeacher

VOCABULARY, HORIZON, REWARD_WEIGHT = 5, 3, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mdp:
    """One student, one teacher, one reward per sequence. S = 125 sequences, P = 31 prefixes."""

    student: Tensor  # [P, V] float64 logits
    teacher: Tensor  # [P, V] float64 logits
    rewards: Tensor  # [S] float64, 0 or 1
    sequences: Tensor  # [S, T] int64
    prefixes: Tensor  # [S, T] int64, row of the prefix before each token


def exact_mdp() -> Mdp:
    """Draws from default_rng(0): student logits, teacher logits x 1.5, rewards below 0.3; prefixes by length, then in order."""
    prefixes = [p for length in range(HORIZON) for p in product(range(VOCABULARY), repeat=length)]
    row = {prefix: i for i, prefix in enumerate(prefixes)}
    sequences = list(product(range(VOCABULARY), repeat=HORIZON))
    rng = np.random.default_rng(0)
    student = rng.standard_normal((len(prefixes), VOCABULARY))
    teacher = 1.5 * rng.standard_normal((len(prefixes), VOCABULARY))
    rewards = (rng.random(len(sequences)) < 0.3).astype(np.float64)
    return Mdp(
        student=torch.from_numpy(student),
        teacher=torch.from_numpy(teacher),
        rewards=torch.from_numpy(rewards),
        sequences=torch.tensor(sequences),
        prefixes=torch.tensor([[row[y[:t]] for t in range(HORIZON)] for y in sequences]),
    )


def token_logprobs(logits: Tensor, mdp: Mdp) -> Tensor:
    """[S, T] log-probability of each token of each sequence."""
    return torch.log_softmax(logits, -1)[mdp.prefixes, mdp.sequences]


def sequence_probability(mdp: Mdp) -> Tensor:
    """[S], sums to 1."""
    return token_logprobs(mdp.student, mdp).sum(1).exp()


def expected_reward(logits: Tensor, mdp: Mdp) -> Tensor:
    return (token_logprobs(logits, mdp).sum(1).exp() * mdp.rewards).sum()


def expected_kl(logits: Tensor, mdp: Mdp) -> Tensor:
    ours = token_logprobs(logits, mdp).sum(1)
    return (ours.exp() * (ours - token_logprobs(mdp.teacher, mdp).sum(1))).sum()


def objective(logits: Tensor, mdp: Mdp) -> Tensor:
    """J = E[sum_t c_t - lambda R], by enumeration."""
    return expected_kl(logits, mdp) - REWARD_WEIGHT * expected_reward(logits, mdp)


def finite_differences(function, logits: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a scalar function, one entry at a time: same shape as `logits`."""
    gradient = torch.zeros_like(logits)
    for at in np.ndindex(*logits.shape):
        up, down = logits.clone(), logits.clone()
        up[at] += step
        down[at] -= step
        gradient[at] = (function(up) - function(down)) / (2 * step)
    return gradient


def production_gradient(mdp: Mdp, gamma: float, *, imitate: bool = True, chunk: int = 1024) -> Tensor:
    """[P, V] what the head op and future_cost make of all sequences, each weighted by its probability.

    A one-hot hidden state over prefixes and lm_head = logits^T make the op's logits the table itself.
    """
    costs = token_logprobs(mdp.student, mdp) - token_logprobs(mdp.teacher, mdp)
    returns = future_cost(costs, torch.ones_like(costs, dtype=torch.bool), gamma) - REWARD_WEIGHT * mdp.rewards[:, None]
    hidden = torch.eye(len(mdp.student), dtype=torch.float64)[mdp.prefixes.flatten()]  # [S*T, P]
    lm_head = mdp.student.T.clone().requires_grad_()
    terms = TokenTerms(
        token_ids=mdp.sequences.flatten(),
        token_weight=sequence_probability(mdp).repeat_interleave(HORIZON),
        sparse=returns.flatten(),
        sampler_logprobs=token_logprobs(mdp.student, mdp).flatten(),
    )
    teachers = (HiddenTeacher(hidden=hidden, lm_head=mdp.teacher.T, weight=torch.ones(len(hidden))),) if imitate else ()
    loss, _ = hybrid_head_loss(hidden, lm_head, teachers, terms, HeadRule(chunk=chunk))
    loss.backward()
    return lm_head.grad.T
