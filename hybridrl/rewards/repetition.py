"""Two measures of how much a response repeats itself, which are reported and not rewarded."""

import math
import zlib
from collections.abc import Sequence


def compressed_share(text: str) -> float:
    """Size of the text after zlib divided by its size before; NaN for an empty text.

    A thousand characters of prose give 0.5 to 0.6, a repeated sentence less than 0.1. Short texts
    give more than 1 because of zlib's header.
    """
    raw = text.encode(errors="replace")
    return len(zlib.compress(raw)) / len(raw) if raw else math.nan


def repeated_share(token_ids: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams that occurred earlier in the same response; NaN without n-grams.

    Example: repeated_share([1, 2, 1, 2, 1, 2]) == 1/3, since the third of three 4-grams repeats the
    first.
    """
    grams = list(zip(*(token_ids[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else math.nan
