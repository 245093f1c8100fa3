"""The run directory, a stable contract: the files that a run writes, and how it continues."""
