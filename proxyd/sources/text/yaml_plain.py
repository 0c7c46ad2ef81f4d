"""Reads plain YAML, as most manifests are, line by line: ten times as fast as by libyaml's events.

A plain line holds one entry: `key: value`, `key:`, `- value` or `- key: value`, in printable ASCII. A value
is one word or several, a text in quotes without escapes, `{}` or `[]`. A document with anything else in it
(anchors, tags, block scalars, values of several lines, comments beside values, duplicate keys, any mistake)
is left to the full reader. So this one returns what the full reader would, and describes no errors.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

from proxyd.sources.text.scalars import SUSPECTS, plain

MAX_DEPTH = 100
_LINE = re.compile(
    r"""
    (?P<indent>[ ]*+)
    (?:(?P<dash>-[ ]++))?
    (?:(?P<key>[A-Za-z_][A-Za-z0-9_./-]{0,200}+):(?=[ ]|\Z))?
    [ ]*+
    (?:
        (?P<plain>[A-Za-z0-9_./~+(][!-~]*(?<!:)(?:[ ]++(?!\#)[!-~]++(?<!:))*)
      | "(?P<double>[ !#-\[\]-~]*)"
      | '(?P<single>[ -&(-~]*)'
      | (?P<empty>\{\}|\[\])
    )?
    [ ]*
    """,
    re.VERBOSE,
)
_NOTHING = re.compile(r"[ ]*(?:#[ -~]*)?")


class _Line(NamedTuple):
    """An entry: `column` is where it begins, `inner` where the text after its dash does (-1: no dash)."""

    column: int
    inner: int
    key: str  # "": it is a value without a key
    value: Any


# What a line is that holds no entry; compared by identity.
_SKIP = _Line(0, -1, "", None)  # empty, or a comment
_REFUSED = _Line(0, -1, "", [])
# These stand for a value that begins in a later line, for `{}` and for `[]` (each entry needs its own).
_OPEN, _EMPTY_MAP, _EMPTY_LIST = object(), object(), object()


@lru_cache(maxsize=4096)
def _line(text: str) -> _Line:
    if _NOTHING.fullmatch(text):
        return _SKIP
    match = _LINE.fullmatch(text)
    if match is None:
        return _REFUSED
    indent, dash, key, bare, double, single, empty = match.groups()
    value: Any
    if bare is not None:
        value = plain(bare) if bare[0] in SUSPECTS else bare
    elif double is not None or single is not None:
        value = single if double is None else double
    elif empty is not None:
        value = _EMPTY_MAP if empty == "{}" else _EMPTY_LIST
    else:
        value = _OPEN
    if key is None:
        if dash is None or value is _OPEN:
            return _REFUSED
        key = ""
    elif key[0] in SUSPECTS and type(plain(key)) is not str:
        return _REFUSED
    column = len(indent)
    return _Line(column, column + len(dash) if dash else -1, key, value)


def read(text: str) -> dict[str, Any] | None:
    """The value of a document; None if it is not a map, or not all of it is plain."""
    lines = text.split("\n")
    start = 1 if lines[0] == "---" else 0
    root: dict[str, Any] = {}
    holder: Any = None  # the innermost open map or list
    at = -1  # its column
    outer: list[tuple[int, Any]] = []  # those around it
    waiting = ""  # the key of `holder` whose value may begin in this line
    for number in range(start, len(lines)):
        line = _line(lines[number])
        if line is _SKIP:
            continue
        if line is _REFUSED:
            return None
        column, inner, key, value = line
        if holder is None:
            if inner >= 0:
                return None
            holder, at = root, column
        elif waiting and (column > at or (column == at and inner >= 0)):
            opened: Any = {} if inner < 0 else []
            holder[waiting] = opened
            outer.append((at, holder))
            if len(outer) >= MAX_DEPTH:
                return None
            holder, at = opened, column
        elif column != at or (inner < 0) != (type(holder) is dict):
            # A map or list ends before this line, or the line is a mistake.
            if column > at:
                return None
            while outer:
                at, holder = outer.pop()
                if column >= at and (column > at or (inner < 0) == (type(holder) is dict)):
                    break
            if column != at or (inner < 0) != (type(holder) is dict):
                return None
        waiting = ""
        if value is _EMPTY_MAP:
            value = {}
        elif value is _EMPTY_LIST:
            value = []
        if inner >= 0:
            if not key:
                holder.append(value)
                continue
            item: dict[str, Any] = {}
            holder.append(item)
            outer.append((at, holder))
            if len(outer) >= MAX_DEPTH:
                return None
            holder, at = item, inner
        if key in holder:
            return None
        if value is _OPEN:
            waiting = key
            holder[key] = None
        else:
            holder[key] = value
    return root if holder is not None else None
