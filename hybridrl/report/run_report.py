"""`hybridrl report DIR`: writes a page and a picture of one run, finished or not, into its
directory.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridrl.core.errors import DataError
from hybridrl.core.files import replace_bytes, replace_text
from hybridrl.report.chart import Rows, series
from hybridrl.report.figures import charts_of, teacher_levels
from hybridrl.report.html import render
from hybridrl.report.picture import draw_overview
from hybridrl.report.saved_config import read_config
from hybridrl.tracking.console import duration
from hybridrl.tracking.jsonl import METRICS, read_metrics, read_samples, read_token_samples
from hybridrl.tracking.symptoms import watch


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The measured numbers that the report presents. None: not measured in this run."""

    steps: int
    before: float | None  # held-out accuracy of the first evaluation
    after: float | None  # of the last evaluation; None if there was only one
    before_stderr: float  # standard errors over problems; NaN: not measured
    after_stderr: float
    teacher: tuple[str, float] | None  # the best teacher and its accuracy
    # (after - before) / (teacher - before); None unless the teacher was better before training
    gap_closed: float | None
    wall_s: float | None  # sum of time/step_s
    tokens_per_s: float | None  # mean over steps
    kl_token: float | None  # of the last step
    loss: tuple[float, float] | None  # on the held-out data's responses, first and last evaluation
    pair_accuracy: tuple[float, float] | None  # on held-out pairs, first and last evaluation


def write_report(run_dir: str | Path) -> Path:
    """Write report.html and report.png into the run directory; returns the path of the page.

    Raises:
        DataError: the run has no metrics yet, or one of its files is damaged.
        RunDirectoryError: a file that is read is a link or a special file.
        OSError: a file cannot be read or written.
    """
    run_dir = Path(run_dir)
    rows = sorted(read_metrics(run_dir), key=lambda row: row["train/step"])
    if not rows:
        raise DataError(
            f"{run_dir / METRICS}: no metrics, nothing to report; give the run.dir of a run that "
            "did a step"
        )
    config, config_text = read_config(run_dir)
    facts = measure(rows)
    charts = charts_of(rows)
    name = run_dir.resolve().name
    replace_bytes(run_dir / "report.png", draw_overview(charts, name, headline(facts)))
    evaluations = read_samples(run_dir)
    page = render(
        name=name,
        warning=watch(rows).summary(),
        sentences=summarize(facts, config),
        figures=key_figures(facts),
        curves=charts,
        setup=describe_setup(config),
        evaluations=[e for e in (evaluations[0], evaluations[-1]) if e] if evaluations else [],
        weights=reward_weights(config),
        token_samples=[rows for rows in read_token_samples(run_dir) if rows],
        config_text=config_text,
    )
    path = run_dir / "report.html"
    replace_text(path, page)
    return path


def measure(rows: Rows) -> Facts:
    """The facts of at least one row of metrics; the rows must be in step order."""
    evaluated, accuracy = series(rows, "eval/accuracy")
    stderr = {row["train/step"]: row.get("eval/accuracy_stderr", math.nan) for row in rows}
    before = float(accuracy[0]) if accuracy.size else None
    after = float(accuracy[-1]) if accuracy.size > 1 else None
    levels = teacher_levels(rows)
    teacher = max(levels.items(), key=lambda item: item[1]) if levels else None
    gap = None
    if teacher and before is not None and after is not None and teacher[1] > before:
        gap = (after - before) / (teacher[1] - before)
    _, wall = series(rows, "time/step_s")
    _, speed = series(rows, "perf/tokens_per_s")
    _, kl = series(rows, "kl/token")
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
        loss=_first_and_last(rows, "eval/loss"),
        pair_accuracy=_first_and_last(rows, "eval/pair_accuracy"),
    )


def _first_and_last(rows: Rows, key: str) -> tuple[float, float] | None:
    _, values = series(rows, key)
    return (float(values[0]), float(values[-1])) if values.size else None


