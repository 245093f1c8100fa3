"""The Countdown reward: 1 if the completion uses every given number once and reaches the target,
else 0.

    numbers [3, 7, 9], target 20      "3*9-7" -> 1.0      "20" -> 0.0      "3*9-" -> 0.0

The completion is parsed by a small recursive-descent parser, never by Python, and computed in exact
fractions:

    sum = product (("+" | "-") product)*
    product = atom (("*" | "/") atom)*
    atom = integer | "(" sum ")"
"""

import re
from fractions import Fraction
from numbers import Real

MAX_CHARS = 200
MAX_DEPTH = 20  # nested parentheses

TOKEN = re.compile(r"[0-9]+|[-+*/()]")


def countdown(completions: list[str], numbers: list[list[int]], target: list[int]) -> list[float]:
    """1.0 or 0.0 per completion, [N]; anything but one well-formed expression scores 0.0.

    The expression is the last <answer>...</answer> if there is one, else the whole completion
    without outer spaces.

    Raises:
        ValueError: numbers or a target of the data are text, as every cell of a CSV file is.
    """
    for given, goal in zip(numbers, target, strict=True):
        if not isinstance(given, list | tuple) or not all(isinstance(n, Real) for n in given):
            raise ValueError(f"numbers={given!r}: must be a list of numbers")
        if not isinstance(goal, Real):
            raise ValueError(f"target={goal!r}: must be a number")
    rows = zip(completions, numbers, target, strict=True)
    return [float(_reaches(completion, given, goal)) for completion, given, goal in rows]


def answer_text(completion: str) -> str:
    """The stripped text of the last <answer> tag, or of the whole completion if there is none."""
    _, tag, rest = completion.rpartition("<answer>")
    return (rest.partition("</answer>")[0] if tag else rest).strip()


def _reaches(completion: str, numbers: list[int], target: int) -> bool:
    try:
        expression = Expression(answer_text(completion))
    except (ValueError, ZeroDivisionError):
        return False
    return expression.value == target and sorted(expression.numbers) == sorted(numbers)


class Expression:
    """A parsed arithmetic expression with its value and the numbers in it.

    Example: Expression("(1+2)/4") has value Fraction(3, 4) and numbers [1, 2, 4].

    Raises:
        ValueError: the text is not a well-formed expression, longer than MAX_CHARS, or nested more
            than MAX_DEPTH deep.
        ZeroDivisionError: the expression divides by zero.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_CHARS:
            raise ValueError("too long")
        if TOKEN.sub("", text).strip():
            raise ValueError("a character that is not part of an expression")
        self.numbers: list[int] = []
        self._tokens = TOKEN.findall(text)[::-1]  # the next token is last
        self.value = self._sum(depth=0)
        if self._tokens:
            raise ValueError("something follows the expression")

    def _next(self) -> str:
        return self._tokens[-1] if self._tokens else ""

    def _sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while self._next() in ("+", "-"):
            plus = self._tokens.pop() == "+"
            term = self._product(depth)
            value = value + term if plus else value - term
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._atom(depth)
        while self._next() in ("*", "/"):
            times = self._tokens.pop() == "*"
            factor = self._atom(depth)
            value = value * factor if times else value / factor
        return value

    def _atom(self, depth: int) -> Fraction:
        token = self._tokens.pop() if self._tokens else ""
        if token.isdigit():
            self.numbers.append(int(token))
            return Fraction(int(token))
        if token != "(" or depth == MAX_DEPTH:
            raise ValueError(f"expected a number or parenthesis, not {token!r}")
        value = self._sum(depth + 1)
        if not self._tokens or self._tokens.pop() != ")":
            raise ValueError("a parenthesis is not closed")
        return value
