"""A warning for runs whose gradient is mostly the rounding of bfloat16 logits."""

from collections.abc import Mapping

from hybridrl.settings.run import RunSettings

SMALL_KL = 0.01
"""Nats a token. Below, 20 to 40 % of the dense gradient is rounding, and below 0.001 more than the
gradient itself: shares measured at the hidden states of SmolLM2-135M for a teacher at KL 0.012,
0.003 and 0.0005.
"""


def rounding_warning(
    settings: RunSettings, metrics: Mapping[str, float], device: str
) -> str | None:
    """One sentence for a step that learned from the dense term alone, near its teacher, by rounded
    logits; else None.

    Args:
        metrics: of the step, as the learner returned them.
        device: of the learner, cpu or cuda; on GPUs the logits are not rounded.
    """
    rounds = (
        device == "cpu" and settings.model.dtype == "bfloat16" and not settings.train.exact_logits
    )
    kl = metrics.get("kl/token", 0.0)  # 0 or missing: there is no dense gradient to be rounded
    if not rounds or metrics.get("grad/sparse_norm", 0.0) > 0 or not 0 < kl < SMALL_KL:
        return None
    return (
        f"the KL to the teacher is {kl:.2g} nats a token, where a large part of the gradient is "
        "the rounding of bfloat16 logits; train.exact_logits=true takes that away and makes the "
        "learner's pass over the vocabulary several times slower"
    )