def headline(facts: Facts) -> str:
    """The subtitle of the picture."""
    parts = [_steps(facts.steps, "optimizer step")]
    if facts.after is not None:
        parts.insert(
            0,
            f"held-out accuracy {percent(facts.before)} \N{RIGHTWARDS ARROW} "
            f"{percent(facts.after)}",
        )
    if facts.loss is not None:
        before, after = facts.loss
        parts.insert(-1, f"held-out loss {before:.3f} \N{RIGHTWARDS ARROW} {after:.3f}")
    if facts.teacher:
        parts.insert(-1, f"teacher {percent(facts.teacher[1])}")
    if facts.wall_s is not None:
        parts.append(duration(facts.wall_s))
    return "  \N{MIDDLE DOT}  ".join(parts)


def summarize(facts: Facts, config: dict[str, Any]) -> list[str]:
    """The summary as sentences: what was trained and how, the outcome, and the cost."""
    trained = (
        f"{_short(_get(config, 'model.path')) or 'A language model'} was trained for "
        f"{_steps(facts.steps, 'step')}"
    )
    if task := _task(config):
        trained += f" on {task}"
    sentences = [f"{trained}{_goal(config)}."]
    if unused := _rewards(config, counted=False):
        sentences.append(
            f"The reward {' and '.join(unused)} was only measured: it has no part in the gradient."
        )
    return [*sentences, *_outcomes(facts), _cost(facts)]


def _held_out(config: dict[str, Any]) -> str:
    """The number of held-out problems in words, e.g. "512" or "24 of each source"."""
    number = str(_get(config, "data.num_heldout") or "")
    return f"{number} of each source" if number and _get(config, "data.sources") else number


def _task(config: dict[str, Any]) -> str:
    """The source of the prompts in words: the name of the file or of the generator of problems, or
    the names of data.sources with their shares.
    """
    if sources := _get(config, "data.sources"):
        weights = {name: float(source.get("weight") or 1) for name, source in sources.items()}
        total = sum(weights.values())
        return ", ".join(f"{name} ({weight / total:.0%})" for name, weight in weights.items())
    if path := _get(config, "data.path"):
        return _short(str(path))
    task = _get(config, "data.task")
    name = (_get(config, "data.dataset") if task == "reasoning_gym" else None) or task
    return f"{name} problems" if name else ""


def _rewards(config: dict[str, Any], *, counted: bool) -> list[str]:
    """Names of the reward functions that contribute to the gradient, or, if not `counted`, of those
    that do not.
    """
    functions = _get(config, "reward.functions") or {}
    ranks_own_pairs = _is_pairs(config) and not _get(config, "algorithm.data_fraction")
    used = ranks_own_pairs or not _is_zero(_get(config, "algorithm.reward_weight"))
    return [
        name
        for name, function in functions.items()
        if (used and float((function or {}).get("weight", 1.0)) != 0) is counted
    ]


def _is_pairs(config: dict[str, Any]) -> bool:
    return _get(config, "algorithm.pair.loss") not in (None, "none")


def _goal(config: dict[str, Any]) -> str:
    """The goals of the training, as a clause that begins with a space; empty if unknown."""
    goals = [_pair_goal(config), *_likelihood_goals(config), _imitation_goal(config)]
    if not _is_pairs(config) and (rewards := _rewards(config, counted=True)):
        goals.append(f"earn the reward of its own answers ({', '.join(rewards)})")
    goals = [goal for goal in goals if goal]
    if len(goals) == 2:
        return f" to {goals[0]} and, in the same gradient, to {goals[1]}"
    return f" to {', to '.join(goals)}" if goals else ""


def _pair_goal(config: dict[str, Any]) -> str:
    if not _is_pairs(config):
        return ""
    pairs = f"the {_get(config, 'algorithm.pair.loss')} loss"
    if _get(config, "algorithm.data_fraction"):
        return (
            f"prefer the chosen response of each pair in the data over the rejected one ({pairs})"
        )
    rewards = " and ".join(_rewards(config, counted=True)) or "reward"
    return f"prefer the best of its own answers by {rewards} over the worst ({pairs})"


