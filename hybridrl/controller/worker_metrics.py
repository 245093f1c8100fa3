"""What the workers of each kind did in a step: metrics by the names that their logs have."""

from collections.abc import Mapping, Sequence

from hybridrl.settings.choices import Source
from hybridrl.types import ChunkHeader, EngineStats, ScoreHeader

ENGINES = {Source.student: "rollout", Source.teacher: "teacher"}
"""The workers that sample the responses of a source."""


def engine_metrics(
    headers: Sequence[ChunkHeader], scores: Sequence[ScoreHeader]
) -> dict[str, float]:
    """Of the engines of each kind: the largest values of an engine, and sums of what is counted."""
    of_workers: dict[str, list[EngineStats]] = {}
    for header in headers:
        if header.engine is not None:
            of_workers.setdefault(ENGINES[header.source], []).append(header.engine)
    for score in scores:
        if score.engine is not None:
            of_workers.setdefault(f"scorer-{score.teacher}", []).append(score.engine)
    return joined(of_workers)


def joined(of_workers: Mapping[str, Sequence[EngineStats]]) -> dict[str, float]:
    """The metrics of these reports, by the names of the workers."""
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
