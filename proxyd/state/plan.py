"""The difference between what the node holds and what it should hold."""

from __future__ import annotations

import msgspec

from proxyd.state.spec import BalancerKey, BalancerSpec, HostState, ListenerKey, ListenerSpec, Steering


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do, in the order of the fields: addresses come before listeners, and go after them.

    `change` names listeners that keep their socket but not their spec: another balancer, other source ranges.
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
    """What turns `observed` into `desired`; empty (false) where they are equal.

    A listener whose spec differs keeps its socket, unless the socket itself must be of another kind (steered or not):
    then it is both closed and opened, and closing comes first.
    """
    opened: list[ListenerSpec] = []
    changed: list[ListenerSpec] = []
    closed: list[ListenerKey] = []
    same = observed.listeners == desired.listeners  # a tenth of the time of looking at each
    for key, wanted in () if same else desired.listeners.items():
        held = observed.listeners.get(key)
        if held is wanted or held == wanted:
            continue
        if held is None:
            opened.append(wanted)
        elif held.steered != wanted.steered:
            closed.append(key)
            opened.append(wanted)
        else:
            changed.append(wanted)
    if not same:
        closed += [key for key in observed.listeners if key not in desired.listeners]
    return Plan(
        add_vips=desired.vips - observed.vips,
        steer={k: how for k, how in desired.steering.items() if observed.steering.get(k) != how},
        set_balancers=tuple(
            spec
            for key, spec in desired.balancers.items()
            if (held_spec := observed.balancers.get(key)) is not spec and held_spec != spec
        ),
        open=tuple(opened),
        change=tuple(changed),
        close=tuple(closed),
        drop_balancers=tuple(key for key in observed.balancers if key not in desired.balancers),
        unsteer=tuple(key for key in observed.steering if key not in desired.steering),
        remove_vips=observed.vips - desired.vips,
    )


def applied(state: HostState, todo: Plan) -> HostState:
    """The host state after a plan was carried out in full."""
    listeners = {key: spec for key, spec in state.listeners.items() if key not in todo.close}
    listeners |= {spec.key: spec for spec in (*todo.open, *todo.change)}
    balancers = {key: spec for key, spec in state.balancers.items() if key not in todo.drop_balancers}
    balancers |= {spec.key: spec for spec in todo.set_balancers}
    steering = {key: how for key, how in state.steering.items() if key not in todo.unsteer} | todo.steer
    return HostState(
        balancers=balancers,
        listeners=listeners,
        vips=(state.vips | todo.add_vips) - todo.remove_vips,
        steering=steering,
    )
