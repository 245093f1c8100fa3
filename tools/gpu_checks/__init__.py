"""What a first run on GPUs has to show, step by step: `tools/gpu_proof`."""
