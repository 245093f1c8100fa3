"""A reward that models with random weights get for some of their responses."""

LOW = ("0", "1", "2", "3", "4", "5")
"""Six of the 23 tokens of the tiny models."""


def begins_low(completions: list[str]) -> list[float]:
    """1 for a response that begins with a digit up to 5, else 0."""
    return [float(text.startswith(LOW)) for text in completions]
