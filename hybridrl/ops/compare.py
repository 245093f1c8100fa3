"""Further measures of the distance between student and teacher, for occasional diagnostics."""

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
"""The columns of `compare`, whose means over tokens are the metrics teacher/<name>."""


def compare(logp: Tensor, logq: Tensor, k: int = 16) -> Tensor:
    """Eight numbers per token about student p and teacher q.

    - forward_kl: KL(q || p), in nats.
    - top1_agree: 1 if the most likely token is the same.
    - overlap: |top-K(p) and top-K(q)| / K.
    - overlap_mass_student, overlap_mass_teacher: the mass of p and of q on that intersection; 0.97
      to 0.99 is usual.
    - overlap_advantage: sum over the intersection of pb (log qb - log pb), where pb and qb are p
      and q renormalised on it; 0 if they agree.
    - entropy: H(q), in nats.
    - entropy_gap: |H(q) - H(p)|, in nats.

    Args:
        logp: [c, V] normalised log-probabilities of the student.
        logq: [c, V] normalised log-probabilities of the teacher.
        k: K; at most V are used.

    Returns:
        [c, 8] in the order of COMPARED.
    """
    k = min(k, logp.shape[-1])
    p = logp.exp()
    q = logq.exp()
    in_top_k = [
        torch.zeros_like(x, dtype=torch.bool).scatter_(-1, x.topk(k, dim=-1).indices, True)
        for x in (logp, logq)
    ]
    both = in_top_k[0] & in_top_k[1]  # [c, V] bool
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
