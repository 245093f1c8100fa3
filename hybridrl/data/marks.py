"""Marks around texts that a template renders, by which each text is recognised in the output.

The output alone does not show where a text came from: "4" may be an answer or part of "42". So each
text is put between two copies of a private-use character, a different one for each text, and the
output between them is compared with the text.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

FIRST = 0xF0000  # the first of 65 534 private-use characters of a Unicode plane
MARK = re.compile("[\U000f0000-\U000ffffd]")
MOST = 0xFFFE

TAG = re.compile(r"(?:</?\w+>|\[/?\w+\])")
LEADING = re.compile(rf"(?:\s+|{TAG.pattern})*")


@dataclass(frozen=True, slots=True)
class Piece:
    """A text that the output must contain."""

    text: str
    what: str  # for an error, e.g. "the content of message 2, role `tool`"
    inner: str  # the text between the marks; empty: there are no marks
    mark: str
    escaped: bool  # the output may escape it as in a JSON string

    def is_in(self, rendered: str) -> bool:
        """Whether the output contains the whole text, including its tags."""
        return any(
            form.strip() in rendered or _pattern(form).search(rendered)
            for form in self._forms(self.text)
        )

    def is_marked_in(self, rendered: str) -> bool:
        """Whether the output contains the text between its marks."""
        parts = rendered.split(self.mark)
        return len(parts) > 2 and any(
            form == parts[1] or _pattern(form).fullmatch(parts[1])
            for form in self._forms(self.inner)
        )

    def _forms(self, text: str) -> Iterator[str]:
        yield text
        if self.escaped:
            yield json.dumps(text, ensure_ascii=False)[1:-1]


class Marks:
    """The marked texts of one rendering of a template."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def around(self, text: str, what: str, *, escaped: bool = True) -> str:
        """`text` with marks between its outer white space and tags, so that a template still sees
        how the text begins and ends.

        Example: around("<think>a</think>4", ...) == "<think>Ma</think>4M", M a private-use
        character
        """
        begin = LEADING.match(text).end()  # type: ignore[union-attr]  # matches the empty text too
        end = max(begin, _end_of_core(text))
        inner = text[begin:end]
        if not text.strip():
            return text
        mark = chr(FIRST + len(self.pieces) % MOST)
        self.pieces.append(Piece(text, what, inner, mark, escaped))
        return f"{text[:begin]}{mark}{inner}{mark}{text[end:]}" if inner else text

    def missing(self, marked: str, rendered: str) -> Piece | None:
        """The first text that is missing from the output; None if none is.

        Args:
            marked: the template's output for the marked texts.
            rendered: its output for the texts without marks. If the two differ by more than the
                marks, the template depends on the texts, and only `rendered` is searched.
        """
        same = MARK.sub("", marked) == MARK.sub("", rendered)
        for piece in self.pieces:
            if not piece.is_in(rendered):
                return piece
            if same and piece.inner and not piece.is_marked_in(marked):
                return piece
        return None


def _end_of_core(text: str) -> int:
    """The index at which the white space and tags at the end of a text begin."""
    end = len(text.rstrip())
    for tag in reversed(list(TAG.finditer(text))):
        if tag.end() != end:
            break
        end = len(text[: tag.start()].rstrip())
    return end


def _pattern(text: str) -> re.Pattern[str]:
    """`text` with any amount of white space at its ends and around its tags."""
    parts = re.split(f"({TAG.pattern})", text)
    return re.compile(r"\s*".join(re.escape(part.strip()) for part in parts if part.strip()))
