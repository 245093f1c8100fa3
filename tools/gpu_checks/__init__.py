"""The checks of a first run on GPUs, step by step; `tools/gpu_proof` runs them."""
