"""How far apart student and teacher are, beyond the divergence that is trained: looked at every few
steps.
"""

import torch
from torch import Tensor

COMPARED = (
    "forward_kl",
    "top1_agree",
    "overlap",
    "overlap_mass_student",
    "overlap_mass_teacher",
    "overlap_advantage",
    "entropy",
    "entropy_gap",
)
"""Columns of `compare`, each a mean over tokens once divided by their number."""


def compare(logp: Tensor, logq: Tensor, k: int = 16) -> Tensor:
    """Eight numbers a token about student p and teacher q.

    - forward_kl: KL(q || p), nats.
    - top1_agree: 1 where the most likely token is the same.
    - overlap: |top-K(p) and top-K(q)| / K; overlap_mass_*: p and q of that intersection (0.97 to
      0.99 is usual).
    - overlap_advantage: sum over the intersection of pb (log qb - log pb), both renormalised on it;
      0 when they agree.
    - entropy: of q; entropy_gap: |H(q) - H(p)|, nats.

    Args:
        logp, logq: [c, V] normalised; k: at most V.

    Returns:
        [c, 8] in the order of COMPARED.
    """
    k = min(k, logp.shape[-1])
    p, q = logp.exp(), logq.exp()
    among = [
        torch.zeros_like(x, dtype=torch.bool).scatter_(-1, x.topk(k, dim=-1).indices, True)
        for x in (logp, logq)
    ]
    both = among[0] & among[1]
    mass_p, mass_q = (torch.where(both, x, 0.0).sum(-1) for x in (p, q))
    entropy_p, entropy_q = (
        -torch.where(x > 0, x * logx, 0.0).sum(-1) for x, logx in ((p, logp), (q, logq))
    )
    inside = (
        torch.where(both, p * (logq - logp), 0.0).sum(-1) / mass_p + mass_p.log() - mass_q.log()
    )
    return torch.stack(
        [
            torch.where(q > 0, q * (logq - logp), 0.0).sum(-1),
            (logp.argmax(-1) == logq.argmax(-1)).to(p.dtype),
            both.sum(-1).to(p.dtype) / k,
            mass_p,
            mass_q,
            torch.where(mass_p > 0, inside, 0.0),
            entropy_q,
            (entropy_q - entropy_p).abs(),
        ],
        dim=-1,
    )
