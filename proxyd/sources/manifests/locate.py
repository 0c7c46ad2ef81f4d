"""Finds the line and column of a problem by reading its file once more: positions are not kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from msgspec.structs import replace

from proxyd.api.decode import decode
from proxyd.api.findings import Path
from proxyd.api.problems import Problem
from proxyd.api.rules import Rules
from proxyd.sources.manifests.files import display, survey
from proxyd.sources.manifests.regular import read_regular
from proxyd.sources.text.documents import Document, read_documents

_STEP = re.compile(r"\[([^\]]*)\]|([^.\[\]]+)")
_RULES = Rules()
_Subject: TypeAlias = tuple[str, str]  # kind and object of a problem


def located(problems: Iterable[Problem], paths: Sequence[str]) -> list[Problem]:
    """The problems, each with the line and column of its object's field, as far as that can be found.

    A problem of a whole object is at its name. One with a line, or without an object, stays as it is.

    Args:
        problems: as from a scan or from `assemble`.
        paths: the files and folders that were scanned; they are read again.
    """
    problems = list(problems)
    wanted: dict[str, dict[_Subject, list[int]]] = {}  # by file: indexes by subject
    for index, problem in enumerate(problems):
        if problem.file and problem.object and not problem.line:
            subject = problem.kind, problem.object
            wanted.setdefault(problem.file, {}).setdefault(subject, []).append(index)
    if not wanted:
        return problems
    for entry in survey(paths).files:
        subjects = wanted.get(display(entry.path))
        if subjects:
            _locate(entry.path, subjects, problems)
    return problems


def _locate(path: str, subjects: dict[_Subject, list[int]], problems: list[Problem]) -> None:
    try:
        data, _ = read_regular(path)
    except (OSError, ValueError):
        return  # it has been deleted meanwhile
    for document in read_documents(data, is_json=display(path).lower().endswith(".json")):
        if not isinstance(document, Document):
            continue
        decoded = decode(document.value, _RULES)
        places = [
            *zip(
                ((type(thing).__name__, str(thing.metadata.key)) for thing in decoded.objects),
                decoded.object_places,
                strict=True,
            ),
            *zip(
                ((kind, str(name)) for kind, name in decoded.rejected), decoded.rejected_places, strict=True
            ),
        ]
        # Where a file has an object twice the first one counts.
        found: list[tuple[int, Path]] = []
        for subject, place in places:
            for index in subjects.pop(subject, ()):
                inner = _steps(problems[index].path) or ("metadata", "name")
                found.append((index, place + inner))
        if found:
            positions = document.positions([place for _, place in found])
            for (index, _), (line, column) in zip(found, positions, strict=True):
                problems[index] = replace(problems[index], line=line, column=column)


def _steps(path: str) -> Path:
    """The keys and indexes of a field path such as `spec.ports[0].nodePort`."""
    return tuple(name or (int(index) if index.isdecimal() else index) for index, name in _STEP.findall(path))
