"""Label selectors as Kubernetes writes them: `app=web,tier!=db,env in (prod,test),!legacy`."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import NamedTuple

MAX_LENGTH = 4096
# A label's name, with an optional DNS prefix, and its value: kubernetes apimachinery/pkg/util/validation.
_NAME = r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_KEY = rf"(?:[a-z0-9](?:[-a-z0-9.]{{0,251}}[a-z0-9])?/)?{_NAME}"
_SET = re.compile(rf"({_KEY})\s+(in|notin)\s*\(([^()]*)\)\s*")
_EQUAL = re.compile(rf"({_KEY})\s*(==|=|!=)\s*({_NAME})?\s*")
_EXISTS = re.compile(rf"(!?)\s*({_KEY})\s*")
_VALUE = re.compile(rf"(?:{_NAME})?")


class SelectorError(ValueError):
    """A selector that cannot be read: one line."""


class _Operator(enum.Enum):
    IN = enum.auto()
    NOT_IN = enum.auto()
    EXISTS = enum.auto()
    MISSING = enum.auto()


class _Requirement(NamedTuple):
    key: str
    operator: _Operator
    values: frozenset[str] = frozenset()

    def admits(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        match self.operator:
            case _Operator.IN:
                return value is not None and value in self.values
            case _Operator.NOT_IN:
                # It matches objects without the label too (kubernetes apimachinery,
                # labels.Requirement.Matches).
                return value is None or value not in self.values
            case _Operator.EXISTS:
                return value is not None
            case _Operator.MISSING:
                return value is None


class Selector:
    """A list of requirements, all of which must hold. Without any it admits everything.

    Args:
        text: requirements, separated by commas: `key=value`, `key==value`, `key!=value`, `key in (a,b)`,
            `key notin (a,b)`, `key`, `!key`.

    Raises:
        SelectorError: it cannot be read.
    """

    def __init__(self, text: str = "") -> None:
        if len(text) > MAX_LENGTH:
            raise SelectorError(f"a label selector has at most {MAX_LENGTH} characters")
        self._requirements = tuple(_parse(text.strip()))

    def __bool__(self) -> bool:
        return bool(self._requirements)

    def admits(self, labels: Mapping[str, str]) -> bool:
        """Whether an object with these labels is chosen."""
        return all(requirement.admits(labels) for requirement in self._requirements)


def _parse(text: str) -> list[_Requirement]:
    found = []
    at = 0
    while at < len(text):
        requirement, at = _one(text, at)
        found.append(requirement)
        if at < len(text):
            if text[at] != ",":
                raise _unreadable(text, at)
            at = _skip(text, at + 1)
            if at == len(text):
                raise SelectorError(f'label selector "{text}" ends with a comma')
    return found


def _one(text: str, at: int) -> tuple[_Requirement, int]:
    if match := _SET.match(text, at):
        values = [value.strip() for value in match[3].split(",")]
        if wrong := next((value for value in values if not _VALUE.fullmatch(value)), None):
            raise SelectorError(f'label selector "{text}": "{wrong}" is not a label value')
        operator = _Operator.IN if match[2] == "in" else _Operator.NOT_IN
        return _Requirement(match[1], operator, frozenset(values)), match.end()
    if match := _EQUAL.match(text, at):
        operator = _Operator.NOT_IN if match[2] == "!=" else _Operator.IN
        return _Requirement(match[1], operator, frozenset([match[3] or ""])), match.end()
    if match := _EXISTS.match(text, at):
        return _Requirement(match[2], _Operator.MISSING if match[1] else _Operator.EXISTS), match.end()
    raise _unreadable(text, at)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _unreadable(text: str, at: int) -> SelectorError:
    return SelectorError(
        f'label selector "{text}" cannot be read at "{text[at : at + 20]}"; '
        "expected key=value, key!=value, key in (a,b), key notin (a,b), key or !key"
    )
