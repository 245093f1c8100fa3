"""algorithm.normalizer=sequence_mean: every response counts the same."""

from torch import Tensor

from hybridrl.objectives.token_weights.token_weight import TokenCounts


def sequence_mean(counts: TokenCounts) -> Tensor:
    """[N, 1] the mean over a response's tokens, then over its siblings, then over prompts, so the
    tokens of short responses weigh more (GRPO, arXiv 2402.03300).
    """
    return 1.0 / (counts.num_groups * counts.group_size * counts.lengths)[:, None]
