"""Objectives: what each token of a scored batch is worth. The online one has every method as a
preset.
"""

from hybridrl.objectives.credit import Objective
from hybridrl.objectives.hybrid import HybridObjective
from hybridrl.objectives.pairs import PairObjective
from hybridrl.settings.run import RunSettings


def make_objective(settings: RunSettings) -> Objective:
    """Pairs where a pair loss is set, returns otherwise."""
    if settings.algorithm.ranks_pairs:
        return PairObjective(settings.algorithm)
    return HybridObjective(
        settings.algorithm,
        settings.rollout.response_limit,
        kinds=[settings.evidence_kind(name) for name in settings.scored_teachers],
        sampler_differs=settings.sampler_differs,
        clips_against_old=settings.clips_against_old,
    )
