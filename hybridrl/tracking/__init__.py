"""The metrics of a run: their meanings, and the sinks that record them."""
