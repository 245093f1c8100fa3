"""The reward of a chain of operations, for the setting reward.functions."""


def solved(completions: list[str], solution: list[str]) -> list[float]:
    """1 where every result is right, else 0."""
    return [float(text == right) for text, right in zip(completions, solution, strict=True)]
