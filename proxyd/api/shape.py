"""Converts parsed documents (maps, lists, scalars) to structs, and finds every type error.

`msgspec.convert` does it for a right document. It stops at the first error, and does not know that `null` and
an empty enum value mean "missing" in Kubernetes. So a document that it refuses is walked through here.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TypeVar

import msgspec
from msgspec import inspect

from proxyd.api.findings import Findings, Path, shown

T = TypeVar("T")

# For integers of thousands of digits and lone surrogates msgspec raises a plain ValueError.
_REFUSED = (msgspec.ValidationError, ValueError)

_SHAPES: dict[type, inspect.Type] = {}  # of the few kinds of objects


def shape_of(kind: type) -> inspect.Type:
    """The structure of a struct type."""
    return _SHAPES.get(kind) or _SHAPES.setdefault(kind, inspect.type_info(kind))


def fit(raw: object, kind: type[T], found: Findings) -> T | None:
    """Converts `raw` to a struct type; on errors it returns None, and adds them to `found`."""
    with suppress(*_REFUSED):
        return msgspec.convert(raw, kind)
    mine = Findings()
    clean = _clean(raw, shape_of(kind), (), mine)
    found.found.extend(mine.found)
    if mine.errors:
        return None
    try:
        return msgspec.convert(clean, kind)
    except _REFUSED as error:  # by a rule of msgspec that `_clean` does not know
        found.error((), str(error))
        return None


def _clean(value: object, shape: inspect.Type, path: Path, found: Findings) -> object:
    """A value without nulls and unknown fields. A part of a wrong type is reported, and stays as it is."""
    match shape:
        case inspect.StructType():
            return _clean_struct(value, shape, path, found)
        case inspect.VarTupleType():
            if isinstance(value, list | tuple):
                return [_clean(item, shape.item_type, (*path, i), found) for i, item in enumerate(value)]
            expected = "a list"
        case inspect.DictType():
            if isinstance(value, dict):
                # Go decodes a null among strings to "".
                return {
                    key: "" if item is None else _clean(item, shape.value_type, (*path, key), found)
                    for key, item in value.items()
                }
            expected = "a map"
        case inspect.UnionType():
            some = [member for member in shape.types if not isinstance(member, inspect.NoneType)]
            if len(some) == 1:
                return _clean(value, some[0], path, found)
            # These objects have no other union of two types than int | str.
            if isinstance(value, int | str) and not isinstance(value, bool):
                return value
            expected = "an integer or a name"
        case inspect.EnumType():
            members = [str(member.value) for member in shape.cls]
            if value in members:
                return value
            expected = " or ".join(filter(None, (", ".join(members[:-1]), members[-1])))
        case inspect.IntType():
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            expected = "an integer"
        case inspect.BoolType():
            if isinstance(value, bool):
                return value
            expected = "true or false"
        case _:
            if isinstance(value, str):
                return value
            expected = "a string"
            if isinstance(value, bool | int | float):
                found.error(path, f"expected a string, got {shown(value)}: put it in quotes")
                return value
    found.error(path, f"expected {expected}, got {shown(value)}")
    return value


def _clean_struct(value: object, shape: inspect.StructType, path: Path, found: Findings) -> object:
    if not isinstance(value, dict):
        found.error(path, f"expected a map, got {shown(value)}")
        return value
    clean = {}
    for field in shape.fields:
        name = field.encode_name
        item = value.get(name)
        if item is None:
            if field.required:
                found.error((*path, name), "required")
            continue
        if item == "" and _is_enum(field.type):
            continue
        clean[name] = _clean(item, field.type, (*path, name), found)
    return clean


def _is_enum(shape: inspect.Type) -> bool:
    if isinstance(shape, inspect.UnionType):
        return any(_is_enum(member) for member in shape.types)
    return isinstance(shape, inspect.EnumType)
