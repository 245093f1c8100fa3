"""The reward for mathematics: 1 if math-verify finds the final answer equal to the reference, else
0.

    answer "1/2"      "so it is $\\frac{2}{4}$" -> 1.0      "0.5" -> 1.0      "2" -> 0.0

math-verify evaluates parts of the text with sympy. So it must be called only by the pool, in a
child process that has no secrets and is killed at its deadline. Even there a text that is written
to run code may do so.
"""

import logging
import math as numbers

from math_verify import parse, verify

# math-verify's own timeouts would score a slow answer as wrong; the pool's deadline is an error.
NO_TIMEOUT = None

for module in ("parser", "grader"):
    # Each module warns once that its timeout is off.
    logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)


def math(completions: list[str], answer: list[str | int | float]) -> list[float]:
    """1.0 or 0.0 per completion, [N].

    Args:
        answer: a number, LaTeX or a plain expression, with or without $ or \\boxed.

    Raises:
        ValueError: a reference answer is neither text nor a finite number, or math-verify cannot
            read it, so that no completion could be right.
    """
    return [
        _equal(completion, _reference(reference))
        for completion, reference in zip(completions, answer, strict=True)
    ]


def _reference(answer: object) -> str:
    if isinstance(answer, str):
        return answer
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
    if is_number and numbers.isfinite(answer):  # type: ignore[arg-type]
        return str(answer)
    raise ValueError(f"answer={answer!r:.100}: must be text or a finite number")


def _equal(completion: str, reference: str) -> float:
    delimited = reference if "$" in reference or "\\boxed" in reference else f"${reference}$"
    gold = parse(delimited, parsing_timeout=NO_TIMEOUT)
    if not gold:
        raise ValueError(f"answer={reference!r}: math-verify finds no expression in it")
    return float(
        verify(gold, parse(completion, parsing_timeout=NO_TIMEOUT), timeout_seconds=NO_TIMEOUT)
    )
