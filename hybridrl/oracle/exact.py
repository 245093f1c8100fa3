"""The claim of a row: a plain function of the student's logits, whose gradient the row estimates.

The gradient is computed by finite differences. The function follows the definitions, with
probabilities and sums over all sequences; it shares no code with the code under test.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from hybridrl.oracle.mdp import Mdp
from hybridrl.settings.algorithm import AlgorithmConfig
from hybridrl.settings.choices import Correction, Divergence, Source, SupportSource


class Target(StrEnum):
    """The gradient of J = E[ sum_t sum_i w_i D_i - lambda R ] that a method estimates."""

    objective = "grad J"  # the whole gradient
    semi_gradient = "semi-gradient"  # the visited prefixes of the imitation term are held fixed
    support = "K-token divergence"  # the semi-gradient with D_i over the K tokens alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The scalar function whose gradient at the student's logits a row claims to estimate."""

    mdp: Mdp
    algorithm: AlgorithmConfig
    target: Target
    weights: tuple[float, ...]  # w_i
    reward_weight: float  # lambda
    shares: Mapping[Source, float]  # the share of the sequences by source

    def value(self, logits: Tensor) -> Tensor:
        """The value [] of the function at the student's logits [P, V]."""
        mdp = self.mdp
        total = torch.zeros((), dtype=logits.dtype)
        for source, share in self.shares.items():
            writer = author(mdp, source)
            if source is Source.student:
                total = (
                    total
                    - share * self.reward_weight * (mdp.probability(logits) * self._rewards()).sum()
                )
            else:
                total = (
                    total
                    - share
                    * self.algorithm.nll_weight
                    * (mdp.probability(writer) * mdp.token_logp(logits).sum(1)).sum()
                )
            fixed = self.target is not Target.objective or source is not Source.student
            visits = mdp.visits(writer if fixed else logits)
            for weight, teacher in zip(self.weights, mdp.teachers, strict=False):
                total = total + share * weight * (visits * self._divergence(logits, teacher)).sum()
        return total

    def gradient(self) -> Tensor:
        """The gradient [P, V] by central differences, with an error of about 1e-10."""
        return finite_differences(self.value, self.mdp.student)

    def _divergence(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """[P] the divergence from a teacher at each prefix, for Target.support over K tokens."""
        p = self.mdp.logp(logits).exp()
        q = self.mdp.logp(teacher).exp()
        if self.target is not Target.support:
            return divergence(p, q, self.algorithm)
        top = teacher if self.algorithm.topk.source is SupportSource.teacher else self.mdp.sampler
        ids = top.topk(self.algorithm.topk.k).indices
        p = p.gather(1, ids)
        q = q.gather(1, ids)
        match self.algorithm.topk.correction:
            case Correction.renormalize:
                p = p / p.sum(1, keepdim=True)
                q = q / q.sum(1, keepdim=True)
            case Correction.tail_bucket:
                p, q = (torch.cat([x, 1 - x.sum(1, keepdim=True)], 1) for x in (p, q))
        return divergence(p, q, self.algorithm)

    def _rewards(self) -> Tensor:
        """[S] rewards with DAPO's penalty: 0 up to (longest - buffer) tokens, -1 at the longest."""
        mdp = self.mdp
        buffer = self.algorithm.overlong_buffer
        if not buffer:
            return mdp.rewards
        return mdp.rewards - torch.clamp(
            (mdp.lengths - (mdp.mask.shape[1] - buffer)) / buffer, 0, 1
        )


def divergence(p: Tensor, q: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """[P] the divergence between probabilities p and q, [P, n] each."""
    match algorithm.divergence:
        case Divergence.reverse_kl:
            return (p * (p / q).log()).sum(1)
        case Divergence.forward_kl:
            return (q * (q / p).log()).sum(1)
        case Divergence.jsd:
            m = algorithm.jsd_beta * q + (1 - algorithm.jsd_beta) * p
            return algorithm.jsd_beta * (q * (q / m).log()).sum(1) + (1 - algorithm.jsd_beta) * (
                p * (p / m).log()
            ).sum(1)


def author(mdp: Mdp, source: Source) -> Tensor:
    """[P, V] the logits of the policy that writes the sequences of a source."""
    return {Source.student: mdp.sampler, Source.teacher: mdp.teachers[0], Source.data: mdp.data}[
        source
    ]


def finite_differences(
    function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5
) -> Tensor:
    """Central differences of a scalar function by each entry of `at`, in the shape of `at`."""
    gradient = torch.zeros_like(at)
    for entry in np.ndindex(*at.shape):
        up = at.clone()
        down = at.clone()
        up[entry] += step
        down[entry] -= step
        gradient[entry] = (function(up) - function(down)) / (2 * step)
    return gradient
