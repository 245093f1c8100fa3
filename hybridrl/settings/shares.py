"""Arithmetic of a step: how many prompts go to whom, and how many into one chunk."""

import math

from hybridrl.settings.algorithm import AlgorithmConfig


def chunk_size(prompts: int, groups_per_chunk: int, engines: int) -> int:
    """Prompts of one chunk: as set, but every engine gets one. Example: 10 prompts,
    groups_per_chunk=96, 2 engines: 5.
    """
    return max(min(groups_per_chunk, -(-prompts // engines)), 1)


def shares(prompts: int, algorithm: AlgorithmConfig, step: int) -> tuple[int, int, int]:
    """How many of a step's prompts the student, the first teacher and the data answer; they add up
    to `prompts`.

    What rounding takes from a share at one step it gets at a later one: over steps 0 ... n each has
    answered its share of all prompts to within one. The numbers depend on the step alone, so a
    resumed run continues them. Example: 4 prompts, a tenth of them for the teacher: the teacher
    answers 0, 1, 0, 1, 0, 0, 1, 0, 1, 0 in ten steps.

    Args:
        prompts: of one step, the same number at every step.
        step: from 0.
    """
    now = _answered(prompts * (step + 1), algorithm)
    before = _answered(prompts * step, algorithm)
    by_student, by_teacher, by_data = (a - b for a, b in zip(now, before, strict=True))
    return by_student, by_teacher, by_data


def _answered(prompts: int, algorithm: AlgorithmConfig) -> tuple[int, int, int]:
    """Of the first `prompts` prompts of a run. No entry ever falls as `prompts` grows: the
    teacher's is a share of what the data leaves.
    """
    by_data = math.floor(algorithm.data_fraction * prompts + 0.5)
    rest = prompts - by_data
    sampled_fraction = 1 - algorithm.data_fraction
    share = min(algorithm.teacher_fraction / sampled_fraction, 1.0) if sampled_fraction else 0.0
    by_teacher = math.floor(share * rest + 0.5)
    return rest - by_teacher, by_teacher, by_data
