"""`hybridrl report`: a finished or running run as one page and one picture, from its run directory alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hybridrl.errors import DataError
from hybridrl.tracking.comparison import comparison_panel
from hybridrl.tracking.console import duration
from hybridrl.tracking.figures import (
    Rows,
    draw_overview,
    draw_panel,
    panels_of,
    series,
    teacher_levels,
)
from hybridrl.tracking.jsonl import METRICS, read_metrics, read_samples
from hybridrl.tracking.page import render


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The measured numbers that the page is about. None: not measured in this run."""

    steps: int
    before: float | None  # held-out accuracy of the first evaluation
    after: float | None  # of the last one; None when there was only one
    before_stderr: float
    after_stderr: float
    teacher: tuple[str, float] | None  # the best teacher and its accuracy
    gap_closed: (
        float | None
    )  # (after - before) / (teacher - before); None unless the teacher was ahead
    wall_s: float | None  # sum of time/step_s
    tokens_per_s: float | None  # mean over steps
    kl_token: float | None  # of the last step


def write_report(run_dir: str | Path, others: Sequence[Path] = ()) -> Path:
    """Write report.html and report.png into the run directory; returns the path of the page.

    Args:
        others: run directories whose held-out accuracy is drawn beside this run's.

    Raises:
        DataError: the run has no metrics yet, or damaged ones.
    """
    run_dir = Path(run_dir)
    rows = sorted(read_metrics(run_dir), key=lambda row: row["train/step"])
    if not rows:
        raise DataError(
            f"{run_dir / METRICS}: no metrics, nothing to report; give the run.dir of a run that did a step"
        )
    settings = run_dir / "config.yaml"
    config_text = settings.read_text(encoding="utf-8") if settings.is_file() else ""
    config = yaml.safe_load(config_text) or {}
    facts, panels, name = measure(rows), panels_of(rows), run_dir.resolve().name
    if others:
        panels.insert(1, comparison_panel([run_dir, *others]))
    (run_dir / "report.png").write_bytes(draw_overview(panels, rows, name, headline(facts)))
    evaluations = read_samples(run_dir)
    page = render(
        name=name,
        sentences=summarize(facts, config),
        figures=key_figures(facts),
        curves=[(panel, draw_panel(panel, rows)) for panel in panels],
        setup=describe_setup(config),
        evaluations=[e for e in (evaluations[0], evaluations[-1]) if e] if evaluations else [],
        full_mark=full_mark(config),
        config_text=config_text,
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def measure(rows: Rows) -> Facts:
    """The facts of metric rows in step order."""
    evaluated, accuracy = series(rows, "eval/accuracy")
    stderr = {row["train/step"]: row.get("eval/accuracy_stderr", math.nan) for row in rows}
    before = float(accuracy[0]) if accuracy.size else None
    after = float(accuracy[-1]) if accuracy.size > 1 else None
    levels = teacher_levels(rows)
    teacher = max(levels.items(), key=lambda item: item[1]) if levels else None
    gap = None
    if teacher and before is not None and after is not None and teacher[1] > before:
        gap = (after - before) / (teacher[1] - before)
    wall, speed, kl = (
        series(rows, key)[1] for key in ("time/step_s", "perf/tokens_per_s", "kl/token")
    )
    return Facts(
        steps=int(rows[-1]["train/step"]),
        before=before,
        after=after,
        before_stderr=stderr[evaluated[0]] if accuracy.size else math.nan,
        after_stderr=stderr[evaluated[-1]] if accuracy.size else math.nan,
        teacher=teacher,
        gap_closed=gap,
        wall_s=float(wall.sum()) if wall.size else None,
        tokens_per_s=float(speed.mean()) if speed.size else None,
        kl_token=float(kl[-1]) if kl.size else None,
    )


def headline(facts: Facts) -> str:
    """The overview picture's second line."""
    parts = [_steps(facts.steps, "optimizer step")]
    if facts.after is not None:
        parts.insert(
            0,
            f"held-out accuracy {percent(facts.before)} \N{RIGHTWARDS ARROW} {percent(facts.after)}",
        )
    if facts.teacher:
        parts.insert(-1, f"teacher {percent(facts.teacher[1])}")
    if facts.wall_s is not None:
        parts.append(duration(facts.wall_s))
    return "  \N{MIDDLE DOT}  ".join(parts)


def summarize(facts: Facts, config: dict[str, Any]) -> list[str]:
    """The plain summary: what was trained how, what came of it, what it took."""
    trained = f"{_short(_get(config, 'model.path')) or 'A language model'} was trained for {_steps(facts.steps, 'step')}"
    if task := _get(config, "data.dataset") or _get(config, "data.task"):
        trained += f" on {task} problems"
    return [f"{trained}{_goal(config)}.", _outcome(facts), _cost(facts)]


def _goal(config: dict[str, Any]) -> str:
    teachers = [
        _short(t.get("path")) or "its own starting point"
        for t in (_get(config, "teachers") or {}).values()
    ]
    imitates = bool(teachers) and not _is_zero(_get(config, "algorithm.imitation_weight"))
    rewarded = bool(_get(config, "reward.functions")) and not _is_zero(
        _get(config, "algorithm.reward_weight")
    )
    imitate = f"imitate {' and '.join(teachers)} token by token (full-vocabulary KL divergence)"
    reward = (
        f"earn the reward of its own answers ({', '.join(_get(config, 'reward.functions') or ())})"
    )
    if imitates and rewarded:
        return f" to {imitate} and, in the same gradient, to {reward}"
    return f" to {imitate}" if imitates else f" to {reward}" if rewarded else ""


def _outcome(facts: Facts) -> str:
    if facts.before is None:
        return "Its accuracy on held-out problems was not measured."
    if facts.after is None:
        text = f"Its accuracy on held-out problems was measured once, {_with_error(facts.before, facts.before_stderr)}"
    elif facts.after == facts.before:
        text = f"Its accuracy on held-out problems stayed at {_with_error(facts.after, facts.after_stderr)}"
    else:
        verb = "rose" if facts.after > facts.before else "fell"
        text = (
            f"Its accuracy on held-out problems {verb} from {_with_error(facts.before, facts.before_stderr)}"
            f" to {_with_error(facts.after, facts.after_stderr)}"
        )
    if facts.teacher is None:
        return f"{text}; no teacher's accuracy was measured."
    text += f"; the teacher reaches {percent(facts.teacher[1])}"
    if facts.gap_closed is not None and facts.gap_closed > 0:
        text += f", so {percent(facts.gap_closed)} of the gap was closed"
    return f"{text}."


def _cost(facts: Facts) -> str:
    if facts.wall_s is None:
        return f"The run recorded {_steps(facts.steps, 'step')} and no times."
    speed = (
        f", at {facts.tokens_per_s:,.0f} tokens per second on average" if facts.tokens_per_s else ""
    )
    return f"The steps took {duration(facts.wall_s)} of wall time{speed}."


def key_figures(facts: Facts) -> list[tuple[str, str]]:
    """(number, what it is) for the row of key figures, those that were measured."""
    shown = [
        (percent(facts.before), "accuracy before") if facts.before is not None else None,
        (percent(facts.after), "accuracy after") if facts.after is not None else None,
        (percent(facts.teacher[1]), "teacher's accuracy") if facts.teacher else None,
        (percent(facts.gap_closed), "of the gap to the teacher closed")
        if facts.gap_closed is not None
        else None,
        (f"{facts.steps}", "optimizer steps"),
        (duration(facts.wall_s), "wall time of the steps") if facts.wall_s is not None else None,
        (f"{facts.kl_token:.3f}", "final distance to the teacher (KL, nats per token)")
        if facts.kl_token is not None
        else None,
    ]
    return [figure for figure in shown if figure]


def describe_setup(config: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of the settings a reader asks for first; absent ones are left out."""
    algorithm = "algorithm."
    pairs = [
        ("Student", _get(config, "model.path")),
        (
            "Teachers",
            ", ".join(
                t.get("path") or "the untrained student"
                for t in (_get(config, "teachers") or {}).values()
            ),
        ),
        ("Task", _get(config, "data.dataset") or _get(config, "data.task")),
        ("Reward", ", ".join(_get(config, "reward.functions") or ())),
        ("Imitation weight", _schedule(_get(config, algorithm + "imitation_weight"))),
        ("Reward weight (lambda)", _schedule(_get(config, algorithm + "reward_weight"))),
        ("Discount of future imitation cost (gamma)", _get(config, algorithm + "gamma")),
        ("Baseline", _get(config, algorithm + "baseline")),
        ("Prompts per step", _get(config, "train.prompts_per_step")),
        ("Responses per prompt", _get(config, "train.samples_per_prompt")),
        ("Learning rate", _get(config, "train.lr")),
        ("Held-out problems", _get(config, "data.num_heldout")),
        ("Seed", _get(config, "run.seed")),
    ]
    return [(name, str(value)) for name, value in pairs if value not in (None, "")]


def full_mark(config: dict[str, Any]) -> float:
    """The reward of a response that is right in everything: the sum of the reward weights, 1 when unknown."""
    functions = _get(config, "reward.functions") or {}
    return sum(float(f.get("weight", 1.0)) for f in functions.values()) or 1.0


def percent(value: float | None) -> str:
    """Example: percent(0.23) == "23.0 %"."""
    return "-" if value is None else f"{100 * value:.1f} %"


def _with_error(value: float, stderr: float) -> str:
    return (
        f"{percent(value)} (\N{PLUS-MINUS SIGN} {100 * stderr:.1f})"
        if math.isfinite(stderr)
        else percent(value)
    )


def _steps(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _get(config: dict[str, Any], dotted: str) -> Any:
    """The value at a dotted key of config.yaml, None where it is absent."""
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _short(path: str | None) -> str:
    """Example: _short("builtin:countdown-student") == "countdown-student"."""
    return (path or "").rstrip("/").split("/")[-1].removeprefix("builtin:")


def _is_zero(schedule: dict[str, Any] | None) -> bool:
    return bool(schedule) and schedule.get("value") == 0 and not schedule.get("end")


def _schedule(schedule: dict[str, Any] | None) -> str:
    if not schedule:
        return ""
    if schedule.get("kind", "constant") == "constant":
        return f"{schedule.get('value')}"
    over = f" over {schedule['steps']} steps" if schedule.get("steps") else ""
    return f"{schedule.get('value')} to {schedule.get('end')}, {schedule['kind']}{over}"
