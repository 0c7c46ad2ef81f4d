"""Reads YAML text into values: plain documents line by line, all others by libyaml's events.

It does not recurse, bounds what aliases stand for, and refuses duplicate keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from yaml import events
from yaml._yaml import CParser  # libyaml's events; CSafeLoader would set up resolvers that are not used
from yaml.reader import ReaderError

from proxyd.api.findings import clip, shown
from proxyd.sources.text import yaml_plain
from proxyd.sources.text.scalars import CORE_TAG, SUSPECTS, plain, tagged

# Kubernetes objects are about ten levels deep; those with templates and schemas in them are forty.
MAX_DEPTH = 100
# All aliases of one document together may stand for so many values: a guard against "a billion laughs".
MAX_ALIASED = 100_000
# One document may have so many values: `kubectl get -o yaml` of ten thousand Services, read within seconds.
MAX_VALUES = 1_000_000

_SHORT = 16
_MARKER = re.compile(r"^(?:---|\.\.\.)(?=[ \t\n]|\Z)", re.MULTILINE)
# Text that is no document: comments and directives before the first marker, or after "...".
_NOTHING = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\n|%[^\n]*\n)*[ \t]*(?:#[^\n]*)?")
_CONFLICT = re.compile(r"^<{7} ", re.MULTILINE)
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


class Unreadable(Exception):  # noqa: N818  the name says what the document is
    """A document that cannot be read: why, in one line, and at which line and column (from 1; 0: none)."""

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(message)
        self.message, self.line, self.column = message, line, column


def split(text: str) -> Iterator[tuple[int, int, int]]:
    """Yields the documents between `---` and `...` lines: start and end offset, and first line (from 0).

    YAML allows such a line nowhere else, not even in quotes or block scalars, so an error in one document
    cannot hide the next one.
    """
    start = line = 0
    bare = True  # no "---" came before: what follows is a document, or only directives and comments
    for marker in _MARKER.finditer(text):
        if not (bare and _NOTHING.fullmatch(text, start, marker.start())):
            yield start, marker.start(), line
        line += text.count("\n", start, marker.start())
        bare = marker.group() == "..."
        start = marker.end() if bare else marker.start()
    if not (bare and _NOTHING.fullmatch(text, start)):
        yield start, len(text), line


def read(text: str, line: int) -> object:
    """The value of one document; None for an empty one.

    Args:
        text: the document, with line feeds only.
        line: the line (from 0) that it starts in.

    Raises:
        Unreadable: it is not YAML, or has something in it that is refused.
    """
    if len(text) < _SHORT and text.strip() in {"", "---"}:
        return None
    # A plain line holds two values at most: the limit is left to `read_fully`.
    value = yaml_plain.read(text) if text.count("\n") < MAX_VALUES // 2 else None
    return value if value is not None else read_fully(text, line)


def read_fully(text: str, line: int, repeated: list[Unreadable] | None = None) -> object:
    """As `read`, by libyaml alone. `repeated`, where given, gets an error for each key that comes again."""
    try:
        return _Builder(line, repeated).build(text)
    except ReaderError:
        raise _unprintable(text, line) from None
    except yaml.MarkedYAMLError as error:
        raise _syntax(error, text, line) from None


class _Frame:
    """A map or list that is being filled."""

    __slots__ = ("anchor", "before", "items", "key", "merges")

    def __init__(self, items: dict[str, object] | list[object], anchor: str | None, before: int) -> None:
        self.items = items
        self.anchor = anchor
        self.before = before  # values counted before it
        self.key: object = None  # in a map: the key whose value comes next
        self.merges: list[dict[str, object]] | None = None  # the maps that its `<<` named


_MERGE = object()  # the key `<<`
_OPEN = object()  # the value of an anchor whose node is not complete yet


class _Builder:
    """Puts together the value of one document."""

    __slots__ = ("_aliased", "_anchors", "_count", "_documents", "_frames", "_line", "_repeated", "_root")

    def __init__(self, line: int, repeated: list[Unreadable] | None = None) -> None:
        self._line = line
        self._repeated = repeated
        self._frames: list[_Frame] = []
        self._anchors: dict[str, tuple[object, int]] = {}  # each value, and of how many values it is made
        self._count = 0  # values so far, aliased ones included
        self._aliased = 0
        self._documents = 0
        self._root: object = None

    def build(self, text: str) -> object:
        handlers = {
            events.ScalarEvent: self._scalar,
            events.MappingStartEvent: self._start_map,
            events.MappingEndEvent: self._end,
            events.SequenceStartEvent: self._start_list,
            events.SequenceEndEvent: self._end,
            events.AliasEvent: self._alias,
            events.DocumentStartEvent: self._document,
        }
        next_event = CParser(text).get_event
        while True:
            event = next_event()
            handler = handlers.get(type(event))
            if handler is not None:
                handler(event)
                if self._count - self._aliased > MAX_VALUES:
                    raise self._refused(event, f"a document of more than {MAX_VALUES} values: split it")
            elif type(event) is events.StreamEndEvent:
                return self._root

    def _document(self, event: Any) -> None:
        # libyaml takes more characters for line breaks than `split` does.
        self._documents += 1
        if self._documents > 1:
            raise self._refused(event, "a second document starts here without a line of its own")

    def _scalar(self, event: Any) -> None:
        self._count += 1
        text: str = event.value
        value: object = text
        if event.tag is not None:
            try:
                value = tagged(event.tag, text)
            except ValueError:
                raise self._refused(
                    event, f"{_tag_name(event.tag)} {shown(text)} is not a core value of YAML"
                ) from None
        elif event.style == "":
            if not text or text[0] in SUSPECTS:
                value = plain(text)
            elif text == "<<" and self._expects_key():
                value = _MERGE
        if event.anchor is not None:
            self._anchors[event.anchor] = (value if value is not _MERGE else text, 1)
        self._put(event, value)

    def _start_map(self, event: Any) -> None:
        self._start(event, {}, "map")

    def _start_list(self, event: Any) -> None:
        self._start(event, [], "seq")

    def _start(self, event: Any, items: dict[str, object] | list[object], tag: str) -> None:
        if event.tag not in (None, "!", CORE_TAG + tag):
            raise self._refused(event, f"the tag {_tag_name(event.tag)} is not one for {shown(items)}")
        if len(self._frames) >= MAX_DEPTH:
            raise self._refused(event, f"nested more than {MAX_DEPTH} levels deep")
        if self._expects_key():
            advice = ": render templates first" if isinstance(items, dict) else ""
            raise self._refused(event, f"a map key must be a string, got {shown(items)}{advice}")
        if event.anchor is not None:
            self._anchors[event.anchor] = (_OPEN, 0)
        self._frames.append(_Frame(items, event.anchor, self._count))
        self._count += 1

    def _end(self, event: Any) -> None:
        frame = self._frames.pop()
        items = frame.items
        if frame.merges and isinstance(items, dict):
            # A map's own keys win over merged ones, and of merged maps the earlier one wins.
            for merged in frame.merges:
                for key, value in merged.items():
                    items.setdefault(key, value)
        if frame.anchor is not None:
            self._anchors[frame.anchor] = (items, self._count - frame.before)
        self._put(event, items)

    def _alias(self, event: Any) -> None:
        name = clip(event.anchor)
        if event.anchor not in self._anchors:
            raise self._refused(event, f"the alias *{name} stands for nothing: there is no &{name} before it")
        value, size = self._anchors[event.anchor]
        if value is _OPEN:
            raise self._refused(event, f"the alias *{name} is inside of what it stands for")
        self._count += size
        self._aliased += size
        if self._aliased > MAX_ALIASED:
            raise self._refused(event, f"its aliases stand for more than {MAX_ALIASED} values")
        self._put(event, value)

    def _expects_key(self) -> bool:
        if not self._frames:
            return False
        frame = self._frames[-1]
        return frame.key is None and type(frame.items) is dict

    def _put(self, event: Any, value: object) -> None:
        """Adds a complete value to the innermost open map or list."""
        if not self._frames:
            self._root = value
            return
        frame = self._frames[-1]
        items = frame.items
        key = frame.key
        if type(items) is list:
            items.append(value)
        elif key is None:
            frame.key = self._key(event, value, frame)
        else:
            frame.key = None
            if key is _MERGE:
                frame.merges = self._merged(event, value)
            else:
                items[key] = value  # type: ignore[call-overload, index]  # `items` is a dict here

    def _key(self, event: Any, value: object, frame: _Frame) -> object:
        """A map's key as text. Numbers, true and false are turned into text, as sigs.k8s.io/yaml does."""
        if value is _MERGE:
            if frame.merges is not None:
                raise self._refused(event, "the key << is given twice in this map: merge a list")
            return value
        if isinstance(value, bool):
            value = "true" if value else "false"
        elif isinstance(value, int | float):
            value = str(value)
        if type(value) is not str:
            advice = ": put it in quotes" if value is None else ""
            raise self._refused(event, f"a map key must be a string, got {shown(value)}{advice}")
        if value in frame.items:
            error = self._refused(event, f"the key {shown(value)} is given twice in this map")
            if self._repeated is None:
                raise error
            self._repeated.append(error)
        return value

    def _merged(self, event: Any, value: object) -> list[dict[str, object]]:
        given = value if isinstance(value, list) else [value]
        maps = [entry for entry in given if isinstance(entry, dict)]
        if len(maps) != len(given):
            raise self._refused(event, "the value of << must be a map or a list of maps")
        return maps

    def _refused(self, event: Any, message: str) -> Unreadable:
        mark = event.start_mark
        return Unreadable(message, self._line + mark.line + 1, mark.column + 1)