def _likelihood_goals(config: dict[str, Any]) -> list[str]:
    if _is_pairs(config) or not _get(config, "algorithm.nll_weight"):
        return []
    goals = []
    if _get(config, "algorithm.data_fraction"):
        goals.append("write the responses that the data gives (their likelihood)")
    if _get(config, "algorithm.teacher_fraction"):
        goals.append(f"write what {_teachers(config)[0]} writes (its likelihood)")
    return goals


def _imitation_goal(config: dict[str, Any]) -> str:
    if not _teachers(config) or _is_zero(_get(config, "algorithm.imitation_weight")):
        return ""
    divergence = {"forward_kl": "forward KL divergence", "jsd": "Jensen-Shannon divergence"}.get(
        str(_get(config, "algorithm.divergence")), "KL divergence"
    )
    drawn = "on sampled tokens"
    likely = "on the most likely tokens"
    of_method = {"sampled": drawn, "topk": likely}.get(
        str(_get(config, "algorithm.support")), "full-vocabulary"
    )
    of_evidence = {"drawn": drawn, "support": likely}
    of_teachers = {
        of_evidence.get(str((t or {}).get("evidence")), of_method)
        for t in (_get(config, "teachers") or {}).values()
    }
    support = of_teachers.pop() if len(of_teachers) == 1 else of_method
    how = f"{support} {divergence}" if support == "full-vocabulary" else f"{divergence} {support}"
    return f"imitate {' and '.join(_teachers(config))} token by token ({how})"


def _teachers(config: dict[str, Any]) -> list[str]:
    return [
        _short((t or {}).get("path"))
        or (t or {}).get("url")
        or (t or {}).get("model")
        or "the initial student"
        for t in (_get(config, "teachers") or {}).values()
    ]


def _outcomes(facts: Facts) -> list[str]:
    """Sentences about the held-out data: on sampled answers, and on the data's own responses."""
    sentences = []
    if facts.before is not None or facts.loss is None:
        sentences.append(_outcome(facts))
    if facts.loss is not None:
        before, after = facts.loss
        sentences.append(
            f"Its loss on the held-out data's responses went from {before:.3f} to {after:.3f}."
        )
    if facts.pair_accuracy is not None:
        before, after = facts.pair_accuracy
        sentences.append(
            f"It ranked {percent(before)} of the held-out pairs correctly at first, "
            f"{percent(after)} at the end."
        )
    return sentences


