"""Importance ratios rho = p(y) / mu(y) of the learner p over the sampler mu, and their bounds.

Truncation: TIS. Mask: IcePop, MOPD (arXiv 2601.02780). Clip: PPO, with DAPO's two sides (arXiv
2503.14476).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridrl.settings.choices import Ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioBounds:
    """What is done with a ratio; `high` None: no upper bound."""

    kind: Ratio = Ratio.none
    low: float = 0.0
    high: float | None = None

    def factor(self, log_ratio: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        """What the score term is multiplied by, and where a bound was active.

        Args:
            log_ratio: [R] log p(y) - log mu(y).
            cost: [R] the sparse coefficient; a positive cost pushes p(y) down.

        Returns:
            factor [R] and bounded [R] bool.
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
