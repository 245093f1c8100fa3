"""The check that few of the reward calls of a step failed."""

from collections.abc import Sequence

import numpy as np

from hybridrl.core.errors import RewardError
from hybridrl.types import Rewards


def check_reward_errors(
    rewards: Sequence[Rewards], limit: float, *, step: int, learned_from: bool
) -> None:
    """Check the share of failed reward calls.

    Args:
        rewards: those of a step. Responses of the data, which are only ranked, do not count.
        limit: reward.max_error_rate.
        learned_from: whether the objective uses the rewards; if they are only reported, any number
            of calls may fail.

    Raises:
        RewardError: the share is above the limit.
    """
    judged = [r.errors for r in rewards if r.part_names]
    if not judged or not learned_from:
        return
    rate = float(np.concatenate(judged).mean())
    if rate > limit:
        raise RewardError(
            f"step {step}: {rate:.1%} of the reward calls failed, "
            f"reward.max_error_rate is {limit:.1%}; see logs/reward-*.log"
        )
