"""Turns a file's bytes into objects, and into problems with file, line and column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import msgspec
from msgspec.structs import replace

from proxyd.api.decode import Decoded, KubeObject, decode
from proxyd.api.findings import Path
from proxyd.api.meta import ObjectName
from proxyd.api.problems import Problem
from proxyd.api.rules import Rules
from proxyd.sources.manifests.edits import Layout, compare
from proxyd.sources.text.documents import MAX_DOCUMENTS, Document, Unreadable, read_documents, text_of

# So many problems of one file are given one by one, each with its place.
MAX_PROBLEMS = 10_000

# The documents of a file of this many bytes or more are remembered.
LARGE = 64 << 10


class ParsedFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds. `objects` are those without an error."""

    objects: tuple[KubeObject, ...] = ()
    problems: tuple[Problem, ...] = ()  # by line and column
    # Kinds and names of objects with an error. An earlier good version of one may stay in force.
    rejected: tuple[tuple[str, ObjectName], ...] = ()
    # False: a document could not be read, or does not tell whose it is. So objects that this file defined
    # before, and that are not among `objects`, may still be in it, and should stay in force.
    complete: bool = True
    # For reading a large file again: what its documents without problems hold, by their text.
    known: Mapping[str, Decoded] = {}
    layout: Layout | None = None  # of a large file without problems
    # If only some documents were read: the objects that they held before, and those that they hold now.
    swapped: tuple[Sequence[KubeObject], Sequence[KubeObject]] | None = None


def parse_file(
    label: str,
    data: bytes,
    rules: Rules,
    known: Mapping[str, Decoded] | None = None,
    layout: Layout | None = None,
) -> ParsedFile:
    """Read a file of YAML documents, or of JSON values if its name ends in ".json".

    Args:
        label: the file's name, for problems.
        data: the file's content.
        rules: what is valid.
        known: that of the result for the same file and rules before: unchanged documents are not read again.
        layout: likewise.
    """
    if layout is not None and (edited := _edited(layout, data, rules, known or {})) is not None:
        return edited
    reading = _Reading(label)
    is_json = label.lower().endswith(".json")
    remembers = len(data) >= LARGE and not is_json
    before = {} if known is None else known
    after: dict[str, Decoded] = {}
    starts: list[int] = []
    text = ""
    for document in read_documents(data, is_json=is_json, known=before):
        if isinstance(document, Unreadable):
            reading.unreadable(document)
        elif document.value is None and document.text in before:
            reading.add(document, before[document.text])
            if remembers:
                after[document.text] = before[document.text]
        else:
            decoded = decode(document.value, rules)
            reading.add(document, decoded)
            if remembers and decoded.complete and not decoded.problems:
                after[document.text] = decoded
        if remembers and isinstance(document, Document):
            starts.append(document.start)
            text = document.all_text
    problems = reading.all_problems()
    plain = len(after) == len(starts) == len(reading.objects) and not problems
    return ParsedFile(
        objects=tuple(reading.objects),
        problems=problems,
        rejected=tuple(reading.rejected),
        complete=reading.complete,
        known=after,
        layout=Layout(text, starts, tuple(reading.objects)) if remembers and plain else None,
    )


def _edited(layout: Layout, data: bytes, rules: Rules, known: Mapping[str, Decoded]) -> ParsedFile | None:
    """What an edited file holds; None unless each document still holds one object, without problems."""
    try:
        text = text_of(data)
    except Unreadable:
        return None
    edit = compare(layout, text)
    if edit is None:
        return None
    beyond = len(layout.starts) - edit.last
    old = layout.objects[edit.first : beyond]
    after = dict(known)
    for start, end in pairwise([*layout.starts[edit.first : beyond], edit.end - edit.shift]):
        if after.pop(layout.text[start:end], None) is None:
            return None
    new: list[KubeObject] = []
    starts: list[int] = []
    for document in read_documents(text[edit.start : edit.end], known=known):
        if isinstance(document, Unreadable):
            return None
        decoded = known[document.text] if document.value is None else decode(document.value, rules)
        if len(decoded.objects) != 1 or decoded.problems or decoded.rejected or not decoded.complete:
            return None
        after[document.text] = decoded
        new.append(decoded.objects[0])
        starts.append(edit.start + document.start)
    objects = (*layout.objects[: edit.first], *new, *layout.objects[beyond:])
    if len(objects) > MAX_DOCUMENTS or len({*map(_key, new)}) < len(new):
        return None
    if not {*map(_key, new)} <= {*map(_key, old)} and len({*map(_key, objects)}) < len(objects):
        return None
    starts = [
        *layout.starts[: edit.first],
        *starts,
        *(start + edit.shift for start in layout.starts[beyond:]),
    ]
    return ParsedFile(objects=objects, known=after, layout=Layout(text, starts, objects), swapped=(old, new))


