"""Experiments on the claims of the papers; their verdicts are computed by rules fixed before."""
