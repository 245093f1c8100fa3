"""What a model is examined on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from hybridrl.data.countdown_puzzles import Countdown, Equation
from hybridrl.rewards.countdown import countdown


class Prompted(Protocol):
    """A problem."""

    @property
    def prompt(self) -> str: ...


P = TypeVar("P", bound=Prompted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(Generic[P]):
    """Held-out problems and their rewards."""

    heldout: Callable[[int], Sequence[P]]
    """as many different problems, the same at every call"""
    rewards: Callable[[Sequence[str], Sequence[P]], list[float]]
    """1 for each text that solves its problem, else 0"""
    max_new_tokens: int


def countdown_rewards(texts: Sequence[str], equations: Sequence[Equation]) -> list[float]:
    """1 for a right answer, else 0."""
    return countdown(
        list(texts), [list(e.numbers) for e in equations], [e.target for e in equations]
    )


COUNTDOWN = Task(heldout=Countdown().heldout, rewards=countdown_rewards, max_new_tokens=16)
