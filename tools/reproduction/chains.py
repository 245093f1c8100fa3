"""Chains of operations on single digits: a task whose responses are as long as one likes.

    prompt "7+5*3-8:"    solution "7+5=2*3=6-8=8"

Each result is the last digit of the sum, the difference or the product of the result before and the
next number. An error spoils the results after it. The reward is 1 if all are right.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybridrl.core.files import replace_text
from reproduction.chain_reward import solved
from reproduction.task import Task

MOST = 8  # operations that the tiny model's context has room for
MAX_NEW_TOKENS = 4 * MOST + 2  # the first digit and the end token
OPERATORS = "+-*"
OPERATION = re.compile(r"([-+*])(\d)=(\d)")
NUM_TRAIN = 20_000
NUM_HELDOUT = 512


def result(before: int, sign: str, number: int) -> int:
    """The last digit."""
    return {"+": before + number, "-": before - number, "*": before * number}[sign] % 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """An operation of a response."""

    right: bool  # given the result that the response has before it
    after_error: bool  # an earlier one is not


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Example: Chain(first=7, operations=(("+", 5), ("*", 3)))"""

    first: int
    operations: tuple[tuple[str, int], ...]  # operator and number

    @property
    def prompt(self) -> str:
        return str(self.first) + "".join(f"{sign}{b}" for sign, b in self.operations) + ":"

    @property
    def results(self) -> tuple[int, ...]:
        """After each operation."""
        found = []
        last = self.first
        for sign, number in self.operations:
            last = result(last, sign, number)
            found.append(last)
        return tuple(found)

    @property
    def solution(self) -> str:
        pairs = zip(self.operations, self.results, strict=True)
        return str(self.first) + "".join(f"{sign}{b}={value}" for (sign, b), value in pairs)


def written(chain: Chain, text: str) -> list[Written]:
    """The operations of a response, up to the first that is not copied from the prompt.

    Example: "7+5=3*3=9-8=2" answers "7+5*3-8:" with a wrong result, a right one after it, since
    3*3=9, and a wrong one.
    """
    if not text.startswith(str(chain.first)):
        return []
    found: list[Written] = []
    before = chain.first
    position = 1
    error = False
    for sign, number in chain.operations:
        part = OPERATION.match(text, position)
        if part is None or (part[1], int(part[2])) != (sign, number):
            break
        right = int(part[3]) == result(before, sign, number)
        found.append(Written(right=right, after_error=error))
        error = error or not right
        before = int(part[3])
        position = part.end()
    return found


def draw(rng: random.Random, operations: int) -> Chain:
    """A random chain."""
    parts = tuple((rng.choice(OPERATORS), rng.randint(1, 9)) for _ in range(operations))
    return Chain(first=rng.randrange(10), operations=parts)


def stream(rng: random.Random) -> Iterator[Chain]:
    """Endless chains of 1 to MOST operations, none of them a held-out one."""
    without = {c for n in range(1, MOST + 1) for c in heldout(n, NUM_HELDOUT if n > 1 else 0)}
    while True:
        chain = draw(rng, rng.randint(1, MOST))
        if chain not in without:
            yield chain


def heldout(operations: int, num: int) -> list[Chain]:
    """The first different chains of a constant seed; there are 270 of one operation."""
    rng = random.Random(f"chains held out {operations}")
    found: dict[Chain, None] = {}
    while len(found) < num:
        found.setdefault(draw(rng, operations))
    return list(found)


def rewards(texts: Sequence[str], chains: Sequence[Chain]) -> list[float]:
    return solved(list(texts), [chain.solution for chain in chains])


def chain_task(operations: int) -> Task[Chain]:
    """Chains of so many operations."""
    return Task(
        heldout=lambda num: heldout(operations, num),
        rewards=rewards,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def chain_files(folder: Path, operations: int, seed: int) -> tuple[Path, Path]:
    """Files of training and of held-out problems, which are made if they are missing."""
    train = folder / f"chains-{operations}-{seed}.jsonl"
    other = folder / f"chains-{operations}-heldout.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    kept = heldout(operations, NUM_HELDOUT)
    if not other.exists():
        replace_text(other, _text(kept))
    if not train.exists():
        rng = random.Random(f"chains {operations} {seed}")
        without = set(kept)
        drawn = (draw(rng, operations) for _ in range(NUM_TRAIN))
        replace_text(train, _text([c for c in drawn if c not in without]))
    return train, other


def _text(chains: Sequence[Chain]) -> str:
    rows = ({"prompt": chain.prompt, "solution": chain.solution} for chain in chains)
    return "".join(f"{json.dumps(row)}\n" for row in rows)
