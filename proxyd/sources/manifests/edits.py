"""What an edit of a large file left as it was: only the documents between the first and the last change are read again."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import msgspec

from proxyd.api.decode import KubeObject

_START = "---"


class Layout(msgspec.Struct, frozen=True):
    """A file without problems, each of whose documents holds one object.

    Attributes:
        text: all of it.
        starts: offset of each document.
        objects: one for each document.
    """

    text: str
    starts: Sequence[int]
    objects: Sequence[KubeObject]


class Edit(msgspec.Struct, frozen=True):
    """Where a new text differs from that of a layout, in whole documents.

    Attributes:
        first: how many documents at the beginning are the same.
        last: how many at the end are.
        start: where, in the new text, the documents in between begin.
        end: and where they end.
        shift: characters that the new text has more.
    """

    first: int
    last: int
    start: int
    end: int
    shift: int


def compare(layout: Layout, text: str) -> Edit | None:
    """What is to be read of a new text; None where it takes all of it.

    A document that begins with its marker, `---` at the beginning of a line, is the same whatever comes before it; and up
    to the next marker nothing that comes after it matters.
    """
    old, starts = layout.text, layout.starts
    same = _common(old, text)
    same_end = _common_end(old, text, min(len(old), len(text)) - same)
    shift = len(text) - len(old)
    # The last document whose marker, and what tells that it is one, come before the first change: it may hold the change.
    first = bisect_right(starts, same - len(_START) - 1) - 1
    # The first one after the last change; the line feed before its marker must be the same too.
    beyond = bisect_left(starts, len(old) - same_end + 1)
    if first < 0 or beyond <= first or not old.startswith(_START, starts[first]):
        return None
    if beyond == len(starts):
        return Edit(first, 0, starts[first], len(text), shift)
    if not old.startswith(_START, starts[beyond]):
        return None
    return Edit(first, len(starts) - beyond, starts[first], starts[beyond] + shift, shift)


def _common(one: str, other: str) -> int:
    """How many characters at the beginning are the same."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _common_end(one: str, other: str, most: int) -> int:
    """How many characters at the end are the same; `most` at most."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if one[len(one) - middle : len(one) - low] == other[len(other) - middle : len(other) - low]:
            low = middle
        else:
            high = middle - 1
    return low
