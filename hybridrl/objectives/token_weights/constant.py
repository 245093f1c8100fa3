"""algorithm.normalizer=constant: lengths do not matter."""

import torch
from torch import Tensor

from hybridrl.objectives.token_weights.token_weight import TokenCounts


def constant(counts: TokenCounts) -> Tensor:
    """[1, 1] one over responses * max_new_tokens, which is unbiased at any batch size (Dr. GRPO,
    arXiv 2503.20783).
    """
    longest = counts.num_sequences * counts.max_new_tokens
    return torch.full((1, 1), 1.0 / longest, dtype=torch.float64)
