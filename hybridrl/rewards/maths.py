"""Mathematics: 1 if the completion's final answer equals the reference, as math-verify judges, else 0.

answer "1/2"      "so it is $\\frac{2}{4}$" -> 1.0      "0.5" -> 1.0      "2" -> 0.0
"""

import logging

from math_verify import parse, verify

# math-verify's own timeouts turn a slow answer into a wrong one; ours is the deadline of the call, which is an error.
NO_TIMEOUT = None
for module in ("parser", "grader"):
    logging.getLogger(f"math_verify.{module}").setLevel(
        logging.ERROR
    )  # each warns once that its timeout is off


def math(completions: list[str], answer: list[str]) -> list[float]:
    """1.0 or 0.0 per completion [N]; `answer` is LaTeX or a plain expression, with or without $ or \\boxed.

    Raises:
        ValueError: a reference answer that math-verify cannot read: no completion could be right.
    """
    return [
        _equal(completion, str(reference))
        for completion, reference in zip(completions, answer, strict=True)
    ]


def _equal(completion: str, reference: str) -> float:
    delimited = reference if "$" in reference or "\\boxed" in reference else f"${reference}$"
    gold = parse(delimited, parsing_timeout=NO_TIMEOUT)
    if not gold:
        raise ValueError(f"answer={reference!r}: math-verify finds no expression in it")
    return float(
        verify(gold, parse(completion, parsing_timeout=NO_TIMEOUT), timeout_seconds=NO_TIMEOUT)
    )
