"""The diagrams of the report, made from rows of metrics."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice

import numpy as np

from hybridrl.report.chart import (
    BLUE,
    FAINT,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    Bars,
    Chart,
    Curve,
    Drawing,
    Level,
    Rows,
    Unit,
    series,
)
from hybridrl.tracking.console import PHASES, TEACHER

TEACHER_COLOURS = (VERMILION, PURPLE, ORANGE, GREEN)
SET_COLOURS = (ORANGE, GREEN, PURPLE, SKY, VERMILION)
PHASE_COLOURS = dict(
    zip(PHASES, (BLUE, SKY, ORANGE, GREEN, PURPLE, VERMILION, YELLOW), strict=True)
)
MAX_BARS = 50  # in the diagram of phases; in longer runs a bar stands for several steps
OF_SET = re.compile(r"eval/(?!accuracy_teacher/|accuracy_source/)([^/]+)/([^/]+)")
OF_SOURCE = "eval/accuracy_source/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One kind of diagram."""

    title: str
    caption: str
    needs: tuple[str, ...]  # the metrics that it shows and the page explains
    draw: Callable[[Rows], Drawing]
    hide_zero: bool = False  # omit the diagram also if all values are 0


def charts_of(rows: Rows) -> list[Chart]:
    """The diagrams for which a run has numbers; the rows must be in step order."""
    charts = []
    for panel in PANELS:
        drawing = panel.draw(rows)
        if not drawing.is_empty(hide_zero=panel.hide_zero):
            charts.append(
                Chart(
                    title=panel.title,
                    caption=panel.caption,
                    metrics=panel.needs,
                    drawing=drawing,
                )
            )
    return charts


def teacher_levels(rows: Rows) -> dict[str, float]:
    """The held-out accuracy of each teacher, by its name."""
    return {
        k.removeprefix(TEACHER): v
        for row in rows
        for k, v in row.items()
        if k.startswith(TEACHER) and math.isfinite(v)
    }


def metrics_of_sets(rows: Rows, metric: str) -> dict[str, str]:
    """The key of a metric of each named held-out set, by the set's name.

    Example: metrics_of_sets(rows, "accuracy") == {"hard": "eval/hard/accuracy"} for rows that have
    this metric.

    Args:
        metric: a regular expression for the last part of the key.
    """
    matches = {key: OF_SET.fullmatch(key) for row in rows for key in row}
    found = {key: match for key, match in matches.items() if match}
    return {match[1]: key for key, match in sorted(found.items()) if re.fullmatch(metric, match[2])}


def curve(
    rows: Rows,
    key: str,
    colour: str,
    label: str,
    *,
    smooth: bool = False,
    dashed: bool = False,
    marked: bool = False,
    error: str | None = None,
) -> tuple[Curve, ...]:
    """The curve of a metric over steps; empty if it was not measured.

    Args:
        error: the metric with the half width of the band; None: there is no band.
    """
    steps, values = series(rows, key)
    if not values.size:
        return ()
    low = high = None
    if error is not None:
        error_of = {row["train/step"]: row.get(error, math.nan) for row in rows}
        errors = np.array([error_of[step] for step in steps], dtype=np.float64)
        if np.isfinite(errors).any():
            low, high = values - errors, values + errors
    return (
        Curve(
            label=label,
            colour=colour,
            x=steps,
            y=values,
            low=low,
            high=high,
            marked=marked,
            dashed=dashed,
            smooth=smooth,
        ),
    )


def of_sets(rows: Rows, metric: str) -> tuple[Curve, ...]:
    """The curve of a metric of each named held-out set."""
    keys = metrics_of_sets(rows, metric)
    return tuple(
        each
        for (name, key), colour in zip(keys.items(), cycle(SET_COLOURS), strict=False)
        for each in curve(rows, key, colour, name, marked=True, error=f"{key}_stderr")
    )


def of_sources(rows: Rows, colours: Iterator[str]) -> tuple[Curve, ...]:
    """The accuracy curve of each of data.sources. They are dashed, because their problems are a
    part of those of the student's curve.
    """
    keys = sorted({key for row in rows for key in row if key.startswith(OF_SOURCE)})
    return tuple(
        each
        for key, colour in zip(keys, colours, strict=False)
        for each in curve(rows, key, colour, key.removeprefix(OF_SOURCE), marked=True, dashed=True)
    )


def _accuracy(rows: Rows) -> Drawing:
    own = curve(rows, "eval/accuracy", BLUE, "student", marked=True, error="eval/accuracy_stderr")
    sets = of_sets(rows, "accuracy")
    sets += of_sources(rows, islice(cycle(SET_COLOURS), len(sets), None))
    if own and not sets:
        own = (replace(own[0], ends=True),)
    teachers = teacher_levels(rows)
    levels = tuple(
        Level(
            label=f"teacher {name} {100 * level:.1f} %"
            if len(teachers) > 1
            else f"teacher {100 * level:.1f} %",
            value=level,
            colour=colour,
        )
        for (name, level), colour in zip(teachers.items(), cycle(TEACHER_COLOURS), strict=False)
    )
    shown = levels if own or sets else ()
    return Drawing(curves=own + sets, levels=shown, unit=Unit.share, roof=1.04)


