"""The life of a run: preflight checks, start, restarts, dry run, export, serving, doctor."""