def _outcome(facts: Facts) -> str:
    if facts.before is None:
        return "Its accuracy on held-out problems was not measured."
    if facts.after is None:
        text = (
            "Its accuracy on held-out problems was measured once, "
            f"{with_error(facts.before, facts.before_stderr)}"
        )
    elif facts.after == facts.before:
        text = (
            "Its accuracy on held-out problems stayed at "
            f"{with_error(facts.after, facts.after_stderr)}"
        )
    else:
        verb = "rose" if facts.after > facts.before else "fell"
        text = (
            f"Its accuracy on held-out problems {verb} from "
            f"{with_error(facts.before, facts.before_stderr)} to "
            f"{with_error(facts.after, facts.after_stderr)}"
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
    """(number, its meaning) of each key figure that was measured."""
    figures = []
    if facts.before is not None:
        figures.append((percent(facts.before), "accuracy before"))
    if facts.after is not None:
        figures.append((percent(facts.after), "accuracy after"))
    if facts.teacher is not None:
        figures.append((percent(facts.teacher[1]), "teacher's accuracy"))
    if facts.gap_closed is not None:
        figures.append((percent(facts.gap_closed), "of the gap to the teacher closed"))
    figures.append((f"{facts.steps}", "optimizer steps"))
    if facts.wall_s is not None:
        figures.append((duration(facts.wall_s), "wall time of the steps"))
    if facts.loss is not None:
        figures.append((f"{facts.loss[1]:.3f}", "final loss on held-out data"))
    if facts.pair_accuracy is not None:
        figures.append((percent(facts.pair_accuracy[1]), "held-out pairs ranked right"))
    if facts.kl_token is not None:
        distance = f"{facts.kl_token:.3f}"
        figures.append((distance, "final distance to the teacher (KL, nats per token)"))
    return figures


def describe_setup(config: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of the most important settings, without those that are absent."""
    algorithm = "algorithm."
    pairs = [
        ("Student", _get(config, "model.path")),
        ("Arithmetic", _arithmetic(config)),
        (
            "Teachers",
            ", ".join(
                (t or {}).get("path")
                or (t or {}).get("url")
                or (t or {}).get("model")
                or "the initial student"
                for t in (_get(config, "teachers") or {}).values()
            ),
        ),
        ("Task", _task(config)),
        ("Reward", ", ".join(_rewards(config, counted=True))),
        ("Measured only", ", ".join(_rewards(config, counted=False))),
        ("Imitation weight", _schedule(_get(config, algorithm + "imitation_weight"))),
        ("Reward weight (lambda)", _schedule(_get(config, algorithm + "reward_weight"))),
        ("Discount of future imitation cost (gamma)", _get(config, algorithm + "gamma")),
        ("Baseline", _get(config, algorithm + "advantage") or _get(config, algorithm + "baseline")),
        ("Prompts per step", _get(config, "train.prompts_per_step")),
        ("Responses per prompt", _get(config, "train.samples_per_prompt")),
        ("Learning rate", _get(config, "train.lr")),
        ("Held-out problems, at most", _held_out(config)),
        ("Seed", _get(config, "run.seed")),
    ]
    return [(name, str(value)) for name, value in pairs if value not in (None, "")]


def _arithmetic(config: dict[str, Any]) -> str:
    """The dtype of the student, and that of its matrix products if it differs."""
    dtype = str(_get(config, "model.dtype") or "")
    wide = dtype == "bfloat16" and _get(config, "train.products") == "float32"
    return f"{dtype}, products in float32 on CPUs" if wide else dtype


def reward_weights(config: dict[str, Any]) -> dict[str, float]:
    """The weight of each reward function, by its name."""
    functions = _get(config, "reward.functions") or {}
    return {name: float((f or {}).get("weight", 1.0)) for name, f in functions.items()}


def percent(value: float | None) -> str:
    """Example: percent(0.23) == "23.0 %"."""
    return "-" if value is None else f"{100 * value:.1f} %"


def with_error(value: float, stderr: float) -> str:
    """Example: with_error(0.23, 0.012) == "23.0 % (\N{PLUS-MINUS SIGN} 1.2)"; NaN: not measured."""
    return (
        f"{percent(value)} (\N{PLUS-MINUS SIGN} {100 * stderr:.1f})"
        if math.isfinite(stderr)
        else percent(value)
    )


def _steps(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _get(config: dict[str, Any], dotted: str) -> Any:
    """The value at a dotted key of config.yaml; None: it is absent."""
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _short(path: str | None) -> str:
    """The last part of a path. Example: _short("builtin:tiny-student") == "tiny-student"."""
    return (path or "").rstrip("/").split("/")[-1].removeprefix("builtin:")


def _is_zero(schedule: dict[str, Any] | None) -> bool:
    """Whether a weight is 0 in every step."""
    if not schedule:
        return False
    return schedule.get("value") == 0 and not schedule.get("end")


def _schedule(schedule: dict[str, Any] | None) -> str:
    if not schedule:
        return ""
    if schedule.get("kind", "constant") == "constant":
        return f"{schedule.get('value')}"
    if schedule["kind"] == "feedback":
        return (
            f"{schedule.get('value')} at first, then so that {schedule.get('metric')} stays at "
            f"{schedule.get('target')}"
        )
    when = "from step" if schedule["kind"] == "step" else "over"
    steps = f" {when} {schedule['steps']}" if schedule.get("steps") else ""
    unit = " steps" if steps and when == "over" else ""
    return f"{schedule.get('value')} to {schedule.get('end')}, {schedule['kind']}{steps}{unit}"
