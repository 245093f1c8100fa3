"""The training loop. It holds headers and references, never per-token data."""
