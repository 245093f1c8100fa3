"""Token weights: by what the sum over a step's tokens is divided, one file each."""