def _tag_name(tag: str) -> str:
    return clip("!!" + tag.removeprefix(CORE_TAG) if tag.startswith(CORE_TAG) else tag)


def _syntax(error: yaml.MarkedYAMLError, text: str, line: int) -> Unreadable:
    if conflict := _CONFLICT.search(text):
        return Unreadable("an unresolved merge conflict", line + text.count("\n", 0, conflict.start()) + 1, 1)
    mark = error.problem_mark or error.context_mark
    problem = clip(error.problem or error.context or "syntax error", 200)
    if mark is None:
        return Unreadable(f"not valid YAML: {problem}", line + 1, 1)
    if problem == "found character that cannot start any token" and text[mark.index : mark.index + 1] == "\t":
        problem = "a tab may not indent: use spaces"
    elif error.context and error.context_mark:
        problem += f" ({error.context} from line {line + error.context_mark.line + 1})"
    return Unreadable(f"not valid YAML: {problem}", line + mark.line + 1, mark.column + 1)


def _unprintable(text: str, line: int) -> Unreadable:
    bad = _UNPRINTABLE.search(text)
    if bad is None:
        return Unreadable("not valid YAML: a character that is not allowed", line + 1, 1)
    at_line, column = line_and_column(text, bad.start())
    return Unreadable(
        f"not valid YAML: the character U+{ord(bad.group()):04X} is not allowed here", line + at_line, column
    )


def line_and_column(text: str, offset: int) -> tuple[int, int]:
    """Line and column, from 1, of an offset in a text."""
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)
