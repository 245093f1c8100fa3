"""The diagrams of the page: their SVG, the values that the script reads, and both in a browser."""

import json
import re
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from hybridrl.report.chart import Bars, Chart, Curve, Drawing, Level, Unit
from hybridrl.report.comparison import write_comparison
from hybridrl.report.figures import charts_of
from hybridrl.report.run_report import write_report
from hybridrl.report.svg import MOST_POINTS, Frame, draw, neighbours, short_number

BROWSER_S = 120


def curve(x: list[float], y: list[float], **changes) -> Curve:
    values = {"label": "student", "colour": "#0072B2", "x": np.array(x), "y": np.array(y)}
    return Curve(**values | changes)


def chart(drawing: Drawing) -> Chart:
    return Chart(title="Accuracy", caption="", metrics=(), drawing=drawing)


def values_of(svg: str) -> dict:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', svg)[1])


def test_a_curve_is_a_path_through_the_places_of_its_values():
    drawing = Drawing(curves=(curve([0.0, 10.0], [0.0, 1.0]),), include=(0.0,))
    frame = Frame(drawing)
    svg = draw(chart(drawing))
    places = f"M{frame.x(0)} {frame.y(0)}L{frame.x(10)} {frame.y(1)}"
    assert f'class="curve" stroke="#0072B2" d="{places}"' in svg
    # The axis begins at the included 0, which is the bottom of the frame, and 1 is above it.
    assert frame.y(0) == 254 > frame.y(1)


def test_the_script_receives_the_values_and_the_bands():
    banded = curve(
        [1.0, 2.0], [0.25, 0.5], low=np.array([0.2, np.nan]), high=np.array([0.3, np.nan])
    )
    values = values_of(draw(chart(Drawing(curves=(banded,), unit=Unit.share))))
    assert values["unit"] == "share" and values["x_label"] == "optimizer step"
    assert values["curves"] == [
        {"label": "student", "colour": "#0072B2", "x": [1.0, 2.0], "y": [0.25, 0.5]}
        | {"low": [0.2, None], "high": [0.3, None]}
    ]


def test_a_label_of_a_user_is_escaped_in_the_svg_and_ends_no_script():
    evil = "</script><script>alert(1)</script>"
    drawing = Drawing(
        curves=(curve([0.0], [1.0], label=evil),),
        levels=(Level(label=evil, value=1.0, colour="#000"),),
    )
    svg = draw(chart(drawing))
    assert "<script>alert" not in svg and svg.count("</script>") == 1
    assert values_of(svg)["curves"][0]["label"] == evil


def test_the_diagram_is_a_sentence_for_readers_who_do_not_see_it():
    drawing = Drawing(curves=(curve([0.0, 5.0], [0.25, 0.5]),), unit=Unit.share)
    label = re.search(r'aria-label="(.*?)"', draw(chart(drawing)))[1]
    assert unescape(label) == "Accuracy by optimizer step: student from 25.0 % to 50.0 %"


def test_bars_stand_on_the_bars_before_them():
    steps = np.array([1.0])
    drawing = Drawing(
        bars=(
            Bars(label="rollout", colour="#111", x=steps, heights=np.array([2.0]), width=1.0),
            Bars(label="learn", colour="#222", x=steps, heights=np.array([1.0]), width=1.0),
        )
    )
    frame = Frame(drawing)
    svg = draw(chart(drawing))
    lower = re.search(r'fill="#111" d="M\S+ (\S+?)H', svg)
    upper = re.search(r'fill="#222" d="M\S+ (\S+?)H\S+V(\S+?)H', svg)
    assert float(lower[1]) == frame.y(0)
    assert (float(upper[1]), float(upper[2])) == (frame.y(2), frame.y(3))


def test_a_long_curve_has_means_of_neighbours_and_says_so():
    steps = np.arange(2.0 * MOST_POINTS)
    drawing = Drawing(curves=(curve(steps.tolist(), (2 * steps).tolist()),))
    values = values_of(draw(chart(drawing)))["curves"][0]
    assert len(values["x"]) == MOST_POINTS and values["x"][0] == 0.5 and values["y"][0] == 1.0
    assert neighbours(drawing) == 2


def test_large_numbers_of_an_axis_are_short():
    shown = [short_number(v) for v in (0, 2500, 120_000, 3_400_000)]
    assert shown == ["0", "2,500", "120k", "3.4M"]


