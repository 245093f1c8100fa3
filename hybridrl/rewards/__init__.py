"""Reward functions, and the pool of killable processes that calls them."""

from hybridrl.rewards.check import check_columns, check_rewards, loaded_rewards

__all__ = ["check_columns", "check_rewards", "loaded_rewards"]
