"""Text of a user's code made safe to log: short, on one line, without control characters."""

MAX_CHARS = 500


def plain(text: str, limit: int = MAX_CHARS) -> str:
    r"""`text` with every unprintable character escaped, in at most `limit` >= 50 characters.

    A terminal does not interpret the result, and it cannot imitate a log line.

    Example: plain("a\n\x1b[2J") == r"a\n\x1b[2J"; the result has one line of ten printable
    characters.
    """
    head = text[:limit]
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in head)
    if len(text) <= limit and len(escaped) <= limit:
        return escaped
    mark = f"... ({len(text)} characters)"
    return escaped[: limit - len(mark)] + mark


def described(error: BaseException) -> str:
    """Type and message of an exception, as `plain` text, although both may run a user's code."""
    try:
        name = str(type(error).__name__)
    except BaseException:
        name = "an exception whose type has no readable name"
    try:
        return plain(f"{name}: {error}")
    except BaseException:
        return plain(name)
