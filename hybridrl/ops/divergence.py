"""Per-token divergences between student p and teacher q, and their gradients at the student's
logits.

Every divergence here is a sum over the vocabulary D = sum_v phi(p_v, q_v). With the score a_v = d
phi / d p_v its gradient at the logits is

    dD/dz = p * (a - sum_v p_v a_v)

and a constant added to a changes nothing. The scores below have that constant chosen so that a = 0
where p = q:

    reverse KL  a = log p - log q            forward KL  a = 1 - q / p
    JSD_beta    a = (1 - beta) (log p - log m),  m = beta q + (1 - beta) p

so a drawn token's a_y is also the unbiased score coefficient of the same gradient (f(u) - u f'(u)
with u = q/p, up to that constant), without variance at p = q. References: arXiv 2512.23097
(proposition 4), 2306.13649 (JSD_beta).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridrl.settings.choices import Correction, Divergence


def exp(x: Tensor) -> Tensor:
    """exp, such that the C++ backend of torch.compile computes a reused one again in each loop
    instead of writing it to memory.
    """
    return torch.exp2(x * (1 / math.log(2))) if torch.compiler.is_compiling() else torch.exp(x)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Which divergence, with its constants."""

    divergence: Divergence = Divergence.reverse_kl
    beta: float = 0.5  # of the JSD, in (0, 1)
    log_ratio_clip: float | None = (
        None  # bound of |log p - log q| in the reverse KL; None: no bound
    )

    def score(self, logp: Tensor, logq: Tensor) -> Tensor:
        """a = d phi / d p, 0 where p = q; elementwise on log-probabilities."""
        match self.divergence:
            case Divergence.reverse_kl:
                cost = logp - logq
                return (
                    cost
                    if self.log_ratio_clip is None
                    else cost.clamp(-self.log_ratio_clip, self.log_ratio_clip)
                )
            case Divergence.forward_kl:
                return 1 - exp(logq - logp)
            case Divergence.jsd:
                return (1 - self.beta) * (logp - self._log_mixture(logp, logq))

    def weighted_score(self, logp: Tensor, logq: Tensor) -> Tensor:
        """p a, finite where p = 0 and, for the forward KL, where p is far below q."""
        p = exp(logp)
        if self.divergence is Divergence.forward_kl:
            return p - exp(logq)
        return torch.where(p > 0, p * self.score(logp, logq), 0.0)

    def terms(self, logp: Tensor, logq: Tensor) -> Tensor:
        """phi(p_v, q_v) elementwise; its sum over the vocabulary is the divergence. 0 log 0 = 0."""
        if self.divergence is Divergence.reverse_kl:
            return self.weighted_score(logp, logq)
        p, q = exp(logp), exp(logq)
        if self.divergence is Divergence.forward_kl:
            return torch.where(q > 0, q * (logq - logp), 0.0)
        mixture = self._log_mixture(logp, logq)
        teacher = torch.where(q > 0, q * (logq - mixture), 0.0)
        return self.beta * teacher + (1 - self.beta) * torch.where(p > 0, p * (logp - mixture), 0.0)

    @property
    def offset(self) -> float:
        """What `score` lacks of d phi / d p; it matters only when the sum does not run over a whole
        distribution.
        """
        return {Divergence.reverse_kl: 1.0, Divergence.forward_kl: -1.0, Divergence.jsd: 0.0}[
            self.divergence
        ]

    def _log_mixture(self, logp: Tensor, logq: Tensor) -> Tensor:
        return torch.logaddexp(logq + math.log(self.beta), logp + math.log1p(-self.beta))


def dense(logp: Tensor, logq: Tensor, measure: Measure) -> tuple[Tensor, Tensor]:
    """The divergence over the whole vocabulary and its logit gradient.

    Args:
        logp, logq: [c, V] log-probabilities, each normalised.

    Returns:
        value [c] and gradient [c, V], which sums to 0 over the vocabulary and is 0 where p = q.
    """
    weighted = measure.weighted_score(logp, logq)
    value = (
        weighted.sum(-1)
        if measure.divergence is Divergence.reverse_kl
        else measure.terms(logp, logq).sum(-1)
    )
    gradient = weighted - exp(logp) * weighted.sum(-1, keepdim=True)
    return value, gradient


def dense_on_support(
    logp: Tensor, ids: Tensor, logq: Tensor, measure: Measure, correction: Correction
) -> tuple[Tensor, Tensor]:
    """The divergence as far as K tokens know it, and the gradient of that at all logits.

    - unbiased: the K tokens' part of the full gradient, sum_S p_v a_v (e_v - p). The rest is the
      score term of a drawn token outside S (`tail_score`); together they have the full gradient as
      expectation for any S that does not depend on the drawn token.
    - truncate: the same sum with the constant of d phi / d p left in, the gradient of sum_S phi.
      Not a divergence.
    - tail_bucket: the divergence of the K+1 categories (S, rest).
    - renormalize: the divergence of p and q both conditioned on S; K = 1 has no gradient at all.

    Args:
        logp: [c, V] the student's log-probabilities.
        ids: [c, K] int64, distinct in each row.
        logq: [c, K] the teacher's log-probabilities at them.

    Returns:
        value [c] and gradient [c, V].
    """
    chosen = logp.gather(-1, ids)  # [c, K]
    if correction is Correction.renormalize:
        inside_p, inside_q = torch.log_softmax(chosen, -1), torch.log_softmax(logq, -1)
        value, gradient = dense(inside_p, inside_q, measure)
        return value, torch.zeros_like(logp).scatter_add_(-1, ids, gradient)
    p, weighted = exp(logp), measure.weighted_score(chosen, logq)
    value = measure.terms(chosen, logq).sum(-1)
    if correction is Correction.tail_bucket:
        rest_p, rest_q = log_rest(chosen), log_rest(logq)
        rest = measure.weighted_score(rest_p, rest_q)  # [c]
        value = value + measure.terms(rest_p, rest_q)
        mean = weighted.sum(-1) + rest
        outside = (
            p * (rest * exp(-rest_p) - mean)[:, None]
        )  # p_v (a_rest - mean) at every v, then S put right
        gradient = outside.scatter(-1, ids, weighted - exp(chosen) * mean[:, None])
        return value, gradient
    if correction is Correction.truncate:
        weighted = weighted + measure.offset * exp(chosen)
    gradient = -p * weighted.sum(-1, keepdim=True)
    return value, gradient.scatter_add(-1, ids, weighted)


def tail_score(logp: Tensor, logq: Tensor, inside: Tensor, measure: Measure) -> Tensor:
    """The score coefficient of drawn tokens outside the support, 0 inside: the other half of
    Correction.unbiased.

    Args:
        logp, logq: [R] log p(y), log q(y).
        inside: [R] bool, y among the K tokens; all False when the support is the drawn token alone.

    Returns:
        [R] a cost: its product with grad log p(y) is the estimate.
    """
    return torch.where(inside, 0.0, measure.score(logp, logq))


REST_FLOOR = 1e-6
"""Least probability of what is outside the K tokens: below it 1 - sum is rounding."""


def log_rest(logprobs: Tensor) -> Tensor:
    """log(1 - sum_K exp(logprobs)), [c, K] -> [c]."""
    return torch.log((1 - logprobs.exp().sum(-1)).clamp_min(REST_FLOOR))
