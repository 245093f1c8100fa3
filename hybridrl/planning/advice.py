"""Advice on a plan: settings with which the run needs less and learns the same."""

from collections.abc import Iterator
from dataclasses import replace

from hybridrl.core.errors import ConfigError
from hybridrl.planning.plan import Plan, make_plan, shown
from hybridrl.settings.checks import check_places
from hybridrl.settings.run import RunSettings
from hybridrl.settings.shared_base_checks import check_shared_bases


def advice_lines(plan: Plan) -> Iterator[str]:
    """One line for each teacher for which the learner could score, so that it needs no workers."""
    before = seconds_of_step(plan)
    for name in plan.settings.teachers_with_scorers:
        settings = with_shared_base(plan.settings, name)
        if settings is None:
            continue
        changed = make_plan(settings, device=plan.device, device_bytes=plan.device_bytes)
        saved = all_bytes(plan) - all_bytes(changed)
        if saved > 0:
            yield (
                f"advice: teachers.{name}.share_base=true needs {shown(saved)} less in all: {name} "
                "is the student before training, and the learner can score by the same weights, "
                f"with its adapters switched off; a step takes {seconds_of_step(changed):.3g} s "
                f"in the place of {before:.3g} s"
            )


def with_shared_base(settings: RunSettings, teacher: str) -> RunSettings | None:
    """The settings with share_base of a teacher that has a scorer; None: they are refused."""
    shared = replace(settings.teachers[teacher], share_base=True)
    changed = replace(settings, teachers=settings.teachers | {teacher: shared})
    try:
        check_shared_bases(changed)
        check_places(changed)
    except ConfigError:
        return None
    return changed


def all_bytes(plan: Plan) -> int:
    """The most bytes that all devices together hold; on a CPU the node counts once."""
    return sum(plan.seat_bytes(seat) * max(seat.gpus, 1) for seat in plan.seats)


def seconds_of_step(plan: Plan) -> float:
    return plan.seconds.step(overlaps=plan.settings.pipeline.ahead > 0)
