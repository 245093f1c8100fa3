"""Where the metrics of a step go, and what each of them means."""
