"""Which entries of two large mappings are not the same objects, and mappings that know it of themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import compress
from operator import is_, is_not
from typing import TypeVar

_K = TypeVar("_K")
_V = TypeVar("_V")

# How many derivations a mapping remembers: who looks at every state, or nearly, needs one or two.
_REMEMBERED = 8


class Derived(dict[_K, _V]):
    """A mapping that remembers by which keys it may differ from those that it was derived from, see `derive`.

    Looking at each of ten thousand entries takes milliseconds, since none of them is in the processor's
    cache. It is not to be changed in place.
    """

    __slots__ = ("_steps", "_token")

    def __init__(self, entries: Mapping[_K, _V] | Iterable[tuple[_K, _V]] = ()) -> None:
        super().__init__(entries)
        self._token = object()
        self._steps: tuple[tuple[object, tuple[_K, ...]], ...] = ()  # token and keys of each derivation

    def derive(self, changes: Mapping[_K, _V | None]) -> Derived[_K, _V]:
        """A copy with these entries put in; None removes one. The same mapping where there are none."""
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
        """The keys by which this may differ from an earlier mapping, in order of change; None: unknown."""
        if old is self:
            return ()
        if not isinstance(old, Derived):
            return None
        for number in range(len(self._steps) - 1, -1, -1):
            if self._steps[number][0] is old._token:  # noqa: SLF001 - one of its own kind
                return dict.fromkeys(key for _, keys in self._steps[number:] for key in keys)
        return None


def changed_keys(old: Mapping[_K, object], new: Mapping[_K, object]) -> Iterable[_K] | None:
    """The keys by which two mappings may differ; None where all entries must be looked at for that."""
    if old is new:
        return ()
    return new.since(old) if isinstance(new, Derived) else None


def same_keys(old: Mapping[_K, object], new: Mapping[_K, object]) -> bool:
    """Whether both have the very same keys in the same order. False may also mean: it takes longer to say.

    True where one was copied from the other and values were replaced. No key is hashed: a tenth of the time
    of looking each up.
    """
    return old is new or (len(old) == len(new) and all(map(is_, old, new)))


def touched(old: Mapping[_K, object], new: Mapping[_K, object]) -> set[_K]:
    """The keys whose value is not the same object in both; those that only one has included."""
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
    """The old and the new value wherever they are not the same object, of mappings with the same keys."""
    pairs = zip(old.values(), new.values(), strict=True)
    return list(compress(pairs, map(is_not, old.values(), new.values())))
