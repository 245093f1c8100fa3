"""The row of metrics of a step, computed from headers and scalars only. Every key is explained in
hybridrl.tracking.glossary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from hybridrl.controller.step_cost import StepCost
from hybridrl.controller.worker_metrics import engine_metrics, work_metrics
from hybridrl.core.errors import ConfigError
from hybridrl.data.problem import source_of
from hybridrl.settings.choices import ScheduleKind, Source
from hybridrl.settings.held_out import pass_sizes
from hybridrl.settings.run import RunSettings
from hybridrl.tracking.glossary import explain
from hybridrl.types import BatchPlan, ChunkHeader, LearnerStats, Rewards, ScoreHeader, Work

PASS_MARK = 0.5
"""A response passes if its reward is above this, so that of rewards 0 and 1 only 1 passes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """The measurements of a finished step, from which its row of metrics is computed."""

    steps_done: int
    headers: Sequence[ChunkHeader]
    rewards: Sequence[Rewards]
    scores: Sequence[ScoreHeader]
    plan: BatchPlan
    stats: LearnerStats
    cost: StepCost
    probe_gap: float  # nats a token, the largest over the engines
    num_late: int  # groups that were cancelled or too old
    num_sampled: int  # groups, including the cancelled ones
    in_flight_bytes: int  # of the waves of later steps
    materialized_bytes: int  # per-token data that the controller fetched
    restarts: int  # workers that were replaced so far
    step_s: float
    sync_s: float  # seconds until every engine had acknowledged the new weights
    phases: Mapping[str, float]  # time/<phase>_s
    # For each of data.sources, the number of prompts drawn so far over the number that it has
    epochs: Mapping[str, float] = field(default_factory=dict)
    work: Sequence[tuple[str, Work]] = ()  # (worker name, report)


def check_metrics(settings: RunSettings) -> None:
    """Check that every metric that a setting names exists, and is measured where it is needed.

    Otherwise the weight of a feedback schedule would never change, or no checkpoint would be the
    best, without an error.

    Raises:
        ConfigError: a metric does not exist, or a feedback schedule follows a metric of
            evaluations, which not every step measures.
    """
    feedback = {
        f"{key}.metric": schedule.metric
        for key, schedule in settings.schedules.items()
        if schedule.kind is ScheduleKind.feedback
    }
    for key, metric in {**feedback, "checkpoint.best": settings.checkpoint.best}.items():
        if metric and explain(metric) is None:
            raise ConfigError(
                f"{key}={metric}: there is no such metric; choose one of "
                "hybridrl/tracking/METRICS.md, e.g. reward/mean"
            )
        if metric and (of_set := set_metric(metric)) is not None:
            check_set_metric(key, metric, of_set, settings)
        if metric and metric.startswith("eval/") and key in feedback:
            raise ConfigError(
                f"{key}={metric}: is not measured in every step; choose one that is, e.g. "
                "reward/mean"
            )


def set_metric(metric: str) -> tuple[str, str] | None:
    """Split the metric of a held-out set into the set's name and the rest; None: it is another
    metric.

    Example: "eval/hard/pass_at_4" -> ("hard", "pass_at_4").
    """
    entry = explain(metric)
    if entry is None or not entry.key.startswith("eval/<set>/"):
        return None
    _, name, rest = metric.split("/", 2)
    return name, rest


def check_set_metric(key: str, metric: str, of_set: tuple[str, str], settings: RunSettings) -> None:
    """Check that the evaluations of a run measure a metric of a held-out set.

    Args:
        key: the setting that names the metric.
        of_set: the result of set_metric.

    Raises:
        ConfigError: there is no such set, or no such k of pass@k.
    """
    name, rest = of_set
    sets = settings.eval.sets
    if name not in sets:
        raise ConfigError(
            f"{key}={metric}: there is no set {name}; eval.sets has {', '.join(sets) or 'none'}"
        )
    sizes = [f"pass_at_{k}" for k in pass_sizes(sets[name].samples)]
    if rest.startswith("pass_at_") and rest not in sizes:
        raise ConfigError(
            f"{key}={metric}: eval.sets.{name}.samples={sets[name].samples} measures "
            f"{', '.join(sizes)}; choose one of them"
        )


