"""Reads JSON text: several values in a row, no duplicate keys, and the position of a value when asked."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from proxyd.api.findings import Path, shown
from proxyd.sources.text.yaml_reader import Unreadable, line_and_column

_SPACE = re.compile(r"[ \t\n\r]*")
_TOKEN = re.compile(r'[{}\[\],:]|"[^"\\]*(?:\\.[^"\\]*)*"|[^\s{}\[\],:"]+')
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# Kubernetes objects need no longer numbers, and Python is slow on them, or refuses them: they stay text.
_MAX_DIGITS = 40

# A search for positions gives up after so many values, which take a few seconds.
_MAX_WALKED = 2_000_000
_CONSTANTS = ("NaN", "Infinity", "-Infinity")


class _TwiceError(ValueError):
    """An object has the same key twice."""


class _ConstantError(ValueError):
    """NaN or Infinity, which Python's reader takes and JSON does not have."""


def read_all(text: str) -> Iterator[tuple[object, int, int]]:
    """Yields each value of a text, with its start and end offset.

    Raises:
        Unreadable: the next value is not JSON, or has something in it that is refused. The rest is not read.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_constant=_constant)
    offset = _skip(text, 0)
    while offset < len(text):
        try:
            value, end = decoder.raw_decode(text, offset)
            if _SURROGATE.search(text, offset, end):
                json.dumps(value, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            message = (error.msg[:1].lower() + error.msg[1:]).removesuffix(" at").removesuffix(" starting")
            raise Unreadable(f"not valid JSON: {message}", *line_and_column(text, error.pos)) from None
        except UnicodeEncodeError:
            raise Unreadable(
                "a text in this value has half of a surrogate pair (\\ud800-\\udfff)",
                *line_and_column(text, offset),
            ) from None
        except _TwiceError:
            raise _twice(text, offset) from None
        except _ConstantError:
            raise _constant_at(text, offset) from None
        except RecursionError:
            raise Unreadable("nested too deep", *line_and_column(text, offset)) from None
        yield value, offset, end
        offset = _skip(text, end)


def positions(text: str, offset: int, paths: Iterable[Path]) -> list[tuple[int, int]]:
    """Line and column, from 1, of the value at each path, or of the nearest value above it that exists.

    Args:
        text: the whole text; valid JSON from `offset` to the end of one value.
        offset: where the value starts.
        paths: keys and indexes from the root.
    """
    paths = list(paths)
    wanted = {path[:length] for path in paths for length in range(len(path) + 1)}
    places: dict[Path, int] = {(): offset}
    for path, place, _ in islice(_walk(text, offset), _MAX_WALKED):
        if path in wanted:
            places[path] = place
            if len(places) == len(wanted):
                break
    lines = [0, *(feed.end() for feed in re.finditer("\n", text))]
    found = []
    for path in paths:
        while path not in places:
            path = path[:-1]  # noqa: PLW2901  one level up at a time; the root has a place
        line = bisect_right(lines, places[path])
        found.append((line, places[path] - lines[line - 1] + 1))
    return found


def _skip(text: str, offset: int) -> int:
    space = _SPACE.match(text, offset)
    return space.end() if space else offset


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _TwiceError
    return value


def _integer(text: str) -> object:
    return int(text) if len(text) <= _MAX_DIGITS else text


def _constant(text: str) -> object:
    raise _ConstantError(text)


def _twice(text: str, offset: int) -> Unreadable:
    seen: set[Path] = set()
    for path, _, key_at in _walk(text, offset):
        if path in seen:
            return Unreadable(
                f"the key {shown(path[-1])} is given twice in this object", *line_and_column(text, key_at)
            )
        seen.add(path)
    return Unreadable("a key is given twice in an object", *line_and_column(text, offset))


def _constant_at(text: str, offset: int) -> Unreadable:
    for token in _TOKEN.finditer(text, offset):
        if token.group() in _CONSTANTS:
            return Unreadable(
                f"not valid JSON: {token.group()} is no JSON value", *line_and_column(text, token.start())
            )
    return Unreadable("not valid JSON: NaN is no JSON value", *line_and_column(text, offset))


def _walk(text: str, offset: int) -> Iterator[tuple[Path, int, int]]:
    """Yields each value of a JSON text: its path, its offset, and that of its key (or again its own)."""
    stack: list[str | int] = []  # the key or index of each open object or array
    expects_key = False
    key_at = -1
    for token in _TOKEN.finditer(text, offset):
        mark = token.group()
        if mark == ":":
            continue
        if mark == ",":
            last = stack[-1]
            expects_key = isinstance(last, str)
            if isinstance(last, int):
                stack[-1] = last + 1
        elif mark in "]}":
            stack.pop()
            expects_key = False
        elif expects_key:
            stack[-1] = json.loads(mark)
            key_at = token.start()
            expects_key = False
        else:
            start = token.start()
            yield tuple(stack), start, start if key_at < 0 else key_at
            key_at = -1
            if mark in "{[":
                expects_key = mark == "{"
                stack.append("" if expects_key else 0)
        if not stack:
            return
