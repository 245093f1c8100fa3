"""The scheduled coefficients of the objective at each step."""

import math
from collections.abc import Mapping
from typing import Any

from hybridrl.core.errors import MetricError
from hybridrl.objectives.schedule import Schedule
from hybridrl.settings.choices import ScheduleKind
from hybridrl.settings.run import RunSettings

UNMEASURED_STEPS = 20
"""The number of steps within which the metric of a feedback schedule must be measured once.

Not every step measures every metric: a step whose responses all come from the data has no rewards.
"""


class Coefficients:
    """All schedules of a run: of lambda, of the imitation weight, of each teacher and of each
    reward function.

    Feedback schedules follow a metric of the user's choice. `observe` is the only place where
    metrics affect training.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        steps = settings.train.steps
        self.schedules = {
            "imitation": Schedule(settings.algorithm.imitation_weight, steps),
            "reward": Schedule(settings.algorithm.reward_weight, steps),
            **{
                f"teachers.{name}": Schedule(settings.teachers[name].schedule, steps)
                for name in settings.teachers
            },
            **{
                f"reward.{name}": Schedule(function.schedule, steps)
                for name, function in settings.reward.functions.items()
            },
        }
        self.unmeasured: dict[str, int] = {
            schedule.metric: 0
            for schedule in settings.schedules.values()
            if schedule.kind is ScheduleKind.feedback and schedule.metric is not None
        }
        """Metrics that no step of this process has measured yet, with the number of those steps."""

    def reward(self, step: int) -> float:
        """lambda, the weight of the reward, at a step."""
        return self.schedules["reward"].value(step)

    def teachers(self, step: int) -> tuple[float, ...]:
        """w_i of each scored teacher, in the order of settings.scored_teachers."""
        imitation = self.schedules["imitation"].value(step)
        teachers = self.settings.teachers
        return tuple(
            imitation * teachers[name].weight * self.schedules[f"teachers.{name}"].value(step)
            for name in self.settings.scored_teachers
        )

    def rewards(self, step: int) -> tuple[float, ...]:
        """The weight of each reward function, in the order of reward.functions."""
        return tuple(
            function.weight * self.schedules[f"reward.{name}"].value(step)
            for name, function in self.settings.reward.functions.items()
        )

    def observe(self, row: Mapping[str, float]) -> None:
        """Adjust the feedback schedules by the metrics of the step that used them.

        Raises:
            MetricError: the metric that a schedule follows was not measured in the first steps of
                this process, UNMEASURED_STEPS or diagnostics.every of them, whichever is more, or
                was not finite in any of them.
        """
        self.unmeasured = {
            metric: steps + 1
            for metric, steps in self.unmeasured.items()
            if not math.isfinite(row.get(metric, math.nan))
        }
        limit = max(UNMEASURED_STEPS, self.settings.diagnostics.every)
        for key, config in self.settings.schedules.items():
            if config.metric and self.unmeasured.get(config.metric, 0) >= limit:
                raise MetricError(
                    f"{key}.metric={config.metric}: none of the first {limit} steps of this "
                    "process measured it, so the weight would never change; follow a metric that "
                    "these settings measure, e.g. one of those in metrics.jsonl"
                )
        for schedule in self.schedules.values():
            schedule.observe(row)

    def state_dict(self) -> dict[str, Any]:
        return {name: schedule.state_dict() for name, schedule in self.schedules.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            if name in self.schedules:
                self.schedules[name].load_state_dict(value)