def step_row(record: StepRecord) -> dict[str, float]:
    """The metrics of a step."""
    num_tokens = float(sum(header.response_lengths.sum() for header in record.headers))
    return {
        "train/step": float(record.steps_done),
        **reward_metrics(record.rewards),
        **rollout_metrics(record.headers, record.rewards, record.plan.step),
        **source_metrics(record.headers, record.rewards, record.epochs),
        **learner_metrics(record.plan, record.stats),
        **transfer_metrics(record.headers, record.scores, record.cost, record.sync_s),
        "rollout/late_frac": record.num_late / record.num_sampled,
        "policy/probe_gap": record.probe_gap,
        "transfer/inflight_bytes": float(record.in_flight_bytes),
        "controller/materialized_bytes": float(record.materialized_bytes),
        "perf/tokens_per_s": num_tokens / record.step_s,
        "time/step_s": record.step_s,
        "cluster/restarts": float(record.restarts),
        **worker_times(record.headers, record.scores, record.stats),
        **engine_metrics(record.headers, record.scores),
        **work_metrics(record.work),
        **record.phases,
    }


def reward_metrics(rewards: Sequence[Rewards]) -> dict[str, float]:
    """Rewards of the responses that reward functions scored; empty if there are none."""
    rewarded = [r for r in rewards if r.part_names]
    if not rewarded:
        return {}
    values = np.concatenate([r.values for r in rewarded])  # [N] float32
    errors = np.concatenate([r.errors for r in rewarded])  # [N] bool
    valid = values[~errors]
    group_size = len(rewarded[0].values) // len(rewarded[0].uids)
    failed = errors.reshape(-1, group_size).any(axis=1)  # [G] bool
    groups = values.reshape(-1, group_size)[~failed]  # [G', K] without failed calls
    stderr = float(valid.std(ddof=1) / np.sqrt(len(valid))) if len(valid) > 1 else float("nan")
    row = {
        "reward/mean": _mean(valid),
        "reward/stderr": stderr,
        "reward/error_rate": float(errors.mean()),
        "reward/pass_at_k": _mean((groups > PASS_MARK).any(axis=1)),
        "reward/equal_groups_frac": _mean(np.equal(groups.max(axis=1), groups.min(axis=1))),
    }
    for i, name in enumerate(rewarded[0].part_names):
        row[f"reward/{name}/mean"] = _mean(np.concatenate([r.parts[i] for r in rewarded]))
    return row


def rollout_metrics(
    headers: Sequence[ChunkHeader], rewards: Sequence[Rewards], version: int
) -> dict[str, float]:
    """Lengths and finish reasons of all responses, and the staleness of those that the student
    sampled.

    Args:
        version: the version of the weights that the step updates.
    """
    lengths = np.concatenate([h.response_lengths for h in headers])  # [N] int64
    truncated = np.concatenate([h.truncated for h in headers])  # [N] bool
    aborted = np.concatenate([h.aborted for h in headers])  # [N] bool
    row = {
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_p95": float(np.percentile(lengths, 95)),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated_frac": float(truncated.mean()),
        "rollout/eos_frac": float((~truncated & ~aborted).mean()),
    }
    compressed = _mean(np.concatenate([r.compressed for r in rewards]))
    repeated = _mean(np.concatenate([r.repeated for r in rewards]))
    if np.isfinite(compressed):
        row["rollout/compressed"] = compressed
    if np.isfinite(repeated):
        row["rollout/repeated"] = repeated
    sampled = [h for h in headers if h.source is Source.student and h.response_lengths.any()]
    if sampled:
        mean_version = np.average(
            [h.mean_policy_version for h in sampled],
            weights=[h.response_lengths.sum() for h in sampled],
        )
        row["policy/staleness_mean"] = float(version - mean_version)
        row["policy/staleness_max"] = float(version - min(h.oldest_version.min() for h in sampled))
    return row