def _key(thing: KubeObject) -> tuple[str, ObjectName]:
    return type(thing).__name__, thing.metadata.key


class _Reading:
    """Collects what the documents of a file hold."""

    __slots__ = ("complete", "label", "objects", "problems", "rejected", "seen", "unsaid")

    def __init__(self, label: str) -> None:
        self.label = label
        self.complete = True
        self.objects: list[KubeObject] = []
        self.problems: list[Problem] = []
        self.rejected: list[tuple[str, ObjectName]] = []
        self.unsaid: list[Problem] = []
        self.seen: dict[tuple[str, ObjectName], tuple[Document, Path]] = {}

    def add(self, document: Document, decoded: Decoded) -> None:
        """Take the objects and problems of a document. An object that came before is a problem."""
        if len(decoded.objects) == 1 and decoded.complete and not (decoded.problems or decoded.rejected):
            thing = decoded.objects[0]
            if self._first((type(thing).__name__, thing.metadata.key), document, decoded.object_places[0]):
                self.objects.append(thing)
                return
        self.complete &= decoded.complete
        wanted = [
            (problem, place) for problem, place in zip(decoded.problems, decoded.problem_places, strict=True)
        ]
        twice: list[tuple[tuple[str, ObjectName], Path]] = []
        for key, place in zip(decoded.rejected, decoded.rejected_places, strict=True):
            if self._first(key, document, place):
                self.rejected.append(key)
        for thing, place in zip(decoded.objects, decoded.object_places, strict=True):
            key = (type(thing).__name__, thing.metadata.key)
            if self._first(key, document, place):
                self.objects.append(thing)
            else:
                twice.append((key, place))
        room = MAX_PROBLEMS - len(self.problems)
        wanted += zip(
            self._already([key for key, _ in twice], at_most=room), (place for _, place in twice), strict=True
        )
        self.unsaid += [problem for problem, _ in wanted[room:]]
        wanted = wanted[:room]
        if not wanted:
            return
        positions = document.positions([place for _, place in wanted])
        for (problem, _), (line, column) in zip(wanted, positions, strict=True):
            self.problems.append(replace(problem, file=self.label, line=line, column=column))

    def unreadable(self, document: Unreadable) -> None:
        """Make a problem of a document that cannot be read."""
        self.complete = False
        problem = Problem(
            file=self.label, line=document.line, column=document.column, message=document.message
        )
        (self.problems if len(self.problems) < MAX_PROBLEMS else self.unsaid).append(problem)

    def all_problems(self) -> tuple[Problem, ...]:
        """The problems in order, and at the end how many more there are."""
        problems = sorted(self.problems)
        if self.unsaid:
            worst = min(problem.severity for problem in self.unsaid)  # "error" sorts before "warning"
            more = f"{len(self.unsaid)} more problems in this file, after the first {MAX_PROBLEMS}"
            problems.append(Problem(file=self.label, severity=worst, message=more))
        return tuple(problems)

    def _first(self, key: tuple[str, ObjectName], document: Document, place: Path) -> bool:
        mine = (document, place)
        return self.seen.setdefault(key, mine) is mine

    def _already(self, keys: list[tuple[str, ObjectName]], at_most: int) -> Iterator[Problem]:
        """Yields a problem for each object that came before; the first `at_most` say at which line."""
        firsts: dict[int, tuple[Document, list[Path]]] = {}
        for key in keys[:at_most]:
            document, place = self.seen[key]
            firsts.setdefault(id(document), (document, []))[1].append(place)
        lines = {
            (number, place): line
            for number, (document, places) in firsts.items()
            for place, (line, _) in zip(places, document.positions(places), strict=True)
        }
        for kind, name in keys:
            document, place = self.seen[kind, name]
            where = f", at line {lines[id(document), place]}" if (id(document), place) in lines else ""
            yield Problem(kind=kind, object=str(name), message=f"is in this file already{where}")
