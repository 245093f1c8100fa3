"""A reward that is above 0 for most responses, with a signature that TRL and hybridrl accept."""


def digit_share(completions: list[str], **_) -> list[float]:
    """The share of the characters of each response that are digits; 0 for an empty response."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
