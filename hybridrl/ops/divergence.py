"""Divergences between student p and teacher q per token, and their gradients at the logits of p.

Every divergence here is a sum over the vocabulary D = sum_v phi(p_v, q_v). With the score a_v = d
phi / d p_v its gradient at the logits is

    dD/dz = p * (a - sum_v p_v a_v)

which does not change if a constant is added to a. For the scores below this constant is chosen so
that a = 0 where p = q:

    reverse KL  a = log p - log q            forward KL  a = 1 - q / p
    JSD_beta    a = (1 - beta) (log p - log m),  m = beta q + (1 - beta) p

So the score a_y of a sampled token y is also the unbiased coefficient of grad log p(y) for the same
gradient (f(u) - u f'(u) with u = q/p, up to that constant), and it has no variance at p = q.
References: arXiv 2512.23097 (proposition 4), 2306.13649 (JSD_beta).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridrl.settings.choices import Correction, Divergence


def exp(x: Tensor) -> Tensor:
    """exp(x), in a form for which the C++ backend of torch.compile writes no buffer to memory.

    That backend recomputes exp2 in each loop that uses it.
    """
    return torch.exp2(x * (1 / math.log(2))) if torch.compiler.is_compiling() else torch.exp(x)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A divergence between student p and teacher q, with its constants."""

    divergence: Divergence = Divergence.reverse_kl
    beta: float = 0.5  # of the JSD, in (0, 1)
    log_ratio_clip: float | None = None  # bound of |log p - log q| in the reverse KL; None: none

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
        """p a, elementwise; finite where p = 0 and, for the forward KL, where p is far below q."""
        p = exp(logp)
        if self.divergence is Divergence.forward_kl:
            return p - exp(logq)
        return torch.where(p > 0, p * self.score(logp, logq), 0.0)

    def terms(self, logp: Tensor, logq: Tensor) -> Tensor:
        """phi(p_v, q_v) elementwise; its sum over the vocabulary is the divergence. 0 log 0 = 0."""
        if self.divergence is Divergence.reverse_kl:
            return self.weighted_score(logp, logq)
        p = exp(logp)
        q = exp(logq)
        if self.divergence is Divergence.forward_kl:
            return torch.where(q > 0, q * (logq - logp), 0.0)
        mixture = self._log_mixture(logp, logq)
        teacher = torch.where(q > 0, q * (logq - mixture), 0.0)
        return self.beta * teacher + (1 - self.beta) * torch.where(p > 0, p * (logp - mixture), 0.0)

    @property
    def offset(self) -> float:
        """The constant that `score` omits from d phi / d p.

        It matters only for a sum that does not run over a whole distribution.
        """
        return {Divergence.reverse_kl: 1.0, Divergence.forward_kl: -1.0, Divergence.jsd: 0.0}[
            self.divergence
        ]

    def _log_mixture(self, logp: Tensor, logq: Tensor) -> Tensor:
        return torch.logaddexp(logq + math.log(self.beta), logp + math.log1p(-self.beta))


def dense(logp: Tensor, logq: Tensor, measure: Measure) -> tuple[Tensor, Tensor]:
    """The divergence over the whole vocabulary, and its gradient at the logits of p.

    Args:
        logp: [c, V] normalised log-probabilities of the student.
        logq: [c, V] normalised log-probabilities of the teacher.

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
    """The divergence on a set S of K tokens, by one of four corrections, and its logit gradient.

    - unbiased: the part of the full gradient that comes from the K tokens, sum_S p_v a_v (e_v - p).
      The other part is the score term of a sampled token outside of S (`tail_score`). The
      expectation of their sum is the full gradient, for any S that does not depend on the sampled
      token.
    - truncate: the same sum including the constant of d phi / d p, i.e. the gradient of sum_S phi,
      which is not a divergence.
    - tail_bucket: the divergence over K+1 categories: the tokens of S, and all others together.
    - renormalize: the divergence of p and q, both conditioned on S; with K = 1 its gradient is 0.

    Args:
        logp: [c, V] log-probabilities of the student.
        ids: [c, K] int64, the tokens of S; distinct in each row.
        logq: [c, K] log-probabilities of the teacher at these tokens.

    Returns:
        value [c] and gradient [c, V].
    """
    chosen = logp.gather(-1, ids)  # [c, K]
    if correction is Correction.renormalize:
        inside_p = torch.log_softmax(chosen, -1)
        inside_q = torch.log_softmax(logq, -1)
        value, gradient = dense(inside_p, inside_q, measure)
        return value, torch.zeros_like(logp).scatter_add_(-1, ids, gradient)
    p = exp(logp)
    weighted = measure.weighted_score(chosen, logq)
    value = measure.terms(chosen, logq).sum(-1)
    if correction is Correction.tail_bucket:
        rest_p = log_rest(chosen)
        rest_q = log_rest(logq)
        rest = measure.weighted_score(rest_p, rest_q)  # [c]
        value = value + measure.terms(rest_p, rest_q)
        mean = weighted.sum(-1) + rest
        # p_v (a_rest - mean) at every v; the entries of S are then overwritten.
        outside = p * (rest * exp(-rest_p) - mean)[:, None]
        gradient = outside.scatter(-1, ids, weighted - exp(chosen) * mean[:, None])
        return value, gradient
    if correction is Correction.truncate:
        weighted = weighted + measure.offset * exp(chosen)
    gradient = -p * weighted.sum(-1, keepdim=True)
    return value, gradient.scatter_add(-1, ids, weighted)


def tail_score(logp: Tensor, logq: Tensor, inside: Tensor, measure: Measure) -> Tensor:
    """The second part of Correction.unbiased: the score of sampled tokens outside of the support.

    Args:
        logp: [R] log p(y) of the sampled tokens.
        logq: [R] log q(y) of the sampled tokens.
        inside: [R] bool, whether y is one of the K tokens; all False if the support is y itself.

    Returns:
        [R] the coefficient of grad log p(y), 0 inside.
    """
    return torch.where(inside, 0.0, measure.score(logp, logq))


REST_FLOOR = 1e-6
"""Lower bound of the probability of all tokens outside of S; below it, 1 - sum is only rounding
error.
"""


def log_rest(logprobs: Tensor) -> Tensor:
    """log(1 - sum_K exp(logprobs)), [c, K] -> [c]."""
    return torch.log((1 - logprobs.exp().sum(-1)).clamp_min(REST_FLOOR))
