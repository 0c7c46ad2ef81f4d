"""Tables for people: columns aligned, two spaces apart, no lines."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_GREEN, _YELLOW, _RED, _PLAIN = "\033[32m", "\033[33m", "\033[31m", "\033[0m"
_COLOURS = {
    "Serving": _GREEN,
    "NoEndpoints": _YELLOW,
    "Disabled": _YELLOW,
    "NotServed": _YELLOW,
    "Conflict": _RED,
    "Failed": _RED,
}
NONE = "<none>"


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], *, colour: bool = False) -> str:
    """A table as text that ends with a newline. The column STATUS, if any, is coloured by its first word.

    Args:
        headings: of the columns.
        rows: cells; as many in each as there are headings.
        colour: whether escape sequences may be used.
    """
    cells = [list(headings), *([clean(str(cell)) or NONE for cell in row] for row in rows)]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    status = headings.index("STATUS") if colour and "STATUS" in headings else -1
    lines = []
    for number, row in enumerate(cells):
        padded = [cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        padded[-1] = row[-1]
        if status >= 0 and number:
            padded[status] = paint(padded[status])
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines) + "\n"


def paint(status: str) -> str:
    """A status in the colour of its first word."""
    code = _COLOURS.get(status.split(":", 1)[0].strip())
    return f"{code}{status}{_PLAIN}" if code else status


def clean(text: str) -> str:
    """A text without control characters: what a manifest says must not steer the reader's terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


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


def _width(text: str) -> int:
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)
