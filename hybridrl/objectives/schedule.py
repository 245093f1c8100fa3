"""A weight that changes with the step."""

import math

from hybridrl.choices import ScheduleKind
from hybridrl.config import ScheduleConfig


def schedule_value(config: ScheduleConfig, step: int, train_steps: int) -> float:
    """The weight at step 0, 1, ...

    Example: linear from 0 to 2 over 4 steps: 0, 0.5, 1, 1.5, 2, 2, ...
    """
    length = config.steps or train_steps
    if config.kind is ScheduleKind.constant or config.end is None:
        return config.value
    done = min(step / length, 1.0)
    if config.kind is ScheduleKind.step:
        done = float(step >= length)
    elif config.kind is ScheduleKind.cosine:
        done = (1 - math.cos(math.pi * done)) / 2
    return config.value + (config.end - config.value) * done
