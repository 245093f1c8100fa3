"""The report's HTML: self-contained, without scripts; every text that a model or a user wrote is
escaped.
"""

import base64
import math
from collections.abc import Sequence
from html import escape

from hybridrl.report.figures import Panel
from hybridrl.tracking.glossary import explain
from hybridrl.types import FinishReason, Sample

STYLE = """
:root { --ink: #1f2430; --soft: #5b6472; --line: #e3e6eb; --wash: #f6f7f9; --blue: #0072b2; --orange: #b45309; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 48px 28px 72px; }
h1 { font-size: clamp(28px, 4vw, 40px); line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 22px; letter-spacing: -0.01em; margin: 56px 0 16px; }
h3 { font-size: 16px; margin: 0 0 2px; }
.kind { color: var(--soft); margin: 0 0 20px; }
.warning { border-left: 4px solid var(--orange); padding-left: 12px; max-width: 50em; }
.summary { font-size: 19px; max-width: 50em; margin: 0 0 32px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(135px, 1fr)); gap: 12px; margin: 0; }
.figures div { background: var(--wash); border-radius: 10px; padding: 14px 16px;
  display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.figures dd { margin: 0; font-size: 23px; font-weight: 650; letter-spacing: -0.01em; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.figures dt { color: var(--soft); font-size: 13.5px; line-height: 1.35; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 36px 32px; }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: 14.5px; line-height: 1.45; margin-bottom: 8px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13.5px; }
th, td { padding: 10px 14px 10px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td pre { font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15em; overflow-y: auto; }
.samples { min-width: 640px; table-layout: fixed; }
.answer { padding-left: 12px; }
.right { border-left: 4px solid var(--blue); } .wrong { border-left: 4px solid var(--orange); }
.partly, .unscored { border-left: 4px solid #c5cad3; }
.mark { font-size: 13px; font-weight: 600; margin-top: 4px; color: var(--soft); }
.right .mark { color: var(--blue); } .wrong .mark { color: var(--orange); }
.setup { max-width: 760px; } .setup th { width: 50%; }
details { margin-top: 24px; border: 1px solid var(--line); border-radius: 10px; padding: 12px 18px; }
summary { cursor: pointer; font-weight: 600; }
details pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; overflow-x: auto; }
.keys { border: 0; padding: 0; margin-top: 2px; color: var(--soft); font-size: 13.5px; line-height: 1.45; }
.keys dl { margin: 4px 0 0; } .keys dd { margin: 0 0 4px 16px; }
@media print { details, figure, tr { break-inside: avoid; } }
"""


def render(
    *,
    name: str,
    warning: str | None,  # what kept the run from learning; None: nothing seen
    sentences: Sequence[str],
    figures: Sequence[tuple[str, str]],  # (number, what it is)
    curves: Sequence[tuple[Panel, bytes]],  # with its PNG
    setup: Sequence[tuple[str, str]],  # (setting, value)
    evaluations: Sequence[
        Sequence[Sample]
    ],  # first and last, the same list twice when there was one
    full_mark: float,  # the reward of a right response
    config_text: str,
) -> str:
    """The whole page."""
    parts = [
        f'<p class="warning">Warning: {escape(warning)}.</p>' if warning else "",
        f'<p class="summary">{escape(" ".join(sentences))}</p>',
        "<dl "
        f'class="figures">{"".join(f"<div><dt>{escape(what)}</dt><dd>{escape(n)}</dd></div>" for n, what in figures)}</dl>',
        '<h2>How it went</h2><div class="curves">',
        *(_curve(panel, png) for panel, png in curves),
        "</div>",
    ]
    if evaluations:
        parts.append(_samples(evaluations[0], evaluations[-1], full_mark))
    if setup:
        cells = "".join(
            f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in setup
        )
        parts.append(f'<h2>Set-up</h2><table class="setup">{cells}</table>')
    if config_text:
        parts.append(
            "<details><summary>All settings "
            f"(config.yaml)</summary><pre>{escape(config_text)}</pre></details>"
        )
    return document(name, "Report of a hybridrl training run", parts)


