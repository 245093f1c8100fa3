"""The reports of the workers of a step."""

from collections.abc import Sequence

from hybridrl.controller.sampling import Arrived
from hybridrl.types import LearnerStats, ScoreHeader, Work


def work_of(
    arrived: Sequence[Arrived], scores: Sequence[ScoreHeader], stats: LearnerStats
) -> list[tuple[str, Work]]:
    """The reports of a step, each with the name of its worker.

    Args:
        scores: one per chunk, teacher by teacher, as Sampling.scores returns them.
    """
    engines = [(a.drawn.chunk.header.worker, a.header.work) for a in arrived]
    num_teachers = len(arrived[0].drawn.scores)
    callees = [a.drawn.scores[k].header.worker for k in range(num_teachers) for a in arrived]
    scorers = zip(callees, (score.work for score in scores), strict=True)
    learners = [(f"learner/{rank}", work) for rank, work in enumerate(stats.work)]
    reports = [*engines, *scorers, *learners]
    return [(worker, work) for worker, work in reports if work is not None]
