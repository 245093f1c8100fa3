"""Frozen models that score responses, and what the learner makes of their scores."""
