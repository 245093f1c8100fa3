"""Marks around texts that go through a template, by which each of them is recognised in what comes
out.

A text alone does not show where it came from: "4" may be somebody's answer or part of "42". So each
text is put between two private characters of its own, and what stands between them afterwards is
compared with the text.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

FIRST = 0xF0000  # of a plane of 65 534 characters that Unicode leaves to private use
MARK = re.compile("[\U000f0000-\U000ffffd]")
MOST = 0xFFFE

TAG = re.compile(r"(?:</?\w+>|\[/?\w+\])")
LEADING = re.compile(rf"(?:\s+|{TAG.pattern})*")


@dataclass(frozen=True, slots=True)
class Piece:
    """A text that must come out."""

    text: str
    what: str  # in an error, e.g. "the content of message 2, role `tool`"
    inner: str  # between the marks; empty: there are none
    mark: str
    escaped: bool  # may come out as in a JSON string

    def stands_in(self, rendered: str) -> bool:
        """Whether the whole text is somewhere, tags included."""
        return any(
            form.strip() in rendered or _pattern(form).search(rendered)
            for form in self._forms(self.text)
        )

    def stands_marked(self, rendered: str) -> bool:
        """Whether it is between its marks."""
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
    """One template's run over marked texts."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def around(self, text: str, what: str, *, escaped: bool = True) -> str:
        """`text` with marks within its outer white space and tags, so that a template sees how it
        begins and ends.

        Example: around("<think>a</think>4", ...) == "<think>Ma</think>4M", M a private character
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
        """The first text that did not come out.

        Args:
            marked: what the template made of the marked texts.
            rendered: what it made of the texts themselves. Where it differs by more than the marks,
                the template looks at texts before it writes them, and they are looked for in
                `rendered` alone.
        """
        same = MARK.sub("", marked) == MARK.sub("", rendered)
        for piece in self.pieces:
            if not piece.stands_in(rendered):
                return piece
            if same and piece.inner and not piece.stands_marked(marked):
                return piece
        return None


def _end_of_core(text: str) -> int:
    """Where the white space and tags at the end of a text begin."""
    end = len(text.rstrip())
    for tag in reversed(list(TAG.finditer(text))):
        if tag.end() != end:
            break
        end = len(text[: tag.start()].rstrip())
    return end


def _pattern(text: str) -> re.Pattern[str]:
    """`text` with any white space, or none, at its ends and around its tags."""
    parts = re.split(f"({TAG.pattern})", text)
    return re.compile(r"\s*".join(re.escape(part.strip()) for part in parts if part.strip()))
