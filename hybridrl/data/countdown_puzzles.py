"""Countdown problems: combine all given numbers, each once, with + - * into the target.

    prompt "3 7 9=20:"    solution "3*9-7"

Every problem is made from a random expression, so it has a solution. A problem can have this
solution as a response to imitate (data.options.responses=solution), or the solution and a wrong
expression as a ranked pair (pair). No training problem has the (sorted numbers, target) of a
held-out one, and the held-out problems do not depend on the run's seed.
"""

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum

from hybridrl.core.errors import ConfigError
from hybridrl.data.problem import Problem

HELDOUT_SEED = 20_240_229
PATIENCE = 500  # after so many repeats in a row, hardly any problems are assumed to be left
DRAWS = 10_000  # largest number of attempts to draw one problem
PARENTHESES = 0.3  # probability of parentheses in an expression of three or more numbers


class Responses(StrEnum):
    """The responses of the problems."""

    none = "none"
    solution = "solution"  # one right answer
    pair = "pair"  # (a right answer, an expression of the same numbers with another value)


Key = tuple[tuple[int, ...], int]
"""(sorted numbers, target), which is equal for all orders of the same numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Equation:
    """A problem and one of its solutions.

    Example: Equation(numbers=(2, 3, 4), target=20, solution="(3+2)*4")
    """

    numbers: tuple[int, ...]  # in the order shown
    target: int
    solution: str  # one of the right answers

    @property
    def key(self) -> Key:
        return tuple(sorted(self.numbers)), self.target

    def mistake(self, rng: random.Random) -> str:
        """An expression of all the numbers whose value is not the target."""
        while True:  # ends, because the sum and a difference of positive numbers always differ
            numbers = rng.sample(self.numbers, len(self.numbers))
            operators, grouped = _shape(len(numbers), rng)
            if _value(numbers, operators, grouped) != self.target:
                return _text(numbers, operators, grouped)

    @property
    def prompt(self) -> str:
        return f"{' '.join(map(str, self.numbers))}={self.target}:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Countdown:
    """The generator of problems; its fields are the keys of data.options, except `responses`.

    Raises:
        ConfigError: the options allow no problem.
    """

    num_numbers: int = 3
    max_number: int = 10
    max_target: int = 100

    def __post_init__(self) -> None:
        if not all(
            isinstance(value, int) for value in (self.num_numbers, self.max_number, self.max_target)
        ):
            raise ConfigError(f"data.options={self}: its values must be whole numbers")
        if self.num_numbers < 2 or self.max_number < 1 or self.max_target < 2:
            raise ConfigError(
                f"data.options={self}: needs num_numbers >= 2, max_number >= 1, max_target >= 2"
            )

    def draw(self, rng: random.Random) -> Equation:
        """A random equation whose target is in 1..max_target.

        Raises:
            ConfigError: none of DRAWS random expressions has such a target.
        """
        for _ in range(DRAWS):
            numbers = [rng.randint(1, self.max_number) for _ in range(self.num_numbers)]
            shown = tuple(rng.sample(numbers, len(numbers)))
            operators, grouped = _shape(len(numbers), rng)
            target = _value(numbers, operators, grouped)
            if 1 <= target <= self.max_target:
                return Equation(
                    numbers=shown, target=target, solution=_text(numbers, operators, grouped)
                )
        raise ConfigError(
            f"data.options={self}: hardly any expression has a value in 1..max_target; raise it "
            "or lower max_number"
        )

    def stream(self, rng: random.Random, without: Collection[Key] = ()) -> Iterator[Equation]:
        """An endless stream of equations whose key is not in `without`; they may repeat."""
        while True:
            equation = self.draw(rng)
            if equation.key not in without:
                yield equation

    def heldout(self, num: int) -> list[Equation]:
        """The first `num` equations with different keys, drawn with the constant HELDOUT_SEED.

        The equations of a smaller `num` are the first ones of a larger.

        Raises:
            ConfigError: the options allow fewer equations.
        """
        equations: dict[Key, Equation] = {}
        rng = random.Random(HELDOUT_SEED)
        misses = 0
        while len(equations) < num:
            equation = self.draw(rng)
            misses = misses + 1 if equation.key in equations else 0
            if misses > PATIENCE:
                raise ConfigError(
                    f"data.num_heldout={num}: {self} has only about {len(equations)} problems; "
                    "lower it or widen data.options"
                )
            equations.setdefault(equation.key, equation)
        return list(equations.values())

    def train(self, num: int, seed: int, without: Collection[Key]) -> list[Equation]:
        """`num` equations that differ in (numbers as shown, target), or fewer if the options allow
        fewer.

        Raises:
            ConfigError: the options allow no problem outside of `without`.
        """
        equations: dict[tuple[tuple[int, ...], int], Equation] = {}
        rng = random.Random(f"countdown train {seed}")
        misses = 0
        while len(equations) < num and misses <= PATIENCE:
            equation = self.draw(rng)
            shown = (equation.numbers, equation.target)
            is_new = shown not in equations and equation.key not in without
            misses = 0 if is_new else misses + 1
            if is_new:
                equations[shown] = equation
        if not equations:
            raise ConfigError(
                f"data.num_heldout={len(without)}: leaves no training problem; lower it or widen "
                "data.options"
            )
        return list(equations.values())


def load(
    options: dict[str, object], num_train: int, num_heldout: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """Training problems drawn with `seed`, and the fixed held-out problems.

    Both have the responses that data.options.responses names. With num_train=0 there are no
    training problems.

    Raises:
        ConfigError: the generator has no such option, or the options allow too few problems.
    """
    game_options = dict(options)
    kind = game_options.pop("responses", Responses.none)
    try:
        responses = Responses(str(kind))
    except ValueError as error:
        raise ConfigError(
            f"data.options.responses={options['responses']}: must be {', '.join(Responses)}"
        ) from error
    try:
        game = Countdown(**game_options)  # type: ignore[arg-type]
    except TypeError as error:
        raise ConfigError(
            f"data.options={options}: countdown takes num_numbers, max_number, max_target and "
            "responses"
        ) from error
    heldout = game.heldout(num_heldout)
    without = {equation.key for equation in heldout}
    train = game.train(num_train, seed, without) if num_train else []
    return _problems(train, "train", responses), _problems(heldout, "heldout", responses)


def _problems(equations: list[Equation], split: str, responses: Responses) -> list[Problem]:
    return [
        Problem(
            uid=f"{split}-{i:06d}",
            prompt=e.prompt,
            columns={"numbers": list(e.numbers), "target": e.target, "solution": e.solution},
            row=f"countdown {split} problem {i}",
            responses=_responses(e, responses),
        )
        for i, e in enumerate(equations)
    ]


def _responses(equation: Equation, kind: Responses) -> tuple[str, ...]:
    match kind:
        case Responses.none:
            return ()
        case Responses.solution:
            return (equation.solution,)
        case Responses.pair:
            # The problem alone is the seed, so that the mistake is the same in every run.
            rng = random.Random(f"countdown mistake {equation.prompt}")
            return equation.solution, equation.mistake(rng)


def _shape(num_numbers: int, rng: random.Random) -> tuple[list[str], int | None]:
    """Operators between the numbers, and the index of the one in parentheses, if any."""
    operators = [rng.choice("+-*") for _ in range(num_numbers - 1)]
    if len(operators) > 1 and rng.random() < PARENTHESES:
        return operators, rng.randrange(len(operators))
    return operators, None


def _text(numbers: list[int], operators: list[str], grouped: int | None) -> str:
    """The expression; `grouped` is the index of the operator that is in parentheses."""
    words = [str(n) for n in numbers]
    if grouped is not None:
        words[grouped] = f"({words[grouped]}"
        words[grouped + 1] = f"{words[grouped + 1]})"
    rest = zip(operators, words[1:], strict=True)
    return words[0] + "".join(operator + word for operator, word in rest)


def _value(numbers: list[int], operators: list[str], grouped: int | None) -> int:
    if grouped is not None:
        inner = _value(numbers[grouped : grouped + 2], [operators[grouped]], None)
        numbers = [*numbers[:grouped], inner, *numbers[grouped + 2 :]]
        operators = operators[:grouped] + operators[grouped + 1 :]
    total = 0
    product = numbers[0]
    sign = 1
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == "*":
            product *= number
        else:
            total += sign * product
            product = number
            sign = 1 if operator == "+" else -1
    return total + sign * product
