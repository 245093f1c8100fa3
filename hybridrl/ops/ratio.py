"""Importance ratios rho = p(y) / mu(y) of the learner p over the sampler mu, and their bounds.

`truncate` is truncated importance sampling (TIS). `mask` is used by IcePop and MOPD (arXiv
2601.02780). `clip` is PPO's, with separate bounds on the two sides as in DAPO (arXiv 2503.14476).

If a batch has several updates, the clip shall bound how far they move the learner, not how far the
sampler is from it. Then the ratio is a product (decoupled PPO, arXiv 2110.00641) of
p(y) / p_old(y), which is clipped, and p_old(y) / mu(y), which is truncated, where p_old is the
learner before the batch's first update. The product is p(y) / mu(y) where no bound is active.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridrl.settings.choices import Ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioBounds:
    """How a ratio is bounded. For `clip`, the bounds are 1 - low and 1 + high."""

    kind: Ratio = Ratio.none
    low: float = 0.0
    high: float | None = None  # None: no upper bound

    def factor(self, log_ratio: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        """The factor of the score term, and where a bound was active.

        Args:
            log_ratio: [R] log p(y) - log mu(y).
            cost: [R] the coefficient of grad log p(y); a positive cost lowers p(y).

        Returns:
            factor [R], and bounded [R] bool.
        """
        high = float("inf") if self.high is None else self.high
        rho = log_ratio.exp()
        match self.kind:
            case Ratio.none:
                return torch.ones_like(rho), torch.zeros_like(rho, dtype=torch.bool)
            case Ratio.truncate:
                return rho.clamp(self.low, high), (rho < self.low) | (rho > high)
            case Ratio.mask:
                outside = (rho < self.low) | (rho > high)
            case Ratio.clip:
                outside = ((cost < 0) & (rho > 1 + high)) | ((cost > 0) & (rho < 1 - self.low))
        return torch.where(outside, 0.0, rho), outside
