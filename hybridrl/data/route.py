"""Routes: which prompts a teacher scores or a reward function judges."""

from collections.abc import Mapping
from typing import Any


def takes(route: Mapping[str, Any], columns: Mapping[str, Any]) -> bool:
    """Whether a prompt with these columns belongs to a teacher or reward function with this route.

    Example: takes({"domain": "math"}, {"domain": "math", "level": 3}) -> True; an empty route takes
    every prompt.
    """
    return all(columns.get(key) == value for key, value in route.items())
