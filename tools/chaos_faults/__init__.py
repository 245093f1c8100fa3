"""Causes faults in real runs of tiny models on one machine, and stores the results in results/."""
