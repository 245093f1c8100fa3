"""Reward functions, and the pool of killable processes that calls them."""
