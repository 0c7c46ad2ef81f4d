"""The plan: the difference between what the node has and what it should have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import msgspec

from proxyd.state.changes import changed_keys, replaced, same_keys
from proxyd.state.spec import BalancerKey, BalancerSpec, HostState, ListenerKey, ListenerSpec, Steering

_K = TypeVar("_K")
_V = TypeVar("_V")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do, in the order of the fields: addresses are added before listeners, and removed after them.

    `change` has listeners that keep their socket and get another spec, such as another balancer.
    """

    add_vips: frozenset[str] = frozenset()
    steer: dict[ListenerKey, Steering] = {}
    set_balancers: tuple[BalancerSpec, ...] = ()
    open: tuple[ListenerSpec, ...] = ()
    change: tuple[ListenerSpec, ...] = ()
    close: tuple[ListenerKey, ...] = ()
    drop_balancers: tuple[BalancerKey, ...] = ()
    unsteer: tuple[ListenerKey, ...] = ()
    remove_vips: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return self != NOTHING


NOTHING = Plan()


def plan(observed: HostState, desired: HostState) -> Plan:
    """What turns `observed` into `desired`; empty (false) if they are equal.

    A listener whose spec differs keeps its socket, unless it needs another one, as it is steered now or
    belongs to another SCTP home: then it is closed first and opened after that.
    """
    opened: list[ListenerSpec] = []
    changed: list[ListenerSpec] = []
    differing, closed = _difference(observed.listeners, desired.listeners)
    for held, wanted in differing:
        if held is None:
            opened.append(wanted)
        elif held.steered != wanted.steered or held.home != wanted.home:
            closed.append(wanted.key)
            opened.append(wanted)
        else:
            changed.append(wanted)
    set_balancers, drop_balancers = _difference(observed.balancers, desired.balancers)
    return Plan(
        add_vips=_without(desired.vips, observed.vips),
        steer={k: how for k, how in desired.steering.items() if observed.steering.get(k) != how},
        set_balancers=tuple(wanted for _, wanted in set_balancers),
        open=tuple(opened),
        change=tuple(changed),
        close=tuple(closed),
        drop_balancers=tuple(drop_balancers),
        unsteer=tuple(key for key in observed.steering if key not in desired.steering),
        remove_vips=_without(observed.vips, desired.vips),
    )


def _without(some: frozenset[str], others: frozenset[str]) -> frozenset[str]:
    return frozenset() if some is others else some - others


def _difference(
    observed: Mapping[_K, _V], desired: Mapping[_K, _V]
) -> tuple[list[tuple[_V | None, _V]], list[_K]]:
    """What is there and what is wanted, for each key in which they differ, and the keys that must go."""
    known = changed_keys(observed, desired)
    if known is not None:
        return _known_difference(observed, desired, known)
    if same_keys(observed, desired):
        # That is usual, as mostly endpoints change. No key is hashed, which would take most of the time.
        return [(held, wanted) for held, wanted in replaced(observed, desired) if held != wanted], []
    if observed == desired:  # it is fast, as a Python object equals itself
        return [], []
    differing: list[tuple[_V | None, _V]] = []
    for key, wanted in desired.items():
        held = observed.get(key)
        if held is not wanted and held != wanted:
            differing.append((held, wanted))
    return differing, [key for key in observed if key not in desired]


def _known_difference(
    observed: Mapping[_K, _V], desired: Mapping[_K, _V], keys: Iterable[_K]
) -> tuple[list[tuple[_V | None, _V]], list[_K]]:
    """As `_difference`, for mappings that can differ in these keys only."""
    differing: list[tuple[_V | None, _V]] = []
    gone: list[_K] = []
    for key in keys:
        held, wanted = observed.get(key), desired.get(key)
        if wanted is None:
            if held is not None:
                gone.append(key)
        elif held is not wanted and held != wanted:
            differing.append((held, wanted))
    return differing, gone
