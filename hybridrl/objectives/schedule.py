"""A weight that changes with the step or with a measured metric."""

import math
from collections.abc import Mapping

from hybridrl.settings.algorithm import ScheduleConfig
from hybridrl.settings.choices import ScheduleKind


class Schedule:
    """The weight of each step; only a feedback schedule has state.

    Example: linear from 0 to 2 over 4 steps: 0, 0.5, 1, 1.5, 2, 2, ...; feedback at 1.0 with gain
    -0.1 that sees a KL of twice its target: 0.9, 0.81, ...
    """

    def __init__(self, config: ScheduleConfig, train_steps: int) -> None:
        self.config = config
        self.length = config.steps or train_steps
        self.held = config.value

    def value(self, step: int) -> float:
        """The weight at step 0, 1, ..."""
        config = self.config
        if config.kind is ScheduleKind.feedback:
            return self.held
        if config.kind is ScheduleKind.constant or config.end is None:
            return config.value
        done = min(step / self.length, 1.0)
        if config.kind is ScheduleKind.step:
            done = float(step >= self.length)
        elif config.kind is ScheduleKind.cosine:
            done = (1 - math.cos(math.pi * done)) / 2
        return config.value + (config.end - config.value) * done

    def observe(self, row: Mapping[str, float]) -> None:
        """Change a feedback weight by the metrics of the step that used it; a missing or NaN metric
        leaves it as it is.
        """
        config = self.config
        if (
            config.kind is not ScheduleKind.feedback
            or config.metric is None
            or config.target is None
        ):
            return
        error = row.get(config.metric, math.nan) / config.target - 1
        if math.isfinite(error):
            self.held = self._bounded(self.held * (1 + config.gain * max(-1.0, min(error, 1.0))))

    def _bounded(self, weight: float) -> float:
        highest = math.inf if self.config.high is None else self.config.high
        return min(max(weight, self.config.low), highest)

    def state_dict(self) -> float | None:
        """The current weight of a feedback schedule; None for kinds without state."""
        return self.held if self.config.kind is ScheduleKind.feedback else None

    def load_state_dict(self, state: float | None) -> None:
        """Continue from a saved weight, within the bounds of the present settings.

        Args:
            state: of state_dict; None: the saved schedule had no state, so this one starts anew.
        """
        if state is not None:
            self.held = self._bounded(state)
