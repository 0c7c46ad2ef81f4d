"""Finds the entries in which two large mappings differ, fast for mappings that remember their changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import compress
from operator import is_, is_not
from typing import TypeVar

_K = TypeVar("_K")
_V = TypeVar("_V")

# A mapping remembers so many derivations. A reader that sees nearly every state needs one or two.
_REMEMBERED = 8


class Derived(dict[_K, _V]):
    """A mapping that remembers in which keys it may differ from those that it was derived from.

    To compare each of ten thousand entries takes milliseconds, as none of them is in the processor's cache.
    It must not be changed in place: `derive` makes a changed copy.
    """

    __slots__ = ("_steps", "_token")

    def __init__(self, entries: Mapping[_K, _V] | Iterable[tuple[_K, _V]] = ()) -> None:
        super().__init__(entries)
        self._token = object()
        self._steps: tuple[tuple[object, tuple[_K, ...]], ...] = ()  # token and keys of each derivation

    def derive(self, changes: Mapping[_K, _V | None]) -> Derived[_K, _V]:
        """A copy with these entries; None removes one. Without changes it is the same mapping."""
        if not changes:
            return self
        new = Derived(self)
        for key, value in changes.items():
            if value is None:
                new.pop(key, None)
            else:
                new[key] = value
        new._steps = (*self._steps[1 - _REMEMBERED :], (self._token, tuple(changes)))
        return new

    def since(self, old: Mapping[_K, object]) -> Iterable[_K] | None:
        """The keys in which this may differ from an earlier mapping, in order of change; None: unknown."""
        if old is self:
            return ()
        if not isinstance(old, Derived):
            return None
        for number in range(len(self._steps) - 1, -1, -1):
            if self._steps[number][0] is old._token:  # noqa: SLF001 - it is of this class
                return dict.fromkeys(key for _, keys in self._steps[number:] for key in keys)
        return None


def changed_keys(old: Mapping[_K, object], new: Mapping[_K, object]) -> Iterable[_K] | None:
    """The keys in which two mappings may differ; None if only a comparison of all entries can tell."""
    if old is new:
        return ()
    return new.since(old) if isinstance(new, Derived) else None


def same_keys(old: Mapping[_K, object], new: Mapping[_K, object]) -> bool:
    """Whether two mappings have the same keys (the same Python objects) in the same order.

    That is so if one was copied from the other and values were replaced. No key is hashed: that takes a tenth
    of the time of looking up each one.
    """
    return old is new or (len(old) == len(new) and all(map(is_, old, new)))


def touched(old: Mapping[_K, object], new: Mapping[_K, object]) -> set[_K]:
    """The keys whose value is not the same Python object in both, and the keys that only one of them has."""
    missing = object()
    known = changed_keys(old, new)
    if known is not None:
        return {key for key in known if old.get(key, missing) is not new.get(key, missing)}
    if same_keys(old, new):
        return set(compress(new, map(is_not, old.values(), new.values())))
    found = {key for key, value in new.items() if old.get(key, missing) is not value}
    found.update(old.keys() - new.keys())
    return found


def replaced(old: Mapping[_K, _V], new: Mapping[_K, _V]) -> list[tuple[_V, _V]]:
    """Yields the old and the new value where they are not the same Python object; the keys must be equal."""
    pairs = zip(old.values(), new.values(), strict=True)
    return list(compress(pairs, map(is_not, old.values(), new.values())))
