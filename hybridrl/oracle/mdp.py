"""A language model that can be enumerated: a row of logits for each prefix, and all sequences.

Letters: V vocabulary, T longest response, P prefixes, S sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Mdp:
    """Logits of student, sampler, teachers and the policy that wrote the data, and rewards; all
    float64.

    Example: V=5, T=3 without an end token has 31 prefixes and 125 sequences; V=4, T=4 where token 3
    ends a sequence has 40 and 121.
    """

    student: Tensor  # [P, V]
    old: Tensor  # [P, V] the student before the first update of the batch that it learns from
    # [P, V] the policy that writes the student's sequences: the old student, or one near it
    sampler: Tensor
    teachers: tuple[Tensor, ...]  # [P, V] each
    data: Tensor  # [P, V] the policy that wrote the data
    values: Tensor  # [P] random outputs of a value head at each prefix
    rewards: Tensor  # [S] 0 or 1, both occur
    tokens: Tensor  # [S, T] int64, 0 past the end
    mask: Tensor  # [S, T] bool
    prefixes: Tensor  # [S, T] int64, row of the prefix before each token, 0 past the end
    temperature: float = 1.0  # of every policy

    @property
    def lengths(self) -> Tensor:  # [S]
        return self.mask.sum(1)

    def logp(self, logits: Tensor) -> Tensor:
        """[P, V] -> [P, V] log-probabilities."""
        return torch.log_softmax(logits / self.temperature, -1)

    def token_logp(self, logits: Tensor) -> Tensor:
        """[S, T] log-probability of each token, 0 past the end."""
        return torch.where(self.mask, self.logp(logits)[self.prefixes, self.tokens], 0.0)

    def probability(self, logits: Tensor) -> Tensor:
        """[S] the probability of each sequence; they sum to 1."""
        return self.token_logp(logits).sum(1).exp()

    def visits(self, logits: Tensor) -> Tensor:
        """[P] the probability that a sequence of this policy has a token after the prefix."""
        weight = torch.where(self.mask, self.probability(logits)[:, None], 0.0)
        return torch.zeros(len(logits), dtype=weight.dtype).index_add_(
            0, self.prefixes.flatten(), weight.flatten()
        )


def make_mdp(
    *,
    seed: int,
    vocabulary: int,
    horizon: int,
    ends: bool,
    sampler_distance: float = 0.0,
    learned: float = 0.0,
    moved: float = 0.0,
) -> Mdp:
    """A random model.

    The random numbers are drawn in this order: the student's logits N(0,1), the teacher's 1.5
    N(0,1), the rewards (1 with probability 0.3), the sampler's distance from the student, the
    logits of a second teacher and of the data, the values, and the distance of the old student.
    Prefixes and sequences are sorted by length, then lexicographically.

    Args:
        ends: whether the last token of the vocabulary ends a sequence; if not, all sequences have
            `horizon` tokens. If so, the teachers' logits are drawn around the student's, since
            otherwise the cost of a sequence would mostly depend on whether it ends.
        sampler_distance: standard deviation of the sampler's logits around the old student's; 0:
            the sampler is the old student.
        learned: the share of the way to the first teacher's logits that the student has moved, in
            [0, 1].
        moved: standard deviation of the old student's logits around the student's; 0: the two are
            equal, as in the first update of a batch.
    """
    prefixes, sequences = enumerated(vocabulary, horizon, ends=ends)
    rng = np.random.default_rng(seed)

    def table() -> Tensor:
        return torch.from_numpy(rng.standard_normal((len(prefixes), vocabulary)))

    student = table()
    near = student if ends else torch.zeros_like(student)
    teacher = near + 1.5 * table()
    uniform = rng.random(len(sequences))
    rewarded = ((uniform < 0.3) | (uniform == uniform.min())) & (uniform != uniform.max())
    distance = sampler_distance * table()
    second = near + 1.5 * table()
    data = table()
    student = student + learned * (teacher - student)
    values = torch.from_numpy(rng.standard_normal(len(prefixes)))
    old = student + moved * table()
    tokens, mask, rows = sequence_tensors(prefixes, sequences, horizon)
    return Mdp(
        student=student,
        old=old,
        sampler=old + distance,
        teachers=(teacher, second),
        data=data,
        values=values,
        rewards=torch.from_numpy(rewarded.astype(np.float64)),
        tokens=tokens,
        mask=mask,
        prefixes=rows,
    )


def enumerated(
    vocabulary: int, horizon: int, *, ends: bool
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """All prefixes and all sequences, each sorted by length, then lexicographically.

    Args:
        ends: as in make_mdp.
    """
    going = range(vocabulary - 1 if ends else vocabulary)
    prefixes = [p for length in range(horizon) for p in product(going, repeat=length)]
    stopped = [(*p, vocabulary - 1) for p in prefixes] if ends else []
    sequences = sorted(stopped + list(product(going, repeat=horizon)), key=lambda y: (len(y), y))
    return prefixes, sequences


def sequence_tensors(
    prefixes: Sequence[tuple[int, ...]], sequences: Sequence[tuple[int, ...]], horizon: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields tokens, mask and prefixes of Mdp, each [S, T]."""
    row = {prefix: i for i, prefix in enumerate(prefixes)}

    def pad(values: Sequence[int]) -> list[int]:
        return [*values, *[0] * (horizon - len(values))]

    tokens = torch.tensor([pad(y) for y in sequences])
    mask = torch.tensor([pad([True] * len(y)) for y in sequences], dtype=torch.bool)
    rows = torch.tensor([pad([row[y[:t]] for t in range(len(y))]) for y in sequences])
    return tokens, mask, rows
