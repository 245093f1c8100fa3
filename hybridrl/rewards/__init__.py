"""Reward functions, and the pool of child processes in which they run and can be killed."""
