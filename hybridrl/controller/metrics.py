"""One flat row per step, from headers and scalars alone. Every key is explained in
hybridrl.tracking.glossary.
"""

from collections.abc import Sequence

import numpy as np

from hybridrl.core.errors import ConfigError
from hybridrl.settings.choices import ScheduleKind, Source
from hybridrl.settings.run import RunSettings
from hybridrl.tracking.glossary import explain
from hybridrl.types import ChunkHeader, LearnerStats, Prompt, Rewards, ScoreHeader, UpdatePlan

PASS_MARK = 0.5
"""A response passes with a reward above it, as with a reward of 0 or 1."""


def check_metrics(settings: RunSettings) -> None:
    """What a setting follows is measured; otherwise a weight would stand still, and no checkpoint
    be the best, unnoticed.

    Raises:
        ConfigError: one sentence on the first that is not.
    """
    feedback = {
        f"{key}.metric": s.metric
        for key, s in settings.schedules.items()
        if s.kind is ScheduleKind.feedback
    }
    for key, metric in {**feedback, "checkpoint.best": settings.checkpoint.best}.items():
        if metric and explain(metric) is None:
            raise ConfigError(
                f"{key}={metric}: no step has such a metric; take one of "
                "hybridrl/tracking/METRICS.md, e.g. reward/mean"
            )
        if metric and metric.startswith("eval/") and key in feedback:
            raise ConfigError(
                f"{key}={metric}: is not measured in every step; take one that is, e.g. reward/mean"
            )


def reward_metrics(rewards: Sequence[Rewards]) -> dict[str, float]:
    """Of the responses that reward functions have scored; nothing where there is none."""
    scored = [r for r in rewards if r.part_names]
    if not scored:
        return {}
    values, errors = (
        np.concatenate([getattr(r, name) for r in scored]) for name in ("values", "errors")
    )
    sound = values[~errors]
    k = len(scored[0].values) // len(scored[0].uids)
    groups = values.reshape(-1, k)[
        ~errors.reshape(-1, k).any(axis=1)
    ]  # [G, K] without failed calls
    row = {
        "reward/mean": _mean(sound),
        "reward/stderr": float(sound.std(ddof=1) / np.sqrt(len(sound)))
        if len(sound) > 1
        else float("nan"),
        "reward/error_rate": float(errors.mean()),
        "reward/pass_at_k": _mean((groups > PASS_MARK).any(axis=1)),
        "reward/equal_groups_frac": _mean(groups.max(axis=1) == groups.min(axis=1)),
    }
    for i, name in enumerate(scored[0].part_names):
        row[f"reward/{name}/mean"] = _mean(np.concatenate([r.parts[i] for r in scored]))
    return row


def rollout_metrics(
    headers: Sequence[ChunkHeader], rewards: Sequence[Rewards], version: int
) -> dict[str, float]:
    """Of all responses; staleness of those that the student sampled; version: of the weights that
    learn.
    """
    lengths, truncated, aborted = (
        np.concatenate([getattr(h, name) for h in headers])
        for name in ("response_lengths", "truncated", "aborted")
    )
    row = {
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_p95": float(np.percentile(lengths, 95)),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated_frac": float(truncated.mean()),
        "rollout/eos_frac": float((~truncated & ~aborted).mean()),
    }
    for key, name in {"rollout/compressed": "compressed", "rollout/repeated": "repeated"}.items():
        if np.isfinite(mean := _mean(np.concatenate([getattr(r, name) for r in rewards]))):
            row[key] = mean
    if own := [h for h in headers if h.source is Source.student and h.response_lengths.any()]:
        sampled_by = np.average(
            [h.mean_policy_version for h in own], weights=[h.response_lengths.sum() for h in own]
        )
        row["policy/staleness_mean"] = float(version - sampled_by)
        row["policy/staleness_max"] = float(version - min(h.oldest_version.min() for h in own))
    return row


def learner_metrics(plan: UpdatePlan, stats: LearnerStats) -> dict[str, float]:
    return {
        "train/lr": plan.lr,
        "train/tokens": float(plan.num_tokens),
        "schedule/lambda": plan.reward_weight,
        "schedule/imitation": float(sum(plan.teacher_weights)),
        **stats.metrics,
    }


def transfer_metrics(
    headers: Sequence[ChunkHeader], scores: Sequence[ScoreHeader], weight_bytes: int, sync_s: float
) -> dict[str, float]:
    """What went through the object store, in all and per token of its kind."""
    tokens, response_tokens = (
        int(sum(getattr(h, name).sum() for h in headers))
        for name in ("num_tokens", "response_lengths")
    )
    rollout = sum(h.nbytes for h in headers)
    signals = sorted({signal for s in scores for signal in s.nbytes})
    by_signal = {signal: sum(s.nbytes.get(signal, 0) for s in scores) for signal in signals}
    row = {
        "transfer/bytes_rollout": float(rollout),
        "transfer/bytes_scores": float(sum(by_signal.values())),
        "transfer/bytes_weights": float(weight_bytes),
        "transfer/token_bytes/rollout": rollout / max(tokens, 1),
        "perf/weights_gb_per_s": weight_bytes / 1e9 / max(sync_s, 1e-9),
    }
    return row | {
        f"transfer/token_bytes/{signal}": nbytes / max(response_tokens, 1)
        for signal, nbytes in by_signal.items()
    }


def worker_times(
    headers: Sequence[ChunkHeader], scores: Sequence[ScoreHeader], stats: LearnerStats
) -> dict[str, float]:
    """By the workers' own clocks. How long responses took shows stragglers; how long workers were
    busy shows what overlaps.
    """
    finish_s = np.concatenate([h.finish_s for h in headers])
    return {
        "time/response_s_p50": float(np.percentile(finish_s, 50)),
        "time/response_s_p95": float(np.percentile(finish_s, 95)),
        "time/response_s_max": float(finish_s.max()),
        "time/scorers_busy_s": float(sum(s.score_s for s in scores)),
        "time/learner_busy_s": stats.learn_s,
    }


def late_metrics(late: Sequence[Prompt], num_sampled: int) -> dict[str, float]:
    """Share of the sampled groups, those that were cancelled included, that were cancelled or too
    old.
    """
    return {"rollout/late_frac": len(late) / num_sampled}


def _mean(values: np.ndarray) -> float:
    """Of the finite ones; NaN of none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
