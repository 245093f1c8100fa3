"""The weights of the objective at each step, and their state."""

from collections.abc import Mapping
from typing import Any

from hybridrl.objectives.schedule import Schedule
from hybridrl.settings.run import RunSettings


class Weights:
    """Every schedule of a run: lambda, the imitation weight, one per teacher and one per reward
    function.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings, steps = settings, settings.train.steps
        self.schedules = {
            "imitation": Schedule(settings.algorithm.imitation_weight, steps),
            "reward": Schedule(settings.algorithm.reward_weight, steps),
            **{
                f"teachers.{name}": Schedule(settings.teachers[name].schedule, steps)
                for name in settings.teachers
            },
            **{
                f"reward.{name}": Schedule(f.schedule, steps)
                for name, f in settings.reward.functions.items()
            },
        }

    def reward(self, step: int) -> float:
        """lambda"""
        return self.schedules["reward"].value(step)

    def teachers(self, step: int) -> tuple[float, ...]:
        """w_i of each scored teacher."""
        imitation = self.schedules["imitation"].value(step)
        names, teachers = self.settings.scored_teachers, self.settings.teachers
        return tuple(
            imitation * teachers[name].weight * self.schedules[f"teachers.{name}"].value(step)
            for name in names
        )

    def rewards(self, step: int) -> tuple[float, ...]:
        """Of each reward function, in the order of reward.functions."""
        functions = self.settings.reward.functions
        return tuple(
            f.weight * self.schedules[f"reward.{name}"].value(step) for name, f in functions.items()
        )

    def observe(self, row: Mapping[str, float]) -> None:
        """Show the step's metrics to feedback schedules."""
        for schedule in self.schedules.values():
            schedule.observe(row)

    def state_dict(self) -> dict[str, Any]:
        return {name: schedule.state_dict() for name, schedule in self.schedules.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, held in state.items():
            if name in self.schedules:
                self.schedules[name].load_state_dict(held)
