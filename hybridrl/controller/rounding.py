"""A warning for runs whose gradient is mostly the rounding of bfloat16 logits."""

from hybridrl.settings.choices import Products
from hybridrl.settings.run import RunSettings
from hybridrl.types import LearnerStats

SMALL_KL = 0.01
"""In nats a token. Below it, the rounding error is 20 to 40 % of the dense gradient, and below
0.001 it is larger than the gradient. These shares were measured on hidden states of SmolLM2-135M,
for teachers at a KL of 0.012, 0.003 and 0.0005.
"""


def rounding_warning(settings: RunSettings, stats: LearnerStats, device: str) -> str | None:
    """The warning for a step that learned only from a teacher close to the student, and through
    rounded logits.

    Args:
        stats: statistics of the step.
        device: the learner's device, cpu or cuda; on GPUs the logits are not rounded.

    Returns:
        One sentence; None where rounding is a small part of the gradient.
    """
    wide = settings.train.exact_logits or settings.train.products is Products.float32
    rounds = device == "cpu" and settings.model.dtype == "bfloat16" and not wide
    kl = stats.token_kl or 0.0  # None or 0: there is no dense gradient to be rounded
    if not rounds or stats.sparse_norm > 0 or not 0 < kl < SMALL_KL:
        return None
    return (
        f"the KL to the teacher is {kl:.2g} nats a token, where a large part of the gradient is "
        "the rounding error of bfloat16 logits; train.exact_logits=true removes this error and "
        "makes the learner's pass over the vocabulary several times slower"
    )