def test_each_named_held_out_set_is_a_line_of_the_accuracy_and_not_a_teacher():
    rows = [
        {"train/step": 0.0, "eval/accuracy": 0.5, "eval/accuracy_teacher/accuracy": 0.9}
        | {"eval/hard/accuracy": 0.25, "eval/easy/accuracy": 0.75, "eval/hard/pass_at_1": 0.25}
        | {"eval/hard/pass_at_4": 0.5, "eval/hard/loss": 2.0}
    ]
    charts = {chart.title: chart.drawing for chart in charts_of(rows)}
    accuracy = charts["Held-out accuracy"]
    assert [c.label for c in accuracy.curves] == ["student", "easy", "hard"]
    assert [c.y.tolist() for c in accuracy.curves] == [[0.5], [0.75], [0.25]]
    assert [level.label for level in accuracy.levels] == ["teacher 90.0 %"]
    (tries,) = charts["Solved within several tries"].curves
    assert (tries.label, tries.y.tolist()) == ("hard, one of 4 responses", [0.5])
    assert [c.label for c in charts["Loss on given responses"].curves] == ["hard"]


def test_each_source_of_the_held_out_problems_is_a_dashed_line_of_another_colour():
    row = {"train/step": 0.0, "eval/accuracy": 0.5, "eval/hard/accuracy": 0.25}
    rows = [row | {"eval/accuracy_source/accuracy": 0.75, "eval/accuracy_source/math": 0.125}]
    charts = {chart.title: chart.drawing for chart in charts_of(rows)}
    curves = charts["Held-out accuracy"].curves
    assert [c.label for c in curves] == ["student", "hard", "accuracy", "math"]
    assert [c.dashed for c in curves] == [False, False, True, True]
    assert [c.y.tolist() for c in curves[2:]] == [[0.75], [0.125]]
    assert len({c.colour for c in curves}) == 4


# -- in a browser ----------------------------------------------------------------------------------


def write_run(run_dir: Path, seed: int, last: float) -> None:
    run_dir.mkdir()
    rows = [
        {"train/step": 0, "eval/accuracy": 0.25},
        {"train/step": 1, "train/tokens": 100, "time/step_s": 2.0, "reward/mean": 0.5},
        {"train/step": 2, "train/tokens": 100, "time/step_s": 2.0, "reward/mean": 0.75}
        | {"eval/accuracy": last},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "config.yaml").write_text(json.dumps({"run": {"seed": seed}}))


def opened(browser: str, page: Path, script: str, *, width: int = 900) -> str:
    """Open the page in a browser with this width, run `script` in it, and return its result."""
    probe = page.with_name(f"probe-{width}.html")
    ending = f"<script>document.title = 'answer:' + (() => {{{script}}})();</script></body>"
    probe.write_text(page.read_text().replace("</body>", ending))
    done = subprocess.run(
        [
            *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *(f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},1200"),
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=BROWSER_S,
        check=True,
    )
    return unescape(re.search(r"<title>answer:(.*?)</title>", done.stdout, re.DOTALL)[1])


@pytest.mark.browser
def test_an_arrow_key_shows_the_values_of_a_step(tmp_path, browser_path):
    write_run(tmp_path / "a", 0, 0.5)
    script = """
        const plot = document.querySelector('.plot');
        const press = (key) => plot.querySelector('svg').dispatchEvent(
            new KeyboardEvent('keydown', {key}));
        press('End');
        const shown = plot.querySelector('.tip').innerText;
        press('Escape');
        return shown + '|' + plot.querySelector('.tip').hidden;
    """
    answer = opened(browser_path, write_report(tmp_path / "a"), script)
    assert " ".join(answer.split()) == "optimizer step 2 student 50.0 %|true"


@pytest.mark.browser
def test_the_switch_shows_the_comparison_over_tokens_and_seconds(tmp_path, browser_path):
    for name, seed, last in (("a-0", 0, 0.5), ("a-1", 1, 0.75)):
        write_run(tmp_path / name, seed, last)
    script = """
        const seen = () => [...document.querySelectorAll('.curves')]
            .filter((each) => getComputedStyle(each).display !== 'none')
            .map((each) => each.className.split('by-')[1]).join();
        const answers = [seen()];
        for (const name of ['tokens', 'seconds', 'steps']) {
            document.getElementById('by-' + name).click();
            answers.push(seen());
        }
        const svg = document.querySelector('.by-tokens svg');
        document.getElementById('by-tokens').click();
        svg.dispatchEvent(new KeyboardEvent('keydown', {key: 'End'}));
        return answers.join(' ') + '|' + svg.parentNode.querySelector('.tip').innerText;
    """
    page = write_comparison([tmp_path / "a-0", tmp_path / "a-1"])
    views, tip = opened(browser_path, page, script).split("|")
    assert views == "steps tokens seconds steps"
    assert " ".join(tip.split()) == (
        "response tokens trained on 200 a-* (2 seeds) 62.5 % (50.0 % to 75.0 %)"
    )


@pytest.mark.browser
@pytest.mark.parametrize("width", [500, 900, 1440])
def test_no_page_is_wider_than_its_window(tmp_path, browser_path, width: int):
    write_run(tmp_path / "a", 0, 0.5)
    script = "return document.documentElement.scrollWidth <= window.innerWidth;"
    assert opened(browser_path, write_report(tmp_path / "a"), script, width=width) == "true"