def _reward(rows: Rows) -> Drawing:
    whole = curve(rows, "reward/mean", BLUE, "sum", smooth=True, error="reward/stderr")
    keys = sorted(
        {
            key
            for row in rows
            for key in row
            if key.startswith("reward/") and key.endswith("/mean") and key != "reward/mean"
        }
    )
    parts: tuple[Curve, ...] = ()
    if whole and len(keys) > 1:
        for key, colour in zip(keys, cycle(SET_COLOURS), strict=False):
            name = key.removeprefix("reward/").removesuffix("/mean")
            parts += curve(rows, key, colour, name, smooth=True)
    return Drawing(curves=whole + parts)


def _schedules(rows: Rows) -> Drawing:
    reward = curve(rows, "schedule/lambda", VERMILION, "reward weight (lambda)")
    imitation = curve(rows, "schedule/imitation", BLUE, "imitation weight", dashed=True)
    return Drawing(curves=reward + imitation, include=(0.0,))


def _gradients(rows: Rows) -> Drawing:
    curves: tuple[Curve, ...] = ()
    for key, colour, label in (
        ("grad/dense_norm", BLUE, "dense (imitation)"),
        ("grad/sparse_norm", VERMILION, f"sparse ({_sparse_part(rows)})"),
    ):
        positive = [row for row in rows if row.get(key, 0) > 0]
        curves += curve(positive, key, colour, label, smooth=True)
    return Drawing(curves=curves, log=True)


def _sparse_part(rows: Rows) -> str:
    """The source of the sparse part of the gradient in this run, in words."""
    if series(rows, "pair/loss")[1].size:
        return "ranked pairs"
    parts = []
    if series(rows, "schedule/lambda")[1].any():
        parts.append("reward")
    if series(rows, "nll/token")[1].size:
        parts.append("likelihood of the data")
    return " and ".join(parts) or "returns"


def _loss(rows: Rows) -> Drawing:
    curves: tuple[Curve, ...] = ()
    for key, label in (("pair/loss", "training pairs"), ("nll/token", "training data")):
        if series(rows, key)[1].size:
            curves = curve(rows, key, BLUE, label, smooth=True)
            break
    curves += curve(rows, "eval/loss", VERMILION, "held-out data", marked=True)
    return Drawing(curves=curves + of_sets(rows, "loss"))


def _pair_accuracy(rows: Rows) -> Drawing:
    curves = curve(rows, "pair/accuracy", BLUE, "training pairs", smooth=True)
    curves += curve(rows, "eval/pair_accuracy", VERMILION, "held-out pairs", marked=True)
    coin = Level(label="", value=0.5, colour=FAINT)
    return Drawing(
        curves=curves + of_sets(rows, "pair_accuracy"), levels=(coin,), unit=Unit.share, roof=1.04
    )


def _pass_at(rows: Rows) -> Drawing:
    """pass@k of each set, eval/<set>/pass_at_<k>, for the largest k."""
    keys = [m for row in rows for key in row if (m := OF_SET.fullmatch(key))]
    largest: dict[str, int] = {}
    for match in keys:
        if size := re.fullmatch(r"pass_at_(\d+)", match[2]):
            largest[match[1]] = max(largest.get(match[1], 1), int(size[1]))
    curves: tuple[Curve, ...] = ()
    names = sorted(name for name, k in largest.items() if k > 1)
    for name, colour in zip(names, cycle(SET_COLOURS), strict=False):
        k = largest[name]
        key = f"eval/{name}/pass_at_{k}"
        curves += curve(rows, key, colour, f"{name}, one of {k} responses", marked=True)
    return Drawing(curves=curves, unit=Unit.share, roof=1.04)


def _pair_scores(rows: Rows) -> Drawing:
    chosen = curve(rows, "pair/chosen_score", GREEN, "chosen", smooth=True)
    rejected = curve(rows, "pair/rejected_score", VERMILION, "rejected", smooth=True)
    return Drawing(curves=chosen + rejected)


def _phases(rows: Rows) -> Drawing:
    timed = [row for row in rows if row["train/step"] > 0 and "time/step_s" in row]
    if not timed:
        return Drawing()
    size = math.ceil(len(timed) / MAX_BARS)
    groups = [timed[i : i + size] for i in range(0, len(timed), size)]
    centres = np.array([np.mean([row["train/step"] for row in group]) for group in groups])
    bars = []
    for name in PHASES:
        key = f"time/{name}_s"
        heights = np.array(
            [np.mean([np.nan_to_num(row.get(key, 0.0)) for row in group]) for group in groups]
        )
        if heights.any():
            bars.append(
                Bars(
                    label=name,
                    colour=PHASE_COLOURS[name],
                    x=centres,
                    heights=heights,
                    width=0.82 * size,
                )
            )
    return Drawing(bars=tuple(bars), unit=Unit.seconds)


def _lengths(rows: Rows) -> Drawing:
    mean = curve(rows, "rollout/length_mean", BLUE, "mean", smooth=True)
    longest = curve(rows, "rollout/length_p95", ORANGE, "95th percentile", smooth=True)
    return Drawing(curves=mean + longest, include=(0.0,))


