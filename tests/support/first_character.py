"""A reward function that is 1 for some of the responses of models with random weights."""

LOW = ("0", "1", "2", "3", "4", "5")
"""Six of the 23 tokens of the tiny models."""


def begins_low(completions: list[str]) -> list[float]:
    """1 for a response that begins with one of the digits 0 to 5, else 0."""
    return [float(text.startswith(LOW)) for text in completions]
