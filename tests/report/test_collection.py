"""The pages of experiments as one file."""

import base64
from pathlib import Path

import pytest

from hybridrl.cli import main
from hybridrl.core.errors import DataError
from hybridrl.report.collection import is_collection, write_collection

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
)
SUMMARY = """# Are they true?

See [the rules](../rules.md#first) and [the paper](https://arxiv.org/abs/2512.23097).

| experiment | verdict |
|---|---|
| [Z9. Last letter](Z9/README.md) | **refuted** |
| [B2. Second](B2/README.md) | **confirmed** |
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    experiments = tmp_path / "experiments"
    for name, text in {
        "Z9": "# Z9. Last letter\n\n[B2](../B2/README.md): a < b <script>.\n\n![](picture.png)\n",
        "B2": "# B2. Second\n\nOne in two.\n",
        "A1": "# A1. Not in the summary\n\nText.\n",
    }.items():
        (experiments / name).mkdir(parents=True)
        (experiments / name / "README.md").write_text(text)
    (experiments / "README.md").write_text(SUMMARY)
    (experiments / "Z9" / "picture.png").write_bytes(PIXEL)
    return experiments


def test_pages_follow_in_the_order_of_the_summary_and_those_without_a_link_come_last(folder: Path):
    html = write_collection(folder).read_text()
    titles = ("Are they true?</h1>", "Z9. Last letter</h2>", "B2. Second</h2>", "A1. Not in")
    places = [html.index(title) for title in titles]
    assert places == sorted(places)


def test_a_link_to_a_page_leads_to_its_part_and_another_link_to_where_it_led(folder: Path):
    html = write_collection(folder).read_text()
    assert html.count('<a href="#B2">') == 2, "of the summary, and of Z9"
    assert '<h2 id="B2">' in html
    assert '<a href="../rules.md#first">' in html
    assert '<a href="https://arxiv.org/abs/2512.23097">' in html


def test_pictures_are_inside_of_the_file_and_html_in_a_page_is_text(folder: Path):
    html = write_collection(folder).read_text()
    assert f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}" in html
    assert "a &lt; b &lt;script&gt;." in html


@pytest.mark.parametrize("picture", ["absent.png", "../../secret.png", "README.md"])
def test_a_picture_that_is_missing_or_lies_outside_is_refused(folder: Path, picture: str):
    (folder.parent / "secret.png").write_bytes(PIXEL)
    (folder / "B2" / "README.md").write_text(f"# B2\n\n![x]({picture})\n")
    with pytest.raises(DataError, match="shows this picture, which is not a PNG file in "):
        write_collection(folder)


def test_the_command_writes_the_report_of_a_folder_of_experiments(
    folder: Path, capsys: pytest.CaptureFixture
):
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}/report.html\n"


def test_a_run_with_a_page_of_its_own_is_no_folder_of_experiments(folder: Path):
    assert is_collection(folder)
    (folder / "metrics.jsonl").write_text("")
    assert not is_collection(folder)
