"""A reward that every response gets some of, in the signature that TRL and this package share."""


def digit_share(completions: list[str], **_) -> list[float]:
    """Share of the characters that are digits, 0 for an empty response."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
