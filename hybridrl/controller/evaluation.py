"""Evaluation on held-out problems and named sets, with the engines and rewards of training."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hybridrl.controller.held_out_set import HeldOutSet
from hybridrl.controller.set_statistics import set_statistics
from hybridrl.data.problem import source_of
from hybridrl.data.route import takes
from hybridrl.runtime.calls import Pending, gather, watch_nothing
from hybridrl.runtime.reward_group import RewardGroup
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.settings.rewards import RewardFunctionConfig
from hybridrl.settings.run import EvalConfig, RunSettings
from hybridrl.types import Float, Prompt, Rewards, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The metrics of an evaluation, and some of its responses as text."""

    # eval/accuracy, eval/error_rate, ...; empty without a reward function
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
    """Sample one response per problem, greedily unless eval.greedy is false, and judge it. Without
    a reward function only the problems are sampled whose responses are shown.

    Args:
        wave: a name that no other wave under way has.
        step: training steps done, which the samples record.
        temperature: used when sampling is not greedy.
        watch: as in runtime.calls.settle.

    Raises:
        WorkerError: an engine or reward worker failed; the error names it.
    """
    settings = rewards.settings
    functions = settings.reward.functions
    if not functions:
        prompts = prompts[: config.samples]
        if not prompts:
            return Evaluation(metrics={}, samples=())
    chunks = rollout.generate(
        prompts,
        wave=wave,
        group_size=1,
        temperature=0.0 if config.greedy else temperature,
        seed=seed,
        groups_per_chunk=groups_per_chunk(settings, 1),
    )
    pending = rewards.score(chunks, [function.weight for function in functions.values()])
    # The headers come first: if an engine fails, the reward calls fail with it, and the error must
    # name the engine.
    gather([chunk.header for chunk in chunks], watch)
    scored = gather(pending)
    samples: list[Sample] = []
    for chunk, call in zip(chunks, pending, strict=True):
        if len(samples) < config.samples:
            samples += rewards.samples(chunk, call, step, config.samples - len(samples))
    judges = judges_of(prompts, functions)
    return summary(scored, with_questions(samples, prompts), judges)


