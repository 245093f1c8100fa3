"""Metrics of the workers of each kind in a step. Their keys contain the name that the workers' logs
have, e.g. rollout.
"""

from collections.abc import Iterable, Mapping, Sequence

from hybridrl.settings.choices import Source
from hybridrl.types import ChunkHeader, EngineStats, ScoreHeader, Work

ENGINES = {Source.student: "rollout", Source.teacher: "teacher"}
"""The name of the engines that sample the responses of a source."""


def engine_metrics(
    headers: Sequence[ChunkHeader], scores: Sequence[ScoreHeader]
) -> dict[str, float]:
    """Use and queues of the engines of each kind: maxima over the engines, and sums of counts."""
    of_workers: dict[str, list[EngineStats]] = {}
    for header in headers:
        if header.engine is not None:
            of_workers.setdefault(ENGINES[header.source], []).append(header.engine)
    for score in scores:
        if score.engine is not None:
            of_workers.setdefault(f"scorer-{score.teacher}", []).append(score.engine)
    return joined(of_workers)


def work_metrics(reports: Iterable[tuple[str, Work]]) -> dict[str, float]:
    """Tokens per second and peak memory of the workers of each kind.

    Args:
        reports: each with the name of its worker, e.g. "rollout/0"; a worker may have several.
    """
    of_kinds: dict[str, dict[str, list[Work]]] = {}
    for worker, work in reports:
        kind = worker.rpartition("/")[0]
        of_kinds.setdefault(kind, {}).setdefault(worker, []).append(work)
    row: dict[str, float] = {}
    for kind, of_workers in of_kinds.items():
        speeds = [speed for works in of_workers.values() if (speed := tokens_per_s(works))]
        if speeds:
            row[f"perf/{kind}/tokens_per_s_min"] = min(speeds)
            row[f"perf/{kind}/tokens_per_s_mean"] = sum(speeds) / len(speeds)
        for work in (work for works in of_workers.values() for work in works):
            for phase, peak in work.peak_bytes.items():
                key = f"memory/{kind}/{phase}_bytes"
                row[key] = max(row.get(key, 0.0), float(peak))
    return row


def tokens_per_s(works: Sequence[Work]) -> float:
    """The throughput of one worker while it was busy; 0 if it never was."""
    busy_s = sum(work.busy_s for work in works)
    return sum(work.tokens for work in works) / busy_s if busy_s > 0 else 0.0


def joined(of_workers: Mapping[str, Sequence[EngineStats]]) -> dict[str, float]:
    """The metrics of the reports of each kind of engine.

    Args:
        of_workers: the reports, by the name of the engines.
    """
    row: dict[str, float] = {}
    for workers, reports in of_workers.items():
        row |= {
            f"engine/{workers}/kv_use": max(r.kv_use for r in reports),
            f"engine/{workers}/running": float(max(r.running for r in reports)),
            f"engine/{workers}/waiting": float(max(r.waiting for r in reports)),
            f"engine/{workers}/preemptions": float(sum(r.preemptions for r in reports)),
        }
        if queries := sum(r.prefix_queries for r in reports):
            hits = sum(r.prefix_hits for r in reports)
            row[f"engine/{workers}/prefix_hit_rate"] = hits / queries
    return row
