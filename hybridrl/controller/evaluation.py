"""Held-out problems and sets of them through the same engines and rewards as training."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hybridrl.controller.held_out_set import HeldOutSet
from hybridrl.controller.set_statistics import set_statistics
from hybridrl.runtime.calls import Pending, gather, watch_nothing
from hybridrl.runtime.reward_group import RewardGroup
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.settings.run import EvalConfig
from hybridrl.types import Prompt, Rewards, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation measured, and the rollouts that are saved to read."""

    # eval/accuracy, _stderr and error_rate; empty without a reward function
    metrics: dict[str, float]
    samples: tuple[Sample, ...]


def evaluate(
    config: EvalConfig,
    rollout: RolloutGroup,
    rewards: RewardGroup,
    prompts: Sequence[Prompt],
    *,
    wave: str,
    step: int,
    temperature: float,
    seed: int,
    watch: Callable[[], Pending | None] = watch_nothing,
) -> Evaluation:
    """Sample one response per problem, greedily unless eval.greedy is false, and judge it.

    Args:
        wave: a name that no other wave under way has.
        step: optimizer steps done, for the samples.
        temperature: used when sampling is not greedy.
        watch: as in runtime.calls.settle.

    Raises:
        WorkerError: naming the engine or reward worker that failed.
    """
    chunks = rollout.generate(
        prompts,
        wave=wave,
        group_size=1,
        temperature=0.0 if config.greedy else temperature,
        seed=seed,
        groups_per_chunk=len(prompts),
    )
    weights = [function.weight for function in rewards.settings.reward.functions.values()]
    pending = rewards.score(chunks, weights)
    # The headers come first: if an engine fails, the reward calls fail with it, and the error must
    # name the engine.
    gather([chunk.header for chunk in chunks], watch)
    scored = gather(pending)
    samples = rewards.samples(chunks[0], pending[0], step, config.samples)
    by_uid = {prompt.uid: prompt for prompt in prompts}
    readable = [
        replace(s, question=by_uid[s.uid].question, answer=by_uid[s.uid].answer) for s in samples
    ]
    return summary(scored, readable)


def evaluate_set(
    held_out: HeldOutSet,
    rollout: RolloutGroup,
    rewards: RewardGroup,
    *,
    wave: str,
    seed: int,
    watch: Callable[[], Pending | None] = watch_nothing,
) -> dict[str, float]:
    """Sample the responses to a set and judge them.

    Args:
        wave, watch: as of `evaluate`.

    Returns:
        The metrics of SetStatistics.

    Raises:
        WorkerError: naming the engine or reward worker that failed.
    """
    chunks = rollout.generate(
        held_out.prompts,
        wave=wave,
        group_size=held_out.samples,
        temperature=held_out.temperature,
        seed=seed,
    )
    weights = [function.weight for function in rewards.settings.reward.functions.values()]
    pending = rewards.score(chunks, weights)
    headers = gather([chunk.header for chunk in chunks], watch)  # first, as in `evaluate`
    scored = gather(pending)
    names = scored[0].part_names
    values = None
    if names:
        index = names.index(held_out.reward or names[0])
        values = np.concatenate([r.parts[index] for r in scored], dtype=np.float64)
        values = values.reshape(-1, held_out.samples)
    statistics = set_statistics(
        values,
        np.concatenate([header.response_lengths for header in headers]).tolist(),
        np.concatenate([header.truncated for header in headers]).tolist(),
        held_out.samples,
    )
    return statistics.metrics(held_out.name)


def summary(scored: Sequence[Rewards], samples: Sequence[Sample]) -> Evaluation:
    """Accuracy is the mean value of the first reward function; a failed call counts in
    eval/error_rate, not as wrong.

    Without a reward function nothing is right or wrong: there are no metrics, and the samples'
    rewards are NaN.
    """
    if not scored[0].part_names:
        return Evaluation(metrics={}, samples=tuple(replace(s, reward=math.nan) for s in samples))
    values = np.concatenate([r.parts[0] for r in scored])
    valid = values[np.isfinite(values)]
    stderr = float(valid.std(ddof=1) / np.sqrt(len(valid))) if len(valid) > 1 else math.nan
    return Evaluation(
        metrics={
            "eval/accuracy": float(valid.mean()) if len(valid) else math.nan,
            "eval/accuracy_stderr": stderr,
            "eval/error_rate": float(1 - len(valid) / len(values)),
        },
        samples=tuple(samples),
    )
