"""Tables for people: columns aligned, two spaces apart, no lines; shortened where a terminal is narrow."""

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
# A column is not made narrower than this, or its heading, or its widest cell.
_NARROWEST = 8
# Columns that a narrow terminal does without, the first one first. All others stay.
_SPARE = (
    "EXTERNAL-IP", "ROLE", "TERMINATING", "WORKER", "TYPE", "CONNS", "TOTAL", "SERVING", "IN", "OUT", "FRONTEND",
    "PROTOCOL", "FAILED", "PORT(S)", "AGE", "CLUSTER-IP", "FOR", "ENDPOINTS", "READY", "NAMESPACE", "PORT",
)  # fmt: skip


class Status(NamedTuple):
    """A cell of the column STATUS, which is coloured by the state."""

    state: str
    text: str

    def __str__(self) -> str:
        return self.text


class Table:
    """Draws rows under the same headings, with widths chosen from the first rows.

    Args:
        headings: of the columns.
        colour: whether escape sequences may be used.
        width: characters of a line that must not be exceeded; None: as wide as need be.
    """

    def __init__(self, headings: Sequence[str], *, colour: bool = False, width: int | None = None) -> None:
        self._headings = list(headings)
        self._colour = colour
        self._width = width
        self._columns: list[int] = []
        self._widths: list[int] = []

    def draw(self, rows: Sequence[Sequence[object]]) -> str:
        """Rows as text that ends with a newline; the first time with the headings above them."""
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
        """A column's texts, all of its width; those of the last one end where they end."""
        width, last = self._widths[number], number == self._columns[-1]
        if "".join(column).isascii():
            if self._width is not None:
                column = [text if len(text) <= width else cut(text, width) for text in column]
            return column if last else [text.ljust(width) for text in column]
        if self._width is not None:
            column = [cut(text, width) for text in column]
        return column if last else [text + " " * (width - length(text)) for text in column]

    def _fit(self, texts: Sequence[Sequence[str]]) -> None:
        widths = [_widest(column) for column in texts]
        columns = list(range(len(widths)))
        if self._width is not None:
            least = [
                min(width, max(length(heading), _NARROWEST))
                for width, heading in zip(widths, self._headings, strict=True)
            ]
            for spare in _SPARE:
                if _total(least, columns) <= self._width:
                    break
                columns = [column for column in columns if self._headings[column] != spare]
            while (excess := _total(widths, columns) - self._width) > 0:
                widest = max(columns, key=lambda column: widths[column] - least[column])
                if widths[widest] <= least[widest]:
                    break
                # The widest gives up what sets it apart from the next, but not more than is needed.
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
    """A table as text that ends with a newline; see `Table`.

    Args:
        headings: of the columns.
        rows: cells; as many in each as there are headings.
        colour: whether escape sequences may be used.
        width: characters of a line that must not be exceeded; None: as wide as need be.
    """
    return Table(headings, colour=colour, width=width).draw(rows)


def clean(text: str) -> str:
    """A text without control characters: what a manifest says must not steer the reader's terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def cut(text: str, width: int) -> str:
    """A text that is at most so wide; what was cut off is shown by an ellipsis."""
    if length(text) <= width:
        return text
    while text and length(text) > width - 1:
        text = text[:-1]
    return text + _CUT


def count(number: int, noun: str) -> str:
    """A number with its noun: `1 file`, `2 files`, `1,204 connections`."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{number:,} {noun if number == 1 else plural}"


def size(number: float) -> str:
    """Bytes as a person would say them, in powers of ten: `84 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if number >= 10 or unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def length(text: str) -> int:
    """Columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def _paint(text: str, cell: object) -> str:
    colour = COLOURS.get(cell.state) if isinstance(cell, Status) else None
    return f"{_CODES[colour]}{text}{_PLAIN}" if colour else text


def _texts(column: Sequence[object]) -> list[str]:
    """The cells of a column as they are shown."""
    texts = list(map(str, column))
    if not "".join(texts).isprintable():
        texts = list(map(clean, texts))
    return texts if all(texts) else [text or NONE for text in texts]


def _widest(column: Sequence[str]) -> int:
    return max(map(len if "".join(column).isascii() else length, column))


def _total(widths: Sequence[int], columns: Sequence[int]) -> int:
    return sum(widths[column] for column in columns) + 2 * max(0, len(columns) - 1)
