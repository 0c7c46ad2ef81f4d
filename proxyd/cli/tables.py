"""Tables for people: aligned columns, two spaces apart, no lines. On a narrow terminal they get narrower."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

# By the state of a Service or listener.
COLOURS = {
    "Serving": "green",
    "NoEndpoints": "yellow",
    "Disabled": "yellow",
    "NotServed": "yellow",
    "Conflict": "red",
    "Failed": "red",
}
_CODES = {"green": "\033[32m", "yellow": "\033[33m", "red": "\033[31m"}
_PLAIN = "\033[0m"
NONE = "<none>"
_CUT = "…"
# No column is made narrower than this, its heading or its widest cell.
_NARROWEST = 8
# A narrow terminal does without these columns: the first one goes first. All others stay.
_DISPENSABLE = (
    "EXTERNAL-IP", "ROLE", "TERMINATING", "WORKER", "TYPE", "CONNS", "TOTAL", "SERVING", "IN", "OUT",
    "FRONTEND", "PROTOCOL", "FAILED", "PORT(S)", "AGE", "CLUSTER-IP", "FOR", "ENDPOINTS", "READY",
    "NAMESPACE", "PORT",
)  # fmt: skip


class Status(NamedTuple):
    """A cell of the column STATUS, which is coloured by the state."""

    state: str
    text: str

    def __str__(self) -> str:
        return self.text


class Table:
    """Draws rows under the same headings. The first rows decide how wide the columns are.

    Args:
        headings: one for each column.
        colour: whether escape sequences may be used.
        width: a line has at most so many characters; None: no limit.
    """

    def __init__(self, headings: Sequence[str], *, colour: bool = False, width: int | None = None) -> None:
        self._headings = list(headings)
        self._colour = colour
        self._width = width
        self._columns: list[int] = []
        self._widths: list[int] = []

    def draw(self, rows: Sequence[Sequence[object]]) -> str:
        """Rows as text that ends with a newline. The first call puts the headings above them."""
        cells = list(zip(*rows, strict=True)) or [() for _ in self._headings]
        columns = [_texts(column) for column in cells]
        first = not self._columns
        if first:
            columns = [[heading, *column] for heading, column in zip(self._headings, columns, strict=True)]
            self._fit(columns)
        status = self._headings.index("STATUS") if self._colour and "STATUS" in self._headings else -1
        drawn = []
        for number in self._columns:
            texts = self._justified(columns[number], number)
            if number == status:
                heading, texts = texts[:first], texts[first:]
                texts = heading + [
                    _paint(text, cell) for text, cell in zip(texts, cells[number], strict=True)
                ]
            drawn.append(texts)
        return "".join("  ".join(line).rstrip() + "\n" for line in zip(*drawn, strict=True))

    def _justified(self, column: list[str], number: int) -> list[str]:
        """A column's texts, all of the same width but in the last column."""
        width, last = self._widths[number], number == self._columns[-1]
        if "".join(column).isascii():
            if self._width is not None:
                column = [text if len(text) <= width else truncated(text, width) for text in column]
            return column if last else [text.ljust(width) for text in column]
        if self._width is not None:
            column = [truncated(text, width) for text in column]
        return column if last else [text + " " * (width - display_width(text)) for text in column]

    def _fit(self, texts: Sequence[Sequence[str]]) -> None:
        widths = [_widest(column) for column in texts]
        columns = list(range(len(widths)))
        if self._width is not None:
            least = [
                min(width, max(display_width(heading), _NARROWEST))
                for width, heading in zip(widths, self._headings, strict=True)
            ]
            for spare in _DISPENSABLE:
                if _total(least, columns) <= self._width:
                    break
                columns = [column for column in columns if self._headings[column] != spare]
            while (excess := _total(widths, columns) - self._width) > 0:
                widest = max(columns, key=lambda column: widths[column] - least[column])
                if widths[widest] <= least[widest]:
                    break
                # The widest column gets as narrow as the second widest, but no narrower than needed.
                others = [widths[c] for c in columns if c != widest and widths[c] < widths[widest]]
                step = widths[widest] - max(others, default=0)
                widths[widest] = max(least[widest], widths[widest] - max(1, min(excess, step)))
        self._columns, self._widths = columns, widths


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    colour: bool = False,
    width: int | None = None,
) -> str:
    """A table as text that ends with a newline.

    Args:
        headings: one for each column.
        rows: one cell for each heading.
        colour: as of `Table`.
        width: as of `Table`.
    """
    return Table(headings, colour=colour, width=width).draw(rows)


def clean(text: str) -> str:
    """A text whose control characters are escaped, as a manifest must not control the reader's terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def truncated(text: str, width: int) -> str:
    """A text of at most so many columns. It ends in an ellipsis where something was cut off."""
    if display_width(text) <= width:
        return text
    while text and display_width(text) > width - 1:
        text = text[:-1]
    return text + _CUT


def count(number: int, noun: str) -> str:
    """A number with its noun: `1 file`, `2 files`, `1,204 connections`."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{number:,} {noun if number == 1 else plural}"


def size(number: float) -> str:
    """A number of bytes in powers of ten: `84 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if number >= 10 or unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def display_width(text: str) -> int:
    """How many columns a text takes on a terminal."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def _paint(text: str, cell: object) -> str:
    colour = COLOURS.get(cell.state) if isinstance(cell, Status) else None
    return f"{_CODES[colour]}{text}{_PLAIN}" if colour else text


def _texts(column: Sequence[object]) -> list[str]:
    """The cells of a column as text: cleaned, and never empty."""
    texts = list(map(str, column))
    if not "".join(texts).isprintable():
        texts = list(map(clean, texts))
    return texts if all(texts) else [text or NONE for text in texts]


def _widest(column: Sequence[str]) -> int:
    return max(map(len if "".join(column).isascii() else display_width, column))


def _total(widths: Sequence[int], columns: Sequence[int]) -> int:
    return sum(widths[column] for column in columns) + 2 * max(0, len(columns) - 1)