def groups_per_chunk(settings: RunSettings, samples: int) -> int:
    """How many problems with `samples` responses each make a chunk: as many responses as in
    training, since the deadlines are chosen for those.

    Example: 4 groups of 8 responses in training are 32 problems of one response, or 2 of 16.
    """
    responses = settings.rollout.groups_per_chunk * settings.train.samples_per_prompt
    return max(1, responses // samples)


def with_questions(samples: Sequence[Sample], prompts: Sequence[Prompt]) -> list[Sample]:
    """Add the question and the reference answer of its prompt to each sample."""
    by_uid = {prompt.uid: prompt for prompt in prompts}
    return [
        replace(s, question=by_uid[s.uid].question, answer=by_uid[s.uid].answer) for s in samples
    ]


def evaluate_set(
    held_out: HeldOutSet,
    rollout: RolloutGroup,
    rewards: RewardGroup,
    *,
    wave: str,
    seed: int,
    watch: Callable[[], Pending | None] = watch_nothing,
) -> dict[str, float]:
    """Sample the responses to a held-out set and judge them.

    Args:
        wave, watch: as in `evaluate`.

    Returns:
        The metrics of SetStatistics.

    Raises:
        WorkerError: an engine or reward worker failed; the error names it.
    """
    chunks = rollout.generate(
        held_out.prompts,
        wave=wave,
        group_size=held_out.samples,
        temperature=held_out.temperature,
        seed=seed,
        groups_per_chunk=groups_per_chunk(rewards.settings, held_out.samples),
    )
    weights = [function.weight for function in rewards.settings.reward.functions.values()]
    pending = rewards.score(chunks, weights, held_out.reward)
    headers = gather([chunk.header for chunk in chunks], watch)  # first, as in `evaluate`
    scored = gather(pending)
    values = None
    if scored[0].part_names:
        parts = np.concatenate([r.parts for r in scored], axis=1, dtype=np.float64)
        values = judged(parts, held_out, rewards.settings.reward.functions)
    statistics = set_statistics(
        values,
        np.concatenate([header.response_lengths for header in headers]).tolist(),
        np.concatenate([header.truncated for header in headers]).tolist(),
        held_out.samples,
    )
    return statistics.metrics(held_out.name)


def judged(
    parts: np.ndarray, held_out: HeldOutSet, functions: Mapping[str, RewardFunctionConfig]
) -> np.ndarray:
    """The values by which a set's responses are judged: those of the function held_out.reward or,
    if that is None, of the first function whose route takes the problem.

    Args:
        parts: [P, n * k] float64, the value of each function for each response; with
            held_out.reward only that function's, [1, n * k].

    Returns:
        [n, k] for n problems with k responses each.
    """
    by_problem = parts.reshape(len(parts), -1, held_out.samples)
    if held_out.reward is not None:
        return by_problem[0]
    judges = judges_of(held_out.prompts, functions)
    rows = [judges.get(prompt.uid, 0) for prompt in held_out.prompts]
    return by_problem[rows, np.arange(len(rows))]


def summary(
    scored: Sequence[Rewards], samples: Sequence[Sample], judges: Mapping[str, int] | None = None
) -> Evaluation:
    """Compute the metrics of an evaluation.

    Accuracy is the mean value of the first reward function whose route takes the prompt; a failed
    call counts in eval/error_rate, not as wrong. Each of data.sources also has its own accuracy.

    Without a reward function nothing is right or wrong: there are no metrics, and the samples'
    rewards are NaN.

    Args:
        scored: the rewards of one response per prompt.
        judges: the result of judges_of; None: the first function judges all.
    """
    if not scored[0].part_names:
        return Evaluation(metrics={}, samples=tuple(replace(s, reward=math.nan) for s in samples))
    uids = [uid for r in scored for uid in r.uids]
    parts = np.concatenate([r.parts for r in scored], axis=1)  # [P, N]
    values = parts[0]
    if judges is not None:
        values = parts[[judges.get(uid, 0) for uid in uids], np.arange(len(uids))]
    valid = values[np.isfinite(values)]
    stderr = float(valid.std(ddof=1) / np.sqrt(len(valid))) if len(valid) > 1 else math.nan
    return Evaluation(
        metrics={
            "eval/accuracy": float(valid.mean()) if len(valid) else math.nan,
            "eval/accuracy_stderr": stderr,
            "eval/error_rate": float(1 - len(valid) / len(values)),
            **accuracy_of_sources(uids, values),
        },
        samples=tuple(samples),
    )


def judges_of(
    prompts: Sequence[Prompt], functions: Mapping[str, RewardFunctionConfig]
) -> dict[str, int]:
    """Map the uid of each prompt to the index of the reward function that measures its accuracy:
    the first one whose route takes the prompt. Prompts that no function takes are absent.
    """
    routes = [function.route for function in functions.values()]
    return {
        prompt.uid: index
        for prompt in prompts
        for index in [i for i, route in enumerate(routes) if takes(route, prompt.columns)][:1]
    }


def accuracy_of_sources(uids: Sequence[str], values: Float) -> dict[str, float]:
    """eval/accuracy_source/NAME of each of data.sources; empty if there is only one source.

    Args:
        values: [N] values of the problems with these uids; NaN: the call failed.
    """
    names = [source_of(uid) for uid in uids]
    metrics = {}
    for name in dict.fromkeys(name for name in names if name is not None):
        of_source = values[[n == name for n in names]]
        valid = of_source[np.isfinite(of_source)]
        metrics[f"eval/accuracy_source/{name}"] = float(valid.mean()) if len(valid) else math.nan
    return metrics
