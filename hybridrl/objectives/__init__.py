"""Objectives: they compute the coefficients of each token of a scored batch in the gradient."""

from hybridrl.objectives.credit import Objective
from hybridrl.objectives.hybrid import HybridObjective
from hybridrl.objectives.pairs import PairObjective
from hybridrl.settings.run import RunSettings


def make_objective(settings: RunSettings) -> Objective:
    """The objective on pairs if the settings rank pairs, otherwise the online objective."""
    if settings.algorithm.ranks_pairs:
        return PairObjective(settings.algorithm)
    return HybridObjective(
        settings.algorithm,
        settings.rollout.response_limit,
        kinds=[settings.evidence_kind(name) for name in settings.scored_teachers],
        sampler_differs=settings.sampler_differs,
        clips_against_old=settings.clips_against_old,
    )
