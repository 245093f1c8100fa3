"""algorithm.normalizer=token_mean: every token of the step counts the same."""

import torch
from torch import Tensor

from hybridrl.objectives.token_weights.token_weight import TokenCounts


def token_mean(counts: TokenCounts) -> Tensor:
    """[1, 1] one over the number of response tokens in the step (DAPO, arXiv 2503.14476)."""
    return torch.full((1, 1), 1.0 / counts.num_tokens, dtype=torch.float64)
