"""How much a response repeats itself: two measures, neither of which is a reward."""

import math
import zlib
from collections.abc import Sequence


def compressed_share(text: str) -> float:
    """Bytes of the text after zlib over before; an empty text gives NaN.

    A thousand characters of prose: 0.5 to 0.6; one sentence again and again: below 0.1. A short
    text exceeds 1, by zlib's header.
    """
    raw = text.encode(errors="replace")
    return len(zlib.compress(raw)) / len(raw) if raw else math.nan


def repeated_share(token_ids: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams that occurred before in the same response; NaN where there is none.

    Example: repeated_share([1, 2, 1, 2, 1, 2]) == 1/3, of three 4-grams the third is the first
    again.
    """
    grams = list(zip(*(token_ids[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else math.nan
