"""Faults in real runs of tiny models on one machine; their results are stored in results/."""
