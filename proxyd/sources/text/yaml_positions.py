"""Finds the line and column of values in a YAML document, by reading it once more: positions are not kept."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import yaml
from yaml import events
from yaml._yaml import CParser  # libyaml's events; CSafeLoader would set up resolvers that are not used

from proxyd.api.findings import Path
from proxyd.sources.text.yaml_reader import MAX_ALIASED

# Longer documents are not made into trees of nodes, which take 50 times the memory of the text.
_LARGE = 1 << 18


class _Composer(CParser):
    """Makes libyaml's tree of nodes and marks, without resolving tags: nobody needs them here."""

    @staticmethod
    def resolve(*_: object) -> str:
        return "?"

    @staticmethod
    def descend_resolver(*_: object) -> None:
        pass

    @staticmethod
    def ascend_resolver(*_: object) -> None:
        pass


def positions(text: str, line: int, paths: Iterable[Path]) -> list[tuple[int, int]]:
    """Line and column, from 1, of the value at each path, or of the nearest value above it that exists.

    Args:
        text: a document that `read` accepts: composing recurses, and `read` bounds the depth.
        line: the line (from 0) it starts in.
        paths: keys and indexes from the root.
    """
    if len(text) > _LARGE:
        return _positions_of_large(text, line, paths)
    root: yaml.Node | None = None
    # The composer refuses a document that defines an anchor twice, which YAML allows.
    with suppress(yaml.YAMLError):
        root = _Composer(text).get_single_node()
    found = []
    for path in paths:
        mark = _node_at(root, path).start_mark if root is not None else None
        found.append((line + mark.line + 1, mark.column + 1) if mark is not None else (line + 1, 1))
    return found


class _Wanted:
    """A node of the tree of wanted paths; `mark` is where its value starts."""

    __slots__ = ("below", "mark")

    def __init__(self) -> None:
        self.below: dict[str | int, _Wanted] = {}
        self.mark: tuple[int, int] | None = None


def _positions_of_large(text: str, line: int, paths: Iterable[Path]) -> list[tuple[int, int]]:
    """As `positions`, from events alone. What an alias or a merge brings is found at the map that has it."""
    paths = list(paths)
    root = _Wanted()
    missing: set[_Wanted] = set()
    for path in paths:
        wanted = root
        for key in path:
            wanted = wanted.below.setdefault(key, _Wanted())
        missing.add(wanted)
    # Each open map or list: what is wanted in it, whether it is a map, its index or key (None: comes next).
    stack: list[tuple[_Wanted | None, bool, str | int | None]] = []
    parser = CParser(text)
    with suppress(yaml.YAMLError):
        while missing:
            event: Any = parser.get_event()
            kind = type(event)
            if kind in _ENDS:
                stack.pop()
                continue
            if kind not in _NODES:
                if kind is events.StreamEndEvent:
                    break
                continue
            wanted_here: _Wanted | None = root if not stack else None
            if stack:
                inside, is_map, at = stack[-1]
                if at is None:
                    stack[-1] = (inside, True, event.value if kind is events.ScalarEvent else "")
                    continue
                wanted_here = inside.below.get(at) if inside else None
                stack[-1] = (inside, is_map, None if is_map else int(at) + 1)
            if wanted_here is not None:
                wanted_here.mark = (line + event.start_mark.line + 1, event.start_mark.column + 1)
                missing.discard(wanted_here)
            if kind in _STARTS:
                opens_map = kind is events.MappingStartEvent
                stack.append((wanted_here, opens_map, None if opens_map else 0))
    found = []
    for path in paths:
        here, mark = root, root.mark or (line + 1, 1)
        for key in path:
            here = here.below[key]
            mark = here.mark or mark
        found.append(mark)
    return found


_STARTS = {events.MappingStartEvent, events.SequenceStartEvent}
_ENDS = {events.MappingEndEvent, events.SequenceEndEvent}
_NODES = _STARTS | {events.ScalarEvent, events.AliasEvent}


def _node_at(node: yaml.Node, path: Path) -> yaml.Node:
    for key in path:
        child = None
        if isinstance(node, yaml.MappingNode):
            child = _value_of(node, key)
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            child = node.value[key]
        if child is None:
            break
        node = child
    return node


def _value_of(node: yaml.MappingNode, key: str | int) -> yaml.Node | None:
    """The value of a key of a map, or of the maps merged into it."""
    pending: list[yaml.Node] = [node]
    seen = 0
    while pending and seen < MAX_ALIASED:
        seen += 1
        here = pending.pop(0)
        if isinstance(here, yaml.SequenceNode):
            pending[:0] = here.value
        elif isinstance(here, yaml.MappingNode):
            for name, value in here.value:
                if name.value == key:
                    return value  # type: ignore[no-any-return]  # the stubs say Any
            pending[:0] = [value for name, value in here.value if name.value == "<<"]
    return None
