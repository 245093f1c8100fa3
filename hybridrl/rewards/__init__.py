"""Reward functions, and the pool of killable processes that calls them."""

from hybridrl.rewards.pool import check_rewards

__all__ = ["check_rewards"]
