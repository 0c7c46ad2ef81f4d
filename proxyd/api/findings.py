"""Collecting what is wrong with an object, and writing field paths and offending values for people."""

from __future__ import annotations

import re
from typing import NamedTuple

from proxyd.api.problems import Severity

# Keys and indexes from the root of an object or document: ("spec", "ports", 0, "port").
Path = tuple[str | int, ...]

_FIELD = re.compile(r"[A-Za-z][A-Za-z0-9]*")
_SHOWN_CHARACTERS = 60
_SHOWN_BITS = 128


class Finding(NamedTuple):
    """An error or a warning, at a path of the object."""

    path: Path
    message: str
    severity: Severity


class Findings:
    """The errors and warnings that were found so far."""

    __slots__ = ("found",)

    def __init__(self) -> None:
        self.found: list[Finding] = []

    def error(self, path: Path, message: str) -> None:
        """Add an error: the object cannot be used."""
        self.found.append(Finding(path, message, Severity.ERROR))

    def warning(self, path: Path, message: str) -> None:
        """Add a warning: the object can be used, but maybe not as its author thinks."""
        self.found.append(Finding(path, message, Severity.WARNING))

    @property
    def errors(self) -> bool:
        """Whether there is an error among them."""
        return any(finding.severity is Severity.ERROR for finding in self.found)


def field_path(path: Path) -> str:
    """A path as Kubernetes writes it: `spec.ports[0].port`, `metadata.labels[app.kubernetes.io/name]`."""
    text = ""
    for key in path:
        if isinstance(key, str) and _FIELD.fullmatch(key):
            text += f".{clip(key)}" if text else clip(key)
        else:
            text += f"[{clip(str(key))}]"
    return text


def clip(text: str, limit: int = _SHOWN_CHARACTERS) -> str:
    """`text` on one line of at most about `limit` characters."""
    if len(text) > limit:
        text = text[:limit] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shown(value: object) -> str:
    """A value from a document, for a message."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return f'"{clip(value)}"'
        case int() if value.bit_length() > _SHOWN_BITS:
            return "a number with too many digits"
        case int() | float():
            return repr(value)
        case dict():
            return "a map"
        case list() | tuple():
            return "a list"
    return f"a value of type {type(value).__name__}"
