"""`hybridrl report FOLDER` for a folder of experiments: all of its pages as one file.

tools/reproduce writes such a folder: README.md, which is the summary, and a folder for each
experiment with a README.md and its picture.
"""

import base64
import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

from hybridrl.core.errors import DataError
from hybridrl.core.files import replace_text
from hybridrl.report.html import document
from hybridrl.tracking.jsonl import METRICS

PAGE = "README.md"
REPORT = "report.html"


def is_collection(folder: Path) -> bool:
    """Whether the folder contains the pages of experiments, and not a run."""
    return (
        not (folder / METRICS).exists()
        and (folder / PAGE).is_file()
        and next(folder.glob(f"*/{PAGE}"), None) is not None
    )


def write_collection(folder: Path) -> Path:
    """Write report.html, which needs no other file, into the folder; returns its path.

    Raises:
        DataError: a picture is missing, outside of the folder, or not a PNG file.
        OSError: a file cannot be read or written.
    """
    summary = parse(folder / PAGE)
    title = heading(summary, "Experiments")
    pages = in_order(summary, folder)
    places = {page.resolve(): page.parent.name for page in pages}
    parts = [rendered(without_heading(summary), folder, folder, places)]
    for page in pages:
        tokens = parse(page)
        name = page.parent.name
        parts.append(f'<h2 id="{escape(name)}">{escape(heading(tokens, name))}</h2>')
        parts.append(rendered(without_heading(tokens), page.parent, folder, places))
    path = folder / REPORT
    replace_text(path, document(title, f"{len(pages)} experiments with hybridrl", parts))
    return path


def parse(page: Path) -> list[Token]:
    """The blocks of a Markdown file. HTML in it is treated as text."""
    return markdown().parse(page.read_text(encoding="utf-8"))


def markdown() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable("table")


def heading(tokens: Sequence[Token], default: str) -> str:
    """The text of the heading with which a page begins; the default if it begins with another
    block.
    """
    return tokens[1].content if starts_with_heading(tokens) else default


def without_heading(tokens: list[Token]) -> list[Token]:
    """The blocks after the heading with which a page begins."""
    return tokens[3:] if starts_with_heading(tokens) else tokens


def starts_with_heading(tokens: Sequence[Token]) -> bool:
    return bool(tokens) and tokens[0].type == "heading_open"


def in_order(summary: Sequence[Token], folder: Path) -> list[Path]:
    """The pages of the experiments, in the order in which the summary links to them; pages without
    a link come last.
    """
    linked = [
        folder / str(token.attrs["href"]) for token in inline(summary) if token.type == "link_open"
    ]
    every = sorted(folder.glob(f"*/{PAGE}"))
    return list(dict.fromkeys([page for page in linked if page in every] + every))


def inline(tokens: Sequence[Token]) -> Iterator[Token]:
    """The links, pictures and texts inside the blocks."""
    for token in tokens:
        yield from token.children or ()


def rendered(tokens: Sequence[Token], base: Path, folder: Path, places: dict[Path, str]) -> str:
    """The blocks as HTML with embedded pictures.

    Args:
        base: the folder of the page with these blocks, to which its links are relative.
        folder: the folder of the report.
        places: the anchor of each page in the report.

    Raises:
        DataError: as `picture`.
    """
    for token in inline(tokens):
        if token.type == "image":
            token.attrs["src"] = picture(base / str(token.attrs["src"]), folder)
        if token.type == "link_open":
            token.attrs["href"] = target(str(token.attrs["href"]), base, folder, places)
    rules = markdown()
    html = rules.renderer.render(tokens, rules.options, {})
    return html.replace("<table>", '<div class="scroll"><table>').replace(
        "</table>", "</table></div>"
    )


def picture(path: Path, folder: Path) -> str:
    """A PNG file as a data URL that contains it.

    Raises:
        DataError: the file is missing, outside of the folder, or not a PNG file.
    """
    inside = path.resolve().is_relative_to(folder.resolve())
    if not inside or path.suffix != ".png" or not path.is_file():
        raise DataError(
            f"{path}: the page beside it shows this picture, which is not a PNG file in {folder}; "
            "add the file, or remove the picture from the page"
        )
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def target(link: str, base: Path, folder: Path, places: dict[Path, str]) -> str:
    """The address of a link in the report: the anchor of a page that the report contains, otherwise
    the same target as before.
    """
    parts = urlsplit(link)
    if parts.scheme or not parts.path:
        return link
    path = (base / parts.path).resolve()
    if path in places:
        return f"#{places[path]}"
    return parts._replace(path=os.path.relpath(path, folder.resolve())).geturl()
