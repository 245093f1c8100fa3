"""Turns scored chunks into forward passes: groups, columns of response tokens, micro-batches."""
