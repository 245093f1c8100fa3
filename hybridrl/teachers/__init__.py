"""Frozen models that score responses, and how the learner reads their scores."""