def document(title: str, kind: str, parts: Sequence[str]) -> str:
    """A whole page of HTML parts, with its title and what kind of page it is."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} - hybridrl report</title><style>{STYLE}</style></head>\n"
        f'<body><main><h1>{escape(title)}</h1><p class="kind">{escape(kind)}</p>'
        f"{''.join(parts)}</main></body></html>\n"
    )


def render_comparison(
    *,
    names: Sequence[str],
    curves: Sequence[tuple[Panel, bytes]],  # with its PNG
    numbers: Sequence[Sequence[str]],  # rows: what it is, then a cell per run
    settings: Sequence[Sequence[str]],  # rows: the key, then a cell per run
) -> str:
    """The page that compares runs."""
    parts = [
        '<h2>How they went</h2><div class="curves">',
        *(_curve(panel, png) for panel, png in curves),
        "</div>",
        "<h2>In numbers</h2>",
        _table(["", *names], numbers),
        "<h2>Settings that differ</h2>",
        _table(["", *names], settings) if settings else "<p>None but run.dir.</p>",
    ]
    return document(" / ".join(names), "Comparison of hybridrl training runs", parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _curve(panel: Panel, png: bytes) -> str:
    picture = base64.b64encode(png).decode("ascii")
    return (
        f"<figure><h3>{escape(panel.title)}</h3><figcaption>{escape(panel.caption)}</figcaption>"
        f'<img alt="{escape(panel.title)} over optimizer steps" src="data:image/png;base64,{picture}">{_keys(panel)}</figure>\n'
    )


def _keys(panel: Panel) -> str:
    """What the drawn metrics are, folded away under the picture."""
    metrics = [(key, explain(key)) for key in panel.needs]
    told = "".join(
        f"<dt><code>{escape(k)}</code></dt><dd>{escape(f'{m.formula} - {m.reading}')}</dd>"
        for k, m in metrics
        if m
    )
    return f'<details class="keys"><summary>How to read it</summary><dl>{told}</dl></details>'


def _samples(first: Sequence[Sample], last: Sequence[Sample], full_mark: float) -> str:
    """One problem a row, the answers of the first and the last evaluation beside each other, the
    most changed ones first.
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
    body = "".join(
        f"<tr><td>{_problem(sample)}</td>{''.join(_answer(by_uid.get(sample.uid), full_mark, scored) for by_uid in answers)}</tr>\n"
        for sample in ordered
    )
    order = ", those that changed most first" if len(columns) == 2 else ""
    return (
        f'<h2>What it answers</h2><p class="kind">Held-out problems{order}.</p>'
        '<div class="scroll"><table class="samples">'
        f"<thead><tr><th>Held-out problem</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _change(answers: Sequence[Sample | None]) -> tuple[float, bool]:
    """A sort key: the largest change of reward first, then changed texts before equal ones."""
    before, after = answers[0], answers[-1]
    if before is None or after is None:
        return 0.0, True
    change = abs(after.reward - before.reward)
    return (-change if math.isfinite(change) else 0.0), before.response == after.response


def _problem(sample: Sample) -> str:
    """The question as a person reads it, with the reference answer where the data has one."""
    reference = (
        f'<div class="mark">reference answer</div><pre>{escape(sample.answer)}</pre>'
        if sample.answer is not None
        else ""
    )
    return f"<pre>{escape(sample.question or sample.prompt)}</pre>{reference}"


def _answer(sample: Sample | None, full_mark: float, scored: bool) -> str:
    """One response with its verdict, which is left out where no response of the table has a
    reward.
    """
    if sample is None:
        return "<td></td>"
    cut = "cut off at the length limit" if sample.finish_reason is FinishReason.length else ""
    if not scored:
        return (
            f'<td class="answer"><pre>{escape(sample.response)}</pre>'
            f'<div class="mark">{cut}</div></td>'
        )
    if math.isnan(sample.reward):
        verdict, mark = "unscored", "? not scored"
    elif sample.reward >= full_mark - 1e-6:
        verdict, mark = "right", "&#10003; right"
    else:
        verdict, mark = (
            ("partly", "partly right") if sample.reward > 0 else ("wrong", "&#10007; wrong")
        )
    reward = "" if math.isnan(sample.reward) else f", reward {sample.reward:g}"
    cut = f", {cut}" if cut else ""
    return (
        f'<td class="answer {verdict}"><pre>{escape(sample.response)}</pre>'
        f'<div class="mark">{mark}{reward}{cut}</div></td>'
    )
