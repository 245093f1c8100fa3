"""Where a step's metrics go, and what they mean."""
