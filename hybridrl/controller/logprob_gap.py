"""The check that the engines' log-probs are close to the learner's."""

from hybridrl.core.errors import WeightSyncError
from hybridrl.types import LearnerStats


def check_logprob_gap(stats: LearnerStats, limit: float, *, step: int) -> None:
    """Check that the engines sampled with the learner's weights.

    Args:
        stats: statistics of the step; their gap is None if no token was sampled with the weights
            that the step updates.
        limit: rollout.max_logprob_gap, nats a token.

    Raises:
        WeightSyncError: the gap is above the limit, or NaN.
    """
    gap = stats.logprob_gap
    if gap is not None and not gap <= limit:
        raise WeightSyncError(
            f"step {step}: sampler and learner differ by {gap:.3g} nats per token, "
            f"rollout.max_logprob_gap is {limit:g}; "
            "the engines do not run the learner's weights, or not in the learner's precision"
        )
