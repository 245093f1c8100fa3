"""How a step's prompts are divided: among student, teacher and data, and into chunks."""

import math

from hybridrl.settings.algorithm import AlgorithmConfig


def chunk_size(prompts: int, groups_per_chunk: int, engines: int) -> int:
    """Prompts of one chunk: groups_per_chunk, or fewer so that every engine gets a chunk.

    Example: 10 prompts, groups_per_chunk=96 and 2 engines give 5.
    """
    return max(min(groups_per_chunk, -(-prompts // engines)), 1)


def shares(prompts: int, algorithm: AlgorithmConfig, step: int) -> tuple[int, int, int]:
    """How many of a step's prompts the student, the first teacher and the data answer.

    They add up to `prompts`. What rounding subtracts from a share at one step it adds at a later
    one: over steps 0 ... n each source has answered its share of all prompts to within one. The
    numbers depend only on the step, so a resumed run continues them.

    Example: with 4 prompts and a tenth of them for the teacher, the teacher answers 0, 1, 0, 1, 0,
    0, 1, 0, 1, 0 in ten steps.

    Args:
        prompts: of one step, the same number at every step.
        step: from 0.
    """
    now = _answered(prompts * (step + 1), algorithm)
    before = _answered(prompts * step, algorithm)
    return now[0] - before[0], now[1] - before[1], now[2] - before[2]


def _answered(prompts: int, algorithm: AlgorithmConfig) -> tuple[int, int, int]:
    """The division of the first `prompts` prompts of a run.

    No entry decreases as `prompts` grows: the teacher's is a share of the prompts that the data
    does not answer.
    """
    by_data = math.floor(algorithm.data_fraction * prompts + 0.5)
    rest = prompts - by_data
    sampled_fraction = 1 - algorithm.data_fraction
    share = min(algorithm.teacher_fraction / sampled_fraction, 1.0) if sampled_fraction else 0.0
    by_teacher = math.floor(share * rest + 0.5)
    return rest - by_teacher, by_teacher, by_data
