"""From a file's bytes to objects, and to problems with their file, line and column."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from proxyd.api.decode import Decoded, KubeObject, decode
from proxyd.api.findings import Path
from proxyd.api.meta import ObjectName
from proxyd.api.problems import Problem
from proxyd.api.rules import Rules
from proxyd.sources.documents import Document, Unreadable, read_documents


class ParsedFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds. Objects with an error are not among `objects`."""

    objects: tuple[KubeObject, ...] = ()
    problems: tuple[Problem, ...] = ()  # by line and column
    # Objects with an error, by kind and name: an earlier good version of one may stay in force.
    rejected: tuple[tuple[str, ObjectName], ...] = ()
    # False: a part could not be read, or not as whose object. Then objects that were in this file earlier, and are
    # not among `objects`, may still be there, and should stay in force.
    complete: bool = True


def parse_file(label: str, data: bytes, rules: Rules) -> ParsedFile:
    """Read a file of YAML documents, or of JSON values if its name ends in ".json".

    Args:
        label: the file's name, for problems.
        data: its content.
        rules: what is valid.
    """
    reading = _Reading(label)
    for document in read_documents(data, is_json=label.lower().endswith(".json")):
        if isinstance(document, Unreadable):
            reading.complete = False
            reading.problems.append(
                Problem(file=label, line=document.line, column=document.column, message=document.message)
            )
        else:
            reading.add(document, decode(document.value, rules))
    return ParsedFile(
        objects=tuple(reading.objects),
        problems=tuple(sorted(reading.problems)),
        rejected=tuple(reading.rejected),
        complete=reading.complete,
    )


class _Reading:
    """What was read of a file so far."""

    __slots__ = ("complete", "label", "objects", "problems", "rejected", "seen")

    def __init__(self, label: str) -> None:
        self.label = label
        self.complete = True
        self.objects: list[KubeObject] = []
        self.problems: list[Problem] = []
        self.rejected: list[tuple[str, ObjectName]] = []
        self.seen: dict[tuple[str, ObjectName], tuple[Document, Path]] = {}

    def add(self, document: Document, decoded: Decoded) -> None:
        """Take over what a document held, each object but once."""
        self.complete &= decoded.complete
        wanted = [
            (problem, place) for problem, place in zip(decoded.problems, decoded.problem_places, strict=True)
        ]
        for key, place in zip(decoded.rejected, decoded.rejected_places, strict=True):
            if self._first(key, document, place):
                self.rejected.append(key)
        for thing, place in zip(decoded.objects, decoded.object_places, strict=True):
            key = (type(thing).__name__, thing.metadata.key)
            if self._first(key, document, place):
                self.objects.append(thing)
            else:
                wanted.append((self._twice(key), place))
        if not wanted:
            return
        positions = document.positions([place for _, place in wanted])
        for (problem, _), (line, column) in zip(wanted, positions, strict=True):
            self.problems.append(replace(problem, file=self.label, line=line, column=column))

    def _first(self, key: tuple[str, ObjectName], document: Document, place: Path) -> bool:
        mine = (document, place)
        return self.seen.setdefault(key, mine) is mine

    def _twice(self, key: tuple[str, ObjectName]) -> Problem:
        document, place = self.seen[key]
        kind, name = key
        line, _ = document.position(place)
        return Problem(subject=f"{kind} {name}", message=f"is in this file already, at line {line}")
