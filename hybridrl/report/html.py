"""The HTML of the report, one file that needs no other; text of models and users is escaped."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from hybridrl.report.chart import Chart
from hybridrl.report.script import SCRIPT
from hybridrl.report.svg import draw, neighbours
from hybridrl.tracking.glossary import explain
from hybridrl.types import FinishReason, Sample, TokenSample

FULL_COLOUR = 3.0
"""The difference of log-probs, in nats, at and above which a token has the full colour."""
STYLE = """
:root { --ink: #1f2430; --soft: #5b6472; --line: #e3e6eb; --wash: #f6f7f9; --blue: #0072b2;
  --orange: #b45309; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 48px clamp(16px, 3vw, 28px) 72px; }
h1 { font-size: clamp(28px, 4vw, 40px); line-height: 1.15; letter-spacing: -0.02em;
  margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 22px; letter-spacing: -0.01em; margin: 56px 0 16px; }
h3 { font-size: 16px; margin: 0 0 2px; }
.kind { color: var(--soft); margin: 0 0 20px; }
.warning { border-left: 4px solid var(--orange); padding-left: 12px; max-width: 50em; }
.summary { font-size: 19px; max-width: 50em; margin: 0 0 32px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); gap: 12px;
  margin: 0; }
.figures div { background: var(--wash); border-radius: 10px; padding: 14px 16px;
  display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.figures dd { margin: 0; font-size: 22px; font-weight: 650; letter-spacing: -0.01em;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.figures dt { color: var(--soft); font-size: 13.5px; line-height: 1.35; }
.curves { display: grid; gap: 36px 32px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); }
figure { margin: 0; min-width: 0; }
.plot { position: relative; }
.plot svg { fill: var(--soft); width: 100%; height: auto; display: block; touch-action: pan-y; }
.plot svg:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; border-radius: 6px; }
.plot text { font-size: 14px; font-variant-numeric: tabular-nums; }
.plot text.strong { font-weight: 650; paint-order: stroke; stroke: #fff; stroke-width: 4px; }
.grid { stroke: var(--line); } .base { stroke: #9ca3af; }
.curve { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
.dashed { stroke-dasharray: 7 5; } .level { stroke-width: 1.8; stroke-dasharray: 7 5; }
.pale { fill: none; opacity: 0.3; } .band { opacity: 0.15; }
.rule { stroke: var(--soft); stroke-dasharray: 2 3; }
.tip { position: absolute; top: 4px; z-index: 1; pointer-events: none; background: #fff;
  border: 1px solid var(--line); border-radius: 8px; padding: 6px 10px; font-size: 13px;
  line-height: 1.45; box-shadow: 0 4px 14px rgb(31 36 48 / 14%); max-width: 60%;
  overflow-wrap: anywhere; }
.tip i, .legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px;
  margin-right: 6px; vertical-align: -1px; }
.tip span { font-weight: 650; font-variant-numeric: tabular-nums; }
.legend { list-style: none; margin: 4px 0 0; padding: 0; display: flex; flex-wrap: wrap;
  gap: 2px 18px; font-size: 14px; }
.legend li { overflow-wrap: anywhere; }
.legend span { color: var(--soft); white-space: nowrap; font-variant-numeric: tabular-nums; }
figcaption { color: var(--soft); font-size: 14.5px; line-height: 1.45; margin-bottom: 8px; }
.switch { border: 0; padding: 0; margin: 0 0 20px; display: flex; flex-wrap: wrap; gap: 4px 18px;
  align-items: center; }
.switch legend { float: left; padding: 0; font-weight: 600; }
.switch label { cursor: pointer; }
.by-tokens, .by-seconds { display: none; }
main:has(#by-tokens:checked) .by-steps, main:has(#by-seconds:checked) .by-steps { display: none; }
main:has(#by-tokens:checked) .by-tokens, main:has(#by-seconds:checked) .by-seconds {
  display: grid; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13.5px; }
th, td { padding: 10px 14px 10px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td pre { font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace;
  margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15em; overflow-y: auto; }
.tokens { margin-top: 14px; }
.tokens pre { font: 15px/1.9 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace;
  margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24em; overflow-y: auto; }
.tokens pre.asked { font-size: 13.5px; line-height: 1.5; color: var(--soft); max-height: 9em; }
.tokens span { border-radius: 3px; padding: 2px 0; box-shadow: 1px 0 0 #fff; }
.tokens span:hover { outline: 1px solid var(--ink); }
.scale { font-size: 14px; margin: 0 0 12px; }
.scale span { padding: 3px 9px; font-variant-numeric: tabular-nums; }
.samples { min-width: 640px; table-layout: fixed; }
.answer { padding-left: 12px; }
.right { border-left: 4px solid var(--blue); } .wrong { border-left: 4px solid var(--orange); }
.partly, .unscored { border-left: 4px solid #c5cad3; }
.mark { font-size: 13px; font-weight: 600; margin-top: 4px; color: var(--soft); }
.right .mark { color: var(--blue); } .wrong .mark { color: var(--orange); }
.setup { max-width: 760px; } .setup th { width: 50%; }
details { margin-top: 24px; border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 18px; }
summary { cursor: pointer; font-weight: 600; }
details pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace;
  overflow-x: auto; }
p img { width: 100%; max-width: 780px; height: auto; }
main > pre { background: var(--wash); border-radius: 10px; padding: 12px 16px; overflow-x: auto; }
p code, td code { font: 0.88em ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
.keys { border: 0; padding: 0; margin-top: 2px; color: var(--soft); font-size: 13.5px;
  line-height: 1.45; }
.keys dl { margin: 4px 0 0; } .keys dd { margin: 0 0 4px 16px; }
@media print { details, figure, tr { break-inside: avoid; } }
"""


def render(
    *,
    name: str,
    warning: str | None,
    sentences: Sequence[str],
    figures: Sequence[tuple[str, str]],
    curves: Sequence[Chart],
    setup: Sequence[tuple[str, str]],
    evaluations: Sequence[Sequence[Sample]],
    weights: Mapping[str, float],
    token_samples: Sequence[Sequence[TokenSample]],
    config_text: str,
) -> str:
    """The report of one run as an HTML page.

    Args:
        warning: symptoms of steps that went wrong; None: there are none.
        sentences: of the summary.
        figures: (number, its meaning) of each key figure.
        curves: the diagrams.
        setup: (setting, value) of the most important settings.
        evaluations: samples of the first and of the last evaluation, the same ones twice if there
            was only one; empty: there are no samples.
        weights: the weight of each reward function, by its name.
        token_samples: for each step with token samples, these; the first and the last step are
            shown.
        config_text: the content of config.yaml.
    """
    parts = [
        f'<p class="warning">Warning: {escape(warning)}.</p>' if warning else "",
        f'<p class="summary">{escape(" ".join(sentences))}</p>',
        f'<dl class="figures">{"".join(_key_figure(*figure) for figure in figures)}</dl>',
        '<h2>Training curves</h2><div class="curves">',
        *(_figure(chart) for chart in curves),
        "</div>",
    ]
    if evaluations:
        parts.append(_samples(evaluations[0], evaluations[-1], weights))
    if token_samples:
        parts.append(_tokens(token_samples))
    if setup:
        cells = "".join(
            f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in setup
        )
        parts.append(f'<h2>Set-up</h2><table class="setup">{cells}</table>')
    if config_text:
        parts.append(
            "<details><summary>All settings (config.yaml)</summary>"
            f"<pre>{escape(config_text)}</pre></details>"
        )
    return document(name, "Report of a hybridrl training run", parts)


def document(title: str, kind: str, parts: Sequence[str]) -> str:
    """A complete HTML document from its parts, with a title and the kind of page below it."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} - hybridrl report</title><style>{STYLE}</style></head>\n"
        f'<body><main><h1>{escape(title)}</h1><p class="kind">{escape(kind)}</p>'
        f"{''.join(parts)}</main><script>{SCRIPT}</script></body></html>\n"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The diagrams of a comparison over one horizontal axis."""

    name: str  # "steps", "tokens" or "seconds"
    charts: list[Chart]


def render_comparison(
    *,
    names: Sequence[str],
    views: Sequence[View],
    seeds: int,
    numbers: Sequence[Sequence[str]],
    budgets: Sequence[Sequence[str]],
    settings: Sequence[Sequence[str]],
) -> str:
    """The comparison of several runs as an HTML page.

    Args:
        names: of the groups of runs.
        views: the same metrics over each horizontal axis; the page shows one at a time.
        seeds: the number of runs in the largest group.
        numbers: rows of a table: a name, then a cell for each group.
        budgets: rows of a table at equal steps, tokens and seconds, in the same form.
        settings: rows of a table: the key of a setting, then a cell for each group.
    """
    band = (
        '<p class="kind">Runs that differ in their seed alone are one curve: their mean, with a '
        "band from the lowest to the highest, up to the last step that all of them reached.</p>"
        if seeds > 1
        else ""
    )
    parts = ["<h2>Training curves</h2>", band, _switch(views)]
    for view in views:
        figures = "".join(_figure(chart) for chart in view.charts)
        parts.append(f'<div class="curves by-{view.name}">{figures}</div>')
    parts += ["<h2>In numbers</h2>", _table(["", *names], numbers)]
    if budgets:
        parts += [
            "<h2>At equal cost</h2>",
            '<p class="kind">At the largest number of steps, tokens or seconds that all have '
            "reached.</p>",
            _table(["", *names], budgets),
        ]
    parts += [
        "<h2>Settings that differ</h2>",
        _table(["", *names], settings) if settings else "<p>None except run.dir.</p>",
    ]
    return document(" / ".join(names), "Comparison of hybridrl training runs", parts)


def _switch(views: Sequence[View]) -> str:
    """The radio buttons for the horizontal axis, which work without the script."""
    options = "".join(
        f'<label><input type="radio" name="axis" id="by-{view.name}"'
        f"{' checked' if number == 0 else ''}> {view.name}</label>"
        for number, view in enumerate(views)
    )
    return f'<fieldset class="switch"><legend>Compare at equal</legend>{options}</fieldset>'


def _key_figure(number: str, meaning: str) -> str:
    return f"<div><dt>{escape(meaning)}</dt><dd>{escape(number)}</dd></div>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; the first cell of each row is its heading."""
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = ""
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        body += f"<tr><th>{escape(first)}</th>{cells}</tr>"
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _figure(chart: Chart) -> str:
    """A diagram with its title, caption, legend and the meaning of its metrics."""
    size = neighbours(chart.drawing)
    thinned = f" Each point is the mean of {size} neighbouring values." if size > 1 else ""
    return (
        f"<figure><h3>{escape(chart.title)}</h3>"
        f"<figcaption>{escape(chart.caption)}{thinned}</figcaption>"
        f"{_plot(chart)}{_legend(chart)}{_keys(chart)}</figure>\n"
    )


def _plot(chart: Chart) -> str:
    return f'<div class="plot">{draw(chart)}<div class="tip" role="status" hidden></div></div>'


def _legend(chart: Chart) -> str:
    """The legend: curves with their colours and first and last values, and layers of bars."""
    unit = chart.drawing.unit
    items = []
    for curve in chart.drawing.curves:
        values = dict.fromkeys(unit.text(value) for value in (curve.y[0], curve.y[-1]))
        items.append((curve.colour, curve.label, " \N{RIGHTWARDS ARROW} ".join(values)))
    items += [(bars.colour, bars.label, "") for bars in chart.drawing.bars]
    return (
        '<ul class="legend">'
        + "".join(
            f'<li><i style="background:{colour}"></i>{escape(label)} <span>{values}</span></li>'
            for colour, label, values in items
        )
        + "</ul>"
    )


def _keys(chart: Chart) -> str:
    """The meanings of the metrics of a diagram in a folded section; empty if none is known."""
    metrics = [(key, explain(key)) for key in chart.metrics]
    meanings = "".join(
        f"<dt><code>{escape(k)}</code></dt><dd>{escape(f'{m.formula} - {m.reading}')}</dd>"
        for k, m in metrics
        if m
    )
    if not meanings:
        return ""
    return f'<details class="keys"><summary>How to read it</summary><dl>{meanings}</dl></details>'


def _samples(first: Sequence[Sample], last: Sequence[Sample], weights: Mapping[str, float]) -> str:
    """A table with a row for each problem: its answers in the first and the last evaluation.

    The problems whose answers changed most come first.
    """
    columns = [first] if first[0].step == last[0].step else [first, last]
    answers = [{row.uid: row for row in column} for column in columns]
    problems = {row.uid: row for column in columns for row in column}
    ordered = sorted(problems.values(), key=lambda s: _change([a.get(s.uid) for a in answers]))
    scored = any(math.isfinite(row.reward) for row in problems.values())
    heads = "".join(
        f"<th>{'Before training' if c[0].step == 0 else f'After step {c[0].step}'}</th>"
        for c in columns
    )
    body = ""
    for sample in ordered:
        cells = [_answer(by_uid.get(sample.uid), weights, scored) for by_uid in answers]
        body += f"<tr><td>{_problem(sample)}</td>{''.join(cells)}</tr>\n"
    order = ", those that changed most first" if len(columns) == 2 else ""
    return (
        f'<h2>Sample answers</h2><p class="kind">Held-out problems{order}.</p>'
        '<div class="scroll"><table class="samples">'
        f"<thead><tr><th>Held-out problem</th>{heads}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _tokens(steps: Sequence[Sequence[TokenSample]]) -> str:
    """The section of responses with coloured tokens, those of the first and of the last step."""
    shown = [steps[0], steps[-1]] if steps[0][0].step != steps[-1][0].step else [steps[0]]
    columns = "".join(
        f"<div><h3>Step {rows[0].step}</h3>{''.join(map(_coloured, rows))}</div>" for rows in shown
    )
    scale = "".join(
        f'<span style="background:{token_colour(ratio)}">{ratio or 0:g}</span>'
        for ratio in (-FULL_COLOUR, -FULL_COLOUR / 2, 0.0, FULL_COLOUR / 2, FULL_COLOUR)
    )
    return (
        '<h2>Token by token</h2><p class="kind">Responses of training steps. Colour: log pi - '
        "log q of each token in nats, the student that wrote it against its teacher. Orange: the "
        "teacher finds the token less likely; blue: more likely. The number is shown under the "
        "pointer.</p>"
        f'<p class="scale">teacher: more likely {scale} less likely</p>'
        f'<div class="curves">{columns}</div>'
    )


def _coloured(sample: TokenSample) -> str:
    """A response with its prompt; each token has a colour, and its number as a tooltip."""
    tokens = "".join(
        f'<span style="background:{token_colour(ratio)}" title="{escape(_hint(token, ratio))}">'
        f"{escape(_visible(token))}</span>"
        for token, ratio in zip(sample.tokens, sample.log_ratios, strict=True)
    )
    known = [ratio for ratio in sample.log_ratios if math.isfinite(ratio)]
    mean = f", mean {sum(known) / len(known):+.3f} a token" if known else ""
    reward = "" if math.isnan(sample.reward) else f", reward {sample.reward:g}"
    return (
        f'<div class="tokens"><pre class="asked">{escape(sample.prompt)}</pre><pre>{tokens}</pre>'
        f'<div class="mark">teacher {escape(sample.teacher)}{mean}{reward}</div></div>'
    )


def _visible(token: str) -> str:
    """A token as visible text, even if it is empty or a line break."""
    return token.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n") or "\N{EMPTY SET}"


def _hint(token: str, ratio: float) -> str:
    number = f"{ratio:+.3f}" if math.isfinite(ratio) else "not measured"
    return f"{token!r}: log pi - log q = {number}"


def token_colour(ratio: float) -> str:
    """The colour of a difference of log-probs: orange above 0, blue below, full at FULL_COLOUR
    nats; grey if it is not finite.

    Example: 0 is "rgb(0 0 0 / 0%)", 1.5 of 3 nats is "rgb(213 94 0 / 35%)".
    """
    if not math.isfinite(ratio):
        return "#e3e6eb"
    share = min(abs(ratio) / FULL_COLOUR, 1.0)
    colour = "213 94 0" if ratio > 0 else "0 114 178" if ratio < 0 else "0 0 0"
    return f"rgb({colour} / {70 * share:.0f}%)"


def _change(answers: Sequence[Sample | None]) -> tuple[float, bool]:
    """A sort key: the largest change of the reward first, then changed texts before equal ones."""
    before = answers[0]
    after = answers[-1]
    if before is None or after is None:
        return 0.0, True
    change = abs(after.reward - before.reward)
    return (-change if math.isfinite(change) else 0.0), before.response == after.response


def _problem(sample: Sample) -> str:
    """The question as text, with the reference answer if the data has one."""
    reference = (
        f'<div class="mark">reference answer</div><pre>{escape(sample.answer)}</pre>'
        if sample.answer is not None
        else ""
    )
    return f"<pre>{escape(sample.question or sample.prompt)}</pre>{reference}"


def _marks(sample: Sample, weights: Mapping[str, float]) -> tuple[float, float]:
    """The reward of a response from the functions that apply to it, and that of a right response.

    If the weights of these functions are all 0, the first function counts. In files without the
    values of the functions, all are taken to apply.
    """
    applied = [name for name, value in sample.parts.items() if math.isfinite(value)]
    full = sum(weights.get(name, 1.0) for name in applied or weights)
    if applied and not full:
        return sample.parts[applied[0]], 1.0
    return sample.reward, full or 1.0


def _answer(sample: Sample | None, weights: Mapping[str, float], scored: bool) -> str:
    """A table cell with a response and its verdict.

    Args:
        scored: whether any response of the table has a reward; if not, there are no verdicts.
    """
    if sample is None:
        return "<td></td>"
    cut = "cut off at the length limit" if sample.finish_reason is FinishReason.length else ""
    if not scored:
        return (
            f'<td class="answer"><pre>{escape(sample.response)}</pre>'
            f'<div class="mark">{cut}</div></td>'
        )
    got, full = _marks(sample, weights)
    if math.isnan(sample.reward):
        verdict = "unscored"
        mark = "? not scored"
    elif got >= full - 1e-6:
        verdict = "right"
        mark = "&#10003; right"
    elif got > 0:
        verdict = "partly"
        mark = "partly right"
    else:
        verdict = "wrong"
        mark = "&#10007; wrong"
    reward = "" if math.isnan(sample.reward) else f", reward {sample.reward:g}"
    cut = f", {cut}" if cut else ""
    return (
        f'<td class="answer {verdict}"><pre>{escape(sample.response)}</pre>'
        f'<div class="mark">{mark}{reward}{cut}</div></td>'
    )
