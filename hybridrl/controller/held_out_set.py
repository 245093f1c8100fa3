"""A named set of held-out problems, tokenized."""

from collections.abc import Sequence
from dataclasses import dataclass

from hybridrl.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutSet:
    """Problems by which the student is judged, and how it answers them.

    Example: eval.sets.hard={path: hard.jsonl, samples: 4} gives the name "hard", a prompt for each
    row of the file, and 4 samples.
    """

    name: str
    prompts: Sequence[Prompt]  # at least one
    samples: int  # responses to each prompt
    temperature: float  # 0: greedy
    reward: str | None  # the reward function that judges; None: the first one


def seed_kind(name: str) -> str:
    """The `kind` that pipeline.wave_seed gets for the responses to a set."""
    return f"eval-{name}"
