"""Plain YAML scalars, by the core schema of YAML 1.2 (section 10.3.2).

They differ from those of YAML 1.1: `22:22`, `on`, `yes` and `2024-01-01` are strings, and `017` is 17.
"""

from __future__ import annotations

import re

Scalar = str | int | float | bool | None

_CONSTANTS: dict[str, Scalar] = {
    "": None,
    "~": None,
    **dict.fromkeys(("null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# Kubernetes objects need no longer numbers, and Python is slow on them, or refuses them: they stay text.
_MAX_DIGITS = 40

# Each scalar that is not a string begins with one of these.
SUSPECTS = frozenset("0123456789+-.~nNtTfF")


def plain(text: str) -> Scalar:
    """The value of a scalar without quotes."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if len(text) > _MAX_DIGITS or text[0] not in SUSPECTS:
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


_TAGGED: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "bool": bool,
    "null": type(None),
}
CORE_TAG = "tag:yaml.org,2002:"


def tagged(tag: str, text: str) -> Scalar:
    """The value of a scalar with an explicit core tag.

    Raises:
        ValueError: the tag is not a core one, or the text is not of its type.
    """
    name = tag.removeprefix(CORE_TAG)
    if tag in ("!", CORE_TAG + "str"):
        return text
    expected = _TAGGED.get(name) if tag.startswith(CORE_TAG) else None
    value = plain(text)
    if expected is None or not isinstance(value, expected) or (name == "int" and isinstance(value, bool)):
        raise ValueError(tag)
    return float(value) if name == "float" and isinstance(value, int) else value
