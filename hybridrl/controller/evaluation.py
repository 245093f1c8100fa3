"""Held-out problems through the same engines and rewards as training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hybridrl.config import EvalConfig
from hybridrl.runtime.calls import gather
from hybridrl.runtime.groups import RewardGroup, RolloutGroup
from hybridrl.types import Prompt, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """accuracy is the mean value of the first reward function; a failed call counts in error_rate, not as wrong."""

    accuracy: float
    stderr: float
    error_rate: float
    samples: tuple[Sample, ...]


def evaluate(
    config: EvalConfig, rollout: RolloutGroup, rewards: RewardGroup, prompts: Sequence[Prompt], *, step: int, temperature: float, seed: int
) -> Evaluation:
    """One response per problem, greedy unless eval.greedy is false.

    Args:
        step: optimizer steps done, for the wave's name and the samples.
        temperature: of sampling when not greedy.
    """
    chunks = rollout.generate(prompts, wave=f"eval-{step}", group_size=1, temperature=0.0 if config.greedy else temperature, seed=seed)
    pending = rewards.score(chunks)
    scored = gather(pending)
    values = np.concatenate([r.parts[0] for r in scored])
    sound = values[np.isfinite(values)]
    return Evaluation(
        accuracy=float(sound.mean()) if len(sound) else float("nan"),
        stderr=float(sound.std(ddof=1) / np.sqrt(len(sound))) if len(sound) > 1 else float("nan"),
        error_rate=float(1 - len(sound) / len(values)),
        samples=rewards.samples(chunks[0], pending[0], step, config.samples),
    )
