"""One flat row per step, from headers and scalars alone. Every key is documented in the README's metric table."""

import math
from collections.abc import Sequence

import numpy as np

from hybridrl.types import ChunkHeader, LearnerStats, Rewards, ScoreHeader, UpdatePlan


def reward_metrics(rewards: Sequence[Rewards]) -> dict[str, float]:
    """Mean, standard error over sequences, error rate, and each function's own mean."""
    values = np.concatenate([r.values for r in rewards])
    errors = np.concatenate([r.errors for r in rewards])
    sound = values[~errors]
    row = {
        "reward/mean": float(sound.mean()) if len(sound) else float("nan"),
        "reward/stderr": float(sound.std(ddof=1) / np.sqrt(len(sound))) if len(sound) > 1 else float("nan"),
        "reward/error_rate": float(errors.mean()),
    }
    for k, name in enumerate(rewards[0].part_names):
        parts = np.concatenate([r.parts[k] for r in rewards])
        row[f"reward/{name}/mean"] = float(np.nanmean(parts)) if np.isfinite(parts).any() else float("nan")
    return row


def rollout_metrics(headers: Sequence[ChunkHeader], version: int) -> dict[str, float]:
    lengths = np.concatenate([h.response_lengths for h in headers])
    tokens = [int(h.response_lengths.sum()) for h in headers]
    sampled_by = np.average([h.mean_policy_version for h in headers], weights=np.maximum(tokens, 1))
    return {
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_p95": float(np.percentile(lengths, 95)),
        "rollout/truncated_frac": float(np.concatenate([h.truncated for h in headers]).mean()),
        "policy/staleness_mean": float(version - sampled_by),
        "transfer/bytes_rollout": float(sum(h.nbytes for h in headers)),
    }


def learner_metrics(plan: UpdatePlan, stats: LearnerStats) -> dict[str, float]:
    return {
        "train/loss": stats.loss,
        "train/grad_norm": stats.grad_norm,
        "train/lr": plan.lr,
        "train/tokens": float(plan.num_tokens),
        "grad/dense_norm": stats.dense_norm,
        "grad/sparse_norm": stats.sparse_norm,
        "schedule/lambda": plan.reward_weight,
        "schedule/imitation": float(sum(plan.teacher_weights)),
        "kl/token": stats.kl_token,
        "kl/sequence": stats.kl_sequence,
        "entropy/token": stats.entropy,
        **({"kl/sampled": stats.kl_sampled} if math.isfinite(stats.kl_sampled) else {}),
        "value/loss": stats.value_loss,
        "policy/bounded_frac": stats.bounded_frac,
        "policy/rho_mean": stats.rho_mean,
        "policy/ess": stats.ess,
        "policy/logprob_gap": stats.logprob_gap,
        **stats.diagnostics,
    }


def score_metrics(headers: Sequence[ScoreHeader]) -> dict[str, float]:
    return {"transfer/bytes_scores": float(sum(h.nbytes for h in headers))}
