"""Which prompts a teacher scores."""

from collections.abc import Mapping
from typing import Any


def takes(route: Mapping[str, Any], columns: Mapping[str, Any]) -> bool:
    """Whether a prompt with these columns is routed to a teacher with this route.

    Example: takes({"domain": "math"}, {"domain": "math", "level": 3}) -> True; an empty route takes
    every prompt.
    """
    return all(columns.get(key) == value for key, value in route.items())
