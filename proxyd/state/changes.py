"""Which entries of two large mappings are not the same objects."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from operator import is_, is_not
from typing import TypeVar

_K = TypeVar("_K")
_V = TypeVar("_V")


def same_keys(old: Mapping[_K, object], new: Mapping[_K, object]) -> bool:
    """Whether both have the very same keys in the same order; False may also mean that it takes longer to say.

    True where one was copied from the other and values were replaced. No key is hashed: a tenth of the time of looking
    each up.
    """
    return old is new or (len(old) == len(new) and all(map(is_, old, new)))


def touched(old: Mapping[_K, object], new: Mapping[_K, object]) -> set[_K]:
    """The keys whose value is not the same object in both; those that only one has included."""
    if old is new:
        return set()
    if same_keys(old, new):
        return set(compress(new, map(is_not, old.values(), new.values())))
    missing = object()
    found = {key for key, value in new.items() if old.get(key, missing) is not value}
    found.update(old.keys() - new.keys())
    return found


def replaced(old: Mapping[_K, _V], new: Mapping[_K, _V]) -> list[tuple[_V, _V]]:
    """The old and the new value wherever they are not the same object, of mappings with the same keys."""
    pairs = zip(old.values(), new.values(), strict=True)
    return list(compress(pairs, map(is_not, old.values(), new.values())))