def source_metrics(
    headers: Sequence[ChunkHeader], rewards: Sequence[Rewards], epochs: Mapping[str, float]
) -> dict[str, float]:
    """Share, epochs, lengths and rewards of each of data.sources; empty if there is only one
    source. A source without a prompt in the step has only a share and epochs.

    Args:
        epochs: as in StepRecord.
    """
    row: dict[str, float] = {}
    if not epochs:
        return row
    # [N] each: one entry for each response
    names = np.array(
        [source_of(uid) for header in headers for uid in np.repeat(header.uids, header.group_size)]
    )
    lengths = np.concatenate([h.response_lengths for h in headers])
    truncated = np.concatenate([h.truncated for h in headers])
    values = np.concatenate([rewarded_values(r) for r in rewards])
    prompts = [source_of(uid) for header in headers for uid in header.uids]
    for name, epoch in epochs.items():
        of_source = names == name
        row[f"data/{name}/share"] = prompts.count(name) / len(prompts)
        row[f"data/{name}/epochs"] = epoch
        if of_source.any():
            row[f"data/{name}/length_mean"] = float(lengths[of_source].mean())
            row[f"data/{name}/truncated_frac"] = float(truncated[of_source].mean())
        if np.isfinite(values[of_source]).any():
            row[f"data/{name}/reward_mean"] = _mean(values[of_source])
    return row


def rewarded_values(rewards: Rewards) -> np.ndarray:
    """[N] the rewards from reward functions; NaN where a call failed or there is no function."""
    if not rewards.part_names:
        return np.full(len(rewards.values), np.nan)
    return np.where(rewards.errors, np.nan, rewards.values)


def learner_metrics(plan: BatchPlan, stats: LearnerStats) -> dict[str, float]:
    update = plan.mini_batches[0]  # learning rate and weights are the same in every update
    return {
        "train/lr": update.lr,
        "train/tokens": float(plan.num_tokens),
        "schedule/lambda": update.reward_weight,
        "schedule/imitation": float(sum(update.teacher_weights)),
        **stats.metrics,
    }


def transfer_metrics(
    headers: Sequence[ChunkHeader], scores: Sequence[ScoreHeader], cost: StepCost, sync_s: float
) -> dict[str, float]:
    """Bytes of rollouts, scores and weights, in total and per token."""
    num_tokens = int(sum(h.num_tokens.sum() for h in headers))
    num_response_tokens = int(sum(h.response_lengths.sum() for h in headers))
    row = {
        "transfer/bytes_rollout": float(cost.rollout_bytes),
        "transfer/bytes_scores": float(cost.score_bytes),
        "transfer/bytes_weights": float(cost.weight_bytes),
        "transfer/token_bytes/rollout": cost.rollout_bytes / max(num_tokens, 1),
        "perf/weights_gb_per_s": cost.weight_bytes / 1e9 / max(sync_s, 1e-9),
    }
    for signal in sorted({signal for score in scores for signal in score.nbytes}):
        nbytes = sum(score.nbytes.get(signal, 0) for score in scores)
        row[f"transfer/token_bytes/{signal}"] = nbytes / max(num_response_tokens, 1)
    return row


def worker_times(
    headers: Sequence[ChunkHeader], scores: Sequence[ScoreHeader], stats: LearnerStats
) -> dict[str, float]:
    """Times by the workers' own clocks. The times of sampled responses show stragglers; the busy
    times of the workers show what overlaps.
    """
    finish_s = [h.finish_s for h in headers if h.source is not Source.data]  # [N] float32 of each
    return {
        **(response_times(np.concatenate(finish_s)) if finish_s else {}),
        "time/scorers_busy_s": float(sum(s.score_s for s in scores)),
        "time/learner_busy_s": stats.learn_s,
    }


def response_times(finish_s: np.ndarray) -> dict[str, float]:
    """Median, 95th percentile and maximum of the time of a response.

    Args:
        finish_s: [N] seconds that each sampled response took.
    """
    return {
        "time/response_s_p50": float(np.percentile(finish_s, 50)),
        "time/response_s_p95": float(np.percentile(finish_s, 95)),
        "time/response_s_max": float(finish_s.max()),
    }


def _mean(values: ArrayLike) -> float:
    """The mean of the finite values; NaN if there is none."""
    array = np.asarray(values)
    finite = array[np.isfinite(array)]
    return float(finite.mean()) if len(finite) else float("nan")