def _failures(rows: Rows) -> Drawing:
    cut = curve(rows, "rollout/truncated_frac", BLUE, "response cut off", smooth=True)
    failed: tuple[Curve, ...] = ()
    if series(rows, "reward/error_rate")[1].any():
        failed = curve(rows, "reward/error_rate", VERMILION, "reward call failed")
    return Drawing(curves=cut + failed, unit=Unit.share, include=(0.0,))


def _importance(rows: Rows) -> Drawing:
    ratio = curve(rows, "policy/rho_mean", BLUE, "mean importance ratio")
    effective = curve(rows, "policy/ess", GREEN, "effective sample share", dashed=True)
    return Drawing(curves=ratio + effective, include=(0.95, 1.05))


def _single(key: str, colour: str, label: str) -> Callable[[Rows], Drawing]:
    def draw(rows: Rows) -> Drawing:
        return Drawing(curves=curve(rows, key, colour, label, smooth=True), include=(0.0,))

    return draw


PANELS = (
    Panel(
        title="Held-out accuracy",
        caption="Share of problems never trained on that are solved (band: one standard error). "
        "Dashed: the teacher's own level, and the parts of the problems by their source.",
        needs=("eval/accuracy",),
        draw=_accuracy,
    ),
    Panel(
        title="Solved within several tries",
        caption="Share of problems of each named held-out set that at least one of several "
        "responses solves.",
        needs=(),
        draw=_pass_at,
    ),
    Panel(
        title="Loss on given responses",
        caption="Negative log-likelihood of the data's responses per token, or the loss of its "
        "ranked pairs. Held-out rows are never trained on.",
        needs=("pair/loss", "nll/token", "eval/loss"),
        draw=_loss,
    ),
    Panel(
        title="Pairs ranked right",
        caption="Share of pairs whose chosen response scores above the rejected one; "
        "chance is 50 %.",
        needs=("pair/accuracy", "eval/pair_accuracy"),
        draw=_pair_accuracy,
    ),
    Panel(
        title="Scores of both responses",
        caption="Mean score that the loss compares: log-ratio to the reference, log-likelihood, "
        "or the reward model's value.",
        needs=("pair/chosen_score", "pair/rejected_score"),
        draw=_pair_scores,
    ),
    Panel(
        title="Training reward",
        caption="Mean reward of the responses sampled in each step (band: one standard error; "
        "thick: running mean).",
        needs=("reward/mean",),
        draw=_reward,
    ),
    Panel(
        title="Distance to the teacher",
        caption="KL divergence of the student from its teacher, in nats per response token; 0 "
        "would be a perfect copy.",
        needs=("kl/token",),
        draw=_single("kl/token", GREEN, "divergence"),
    ),
    Panel(
        title="Weights of the two goals",
        caption="How strongly each step weighs earning reward (lambda) and imitating the teacher.",
        needs=("schedule/lambda", "schedule/imitation"),
        draw=_schedules,
        hide_zero=True,
    ),
    Panel(
        title="Gradient by its parts",
        caption="Norm of the logit gradient: the dense part compares the whole vocabulary with a "
        "teacher at every token, the sparse part weighs the tokens that were written. Log "
        "scale.",
        needs=("grad/dense_norm", "grad/sparse_norm"),
        draw=_gradients,
        hide_zero=True,
    ),
    Panel(
        title="Where the time goes",
        caption="Wall seconds per step by phase; in long runs each bar averages neighbouring "
        "steps.",
        needs=("time/step_s",),  # rows of steps have it, the evaluation before training has not
        draw=_phases,
        hide_zero=True,
    ),
    Panel(
        title="Response length",
        caption="Tokens per sampled response.",
        needs=("rollout/length_mean", "rollout/length_p95"),
        draw=_lengths,
    ),
    Panel(
        title="Cut-off responses",
        caption="Share of responses that hit the length limit, and of reward calls that failed.",
        needs=("rollout/truncated_frac", "reward/error_rate"),
        draw=_failures,
        hide_zero=True,
    ),
    Panel(
        title="Entropy",
        caption="The student's uncertainty at each token, in nats; near 0 it always writes the "
        "same response.",
        needs=("entropy/token",),
        draw=_single("entropy/token", PURPLE, "entropy"),
    ),
    Panel(
        title="Sampler against learner",
        caption="Learner's over sampler's probability of the sampled tokens, and the share of "
        "samples that effectively count; 1 is ideal.",
        needs=("policy/rho_mean", "policy/ess"),
        draw=_importance,
    ),
    Panel(
        title="Age of the data",
        caption="How many weight updates old the trained tokens are, on average.",
        needs=("policy/staleness_mean",),
        draw=_single("policy/staleness_mean", ORANGE, "age"),
        hide_zero=True,
    ),
    Panel(
        title="Throughput",
        caption="Tokens processed per second of wall time.",
        needs=("perf/tokens_per_s",),
        draw=_single("perf/tokens_per_s", SKY, "tokens per second"),
    ),
)
