"""Token weights: the divisor of the sum over a step's tokens, one file each."""
