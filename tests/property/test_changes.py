"""Mappings that remember their changes, against looking at every entry."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from proxyd.state.changes import Derived, changed_keys, touched

KEYS = st.sampled_from("abcde")
CHANGES = st.dictionaries(KEYS, st.one_of(st.none(), st.integers(0, 2)), max_size=3)
_NOTHING = object()


def differ(old: Mapping[str, int], new: Mapping[str, int]) -> set[str]:
    return {key for key in {*old, *new} if old.get(key, _NOTHING) is not new.get(key, _NOTHING)}


@given(st.dictionaries(KEYS, st.integers(0, 2)), st.lists(CHANGES, max_size=12))
def test_every_difference_is_remembered_or_nothing_is_said(
    first: dict[str, int], steps: list[dict[str, int | None]]
) -> None:
    states = [Derived(first)]
    plain = dict(first)
    for changes in steps:
        states.append(states[-1].derive(changes))
        for key, value in changes.items():
            if value is None:
                plain.pop(key, None)
            else:
                plain[key] = value
        assert states[-1] == plain
    for later, new in enumerate(states):
        for old in states[: later + 1]:
            known = changed_keys(old, new)
            assert touched(old, new) == differ(old, new)
            assert known is None or set(known) >= differ(old, new)
            # Backwards, and against another that only looks the same, nothing is known.
            assert old is new or changed_keys(new, old) is None
            assert touched(new, old) == differ(new, old)
            assert changed_keys(Derived(old), new) is None
    recent = states[-4:]
    assert all(changed_keys(old, recent[-1]) is not None for old in recent)


@given(st.dictionaries(KEYS, st.integers(0, 2)))
def test_no_change_is_the_very_same_mapping(first: dict[str, int]) -> None:
    state = Derived(first)
    assert state.derive({}) is state
    assert changed_keys(state, state) == ()
