"""The reasoning-gym reward: the score, 0 to 1, that the problem's generator gives to the answer.

entry {"answer": "10", ...} of chain_sum
"4 + 6 makes 10" -> 1.0      "<answer>10</answer>" -> 1.0
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from reasoning_gym import get_score_answer_fn

from hybridrl.rewards.countdown import answer_text

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def reasoning_gym(
    completions: list[str],
    reasoning_gym_dataset: list[str],
    reasoning_gym_entry: list[dict[str, Any]],
) -> list[float]:
    """The named generator's score of each completion, [N].

    The answer is the last <answer>...</answer>. Without a tag it is the last number of the
    completion if the entry's own answer is a number, else the whole completion.

    Raises:
        ValueError: there is no generator of that name.
    """
    rows = zip(completions, reasoning_gym_dataset, reasoning_gym_entry, strict=True)
    return [
        float(_scorer(name)(_answer(completion, entry), entry)) for completion, name, entry in rows
    ]


@cache
def _scorer(name: str) -> Callable[[str, dict[str, Any]], float]:
    return get_score_answer_fn(name)


def _answer(completion: str, entry: dict[str, Any]) -> str:
    if "<answer>" not in completion and NUMBER.fullmatch(str(entry["answer"])):
        numbers = NUMBER.findall(completion)
        return numbers[-1] if numbers else ""
    return answer_text(completion)
