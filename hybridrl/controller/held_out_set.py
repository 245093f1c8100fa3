"""A named set of held-out problems, tokenized."""

from collections.abc import Sequence
from dataclasses import dataclass

from hybridrl.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutSet:
    """Problems by which the student is judged, and how it answers them.

    Example: eval.sets.hard={path: hard.jsonl, samples: 4} has the name "hard", the prompts of the
    rows, and 4 samples.
    """

    name: str
    prompts: Sequence[Prompt]  # at least one
    samples: int  # responses to each prompt
    temperature: float  # 0: greedy
    reward: str | None  # the reward function that judges; None: the first one


def seed_kind(name: str) -> str:
    """What the seed of a set's responses depends on, as of pipeline.wave_seed."""
    return f"eval-{name}"
