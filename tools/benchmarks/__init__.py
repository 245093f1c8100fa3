"""Timings as ratios, measured side by side in one run. Each module is one verb of `tools/bench`."""
