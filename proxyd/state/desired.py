"""The desired state: listeners, balancers, addresses, and who gets an address that several Services want."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from operator import attrgetter
from typing import TypeAlias, TypeVar

import msgspec

from proxyd.api.meta import ObjectName
from proxyd.state.changes import Derived, touched
from proxyd.state.snapshot import NodeView, Options, Snapshot
from proxyd.state.spec import (
    BalancerKey,
    BalancerSpec,
    HostState,
    ListenerKey,
    ListenerSpec,
    ListenerState,
    ListenerStatus,
    ServicePortName,
    Steering,
    status_of,
)
from proxyd.state.wishes import ServiceWishes, service_wishes

_K = TypeVar("_K")
_V = TypeVar("_V")
_Order: TypeAlias = tuple[bool, str, str, str]

NOBODY: Mapping[ListenerKey, ServicePortName] = {}


class DesiredState(msgspec.Struct, frozen=True, kw_only=True):
    """The host state to reach, and the status of each listener that is not to be opened."""

    host: HostState = HostState()
    unopened: tuple[ListenerStatus, ...] = ()


class Planner:
    """Computes desired states, and remembers what led to the last one.

    The result depends on the arguments alone. The memory saves the work for Services that did not change (the
    same immutable Python objects). A change of a few Services that touches no address of any other is put
    into a copy of the last result, so one change among thousands costs little more than one among ten.

    Attributes:
        holders: who holds each address by the last result, also one without endpoints.
    """

    holders: Mapping[ListenerKey, ServicePortName]

    def __init__(self) -> None:
        self._context: tuple[NodeView, Options] | None = None
        self._snapshot = Snapshot()
        self._wishes: dict[ObjectName, ServiceWishes] = {}
        self._merged: _Merged | None = None
        self.holders = {}

    def desired(
        self,
        snapshot: Snapshot,
        node: NodeView,
        options: Options,
        held: Mapping[ListenerKey, ServicePortName] = NOBODY,
    ) -> DesiredState:
        """The desired state of a node. See `desired_state`."""
        if self._context != (node, options):
            self._context = (node, options)
            self._snapshot, self._wishes, self._merged = Snapshot(), {}, None
        last, self._snapshot = self._snapshot, snapshot
        names = touched(last.services, snapshot.services) | touched(last.slices, snapshot.slices)
        changes: list[tuple[ServiceWishes, ServiceWishes]] = []
        for name in names:
            old, new = self._wishes.pop(name, _NO_WISHES), _NO_WISHES
            service = snapshot.services.get(name)
            if service is not None:
                new = service_wishes(service, snapshot.slices.get(name, ()), node, options)
                self._wishes[name] = new
            if old != new:
                changes.append((old, new))
        merged, self._merged = self._merged, None  # a half changed one is of no use if merging fails
        if merged is None or not merged.follows(held) or not merged.patch(changes):
            merged = _Merged(self._wishes.values(), held)
        self._merged, self.holders = merged, merged.holders
        return merged.result


def desired_state(
    snapshot: Snapshot,
    node: NodeView,
    options: Options,
    held: Mapping[ListenerKey, ServicePortName] = NOBODY,
) -> DesiredState:
    """The desired state of a node.

    Where two service ports want the same address, port and protocol, the one that holds it keeps it, whatever
    the times of creation say: clocks go back. If neither does, the Service that was created first gets it; of
    two created at the same moment the first by namespace and name. The other's status names the holder.

    Args:
        snapshot: the objects.
        node: from where they are seen.
        options: what the operator wants.
        held: who has each address now; of one that no two want it does not matter.
    """
    return Planner().desired(snapshot, node, options, held)


_NO_WISHES = ServiceWishes(order=(False, "", "", ""))


class _Merged:
    """The desired state that the wishes of all Services come to, and what it takes to change a part of it."""

    def __init__(
        self, all_wishes: Iterable[ServiceWishes], held: Mapping[ListenerKey, ServicePortName]
    ) -> None:
        all_wishes = sorted(all_wishes, key=attrgetter("order"))
        self.holders: dict[ListenerKey, ServicePortName] = {}  # also listeners without endpoints
        self._contested = _contested(all_wishes)
        self._kept = self._keep(held)
        self._vips: dict[str, int] = {}  # how many Services want each
        listeners: dict[ListenerKey, ListenerSpec] = {}
        balancers: dict[BalancerKey, BalancerSpec] = {}
        steering: dict[ListenerKey, Steering] = {}
        self._unopened: dict[_Order, tuple[ListenerStatus, ...]] = {}  # by Service, if it has any
        for wishes in all_wishes:
            unopened = list(wishes.unopened)
            for vip in wishes.vips:
                self._vips[vip] = self._vips.get(vip, 0) + 1
            for listener in wishes.listeners:
                key = listener.key
                holder = self._kept.get(key) or self.holders.get(key, listener.service_port)
                if holder != listener.service_port:
                    unopened.append(_conflict(listener, holder))
                    continue
                if key in self.holders:
                    # A service port may want an address twice, as externalIP and as load-balancer IP.
                    continue
                self.holders[key] = holder
                balancer = wishes.balancers.get(listener.balancer)
                if listener.steered:
                    steering[key] = Steering.LOCAL if balancer else Steering.UNREACHABLE
                if balancer is None:
                    unopened.append(status_of(listener, ListenerState.NO_ENDPOINTS))
                    continue
                listeners[key] = listener
                balancers[listener.balancer] = balancer
            if unopened:
                self._unopened[wishes.order] = tuple(unopened)
        self.result = DesiredState(
            host=HostState(
                balancers=Derived(balancers),
                listeners=Derived(listeners),
                vips=frozenset(self._vips),
                steering=steering,
            ),
            unopened=tuple(chain.from_iterable(self._unopened.values())),
        )

    def follows(self, held: Mapping[ListenerKey, ServicePortName]) -> bool:
        """Whether merging anew, while `held` are held, would give every address to whom it was given."""
        return held is self.holders or self._keep(held) == self._kept

    def _keep(self, held: Mapping[ListenerKey, ServicePortName]) -> dict[ListenerKey, ServicePortName]:
        """Who keeps what two or more want."""
        return {
            key: holder
            for key, wanted_by in self._contested.items()
            if (holder := held.get(key)) is not None and holder in wanted_by
        }

    def patch(self, changes: Iterable[tuple[ServiceWishes, ServiceWishes]]) -> bool:
        """Replace the wishes of some Services. Returns whether that was possible.

        It is not if an address is wanted twice: the order of Services matters, and all wishes must be merged.
        """
        changes = list(changes)
        if not changes:
            return True
        for old, new in changes:
            keys = {listener.key for listener in new.listeners}
            if len(keys) < len(new.listeners):
                return False
            mine = {listener.key for listener in old.listeners}
            if not self._contested.keys().isdisjoint(keys | mine):
                return False
            if any(key in self.holders for key in keys - mine):
                return False
        wanted = [listener.key for _, new in changes for listener in new.listeners]
        if len(set(wanted)) < len(wanted):
            return False
        host = self.result.host
        listeners: dict[ListenerKey, ListenerSpec | None] = {}
        balancers: dict[BalancerKey, BalancerSpec | None] = {}
        steering = dict(host.steering)
        before = dict(self._vips) if any(old.vips != new.vips for old, new in changes) else None
        unopened = self._unopened
        if any(_unopened(old) != _unopened(new) or old.order != new.order for old, new in changes):
            unopened = dict(unopened)
        for old, new in changes:
            self._replace(old, new, listeners, balancers, steering)
            if unopened is not self._unopened:
                unopened.pop(old.order, None)
                if statuses := _unopened(new):
                    unopened[new.order] = statuses
        vips = host.vips if before is None or before.keys() == self._vips.keys() else frozenset(self._vips)
        self.result = DesiredState(
            host=HostState(
                balancers=_changed(host.balancers, balancers),
                listeners=_changed(host.listeners, listeners),
                vips=vips,
                steering=steering,
            ),
            unopened=self.result.unopened
            if unopened is self._unopened
            else tuple(status for _, some in sorted(unopened.items()) for status in some),
        )
        self._unopened = unopened
        return True

    def _replace(
        self,
        old: ServiceWishes,
        new: ServiceWishes,
        listeners: dict[ListenerKey, ListenerSpec | None],
        balancers: dict[BalancerKey, BalancerSpec | None],
        steering: dict[ListenerKey, Steering],
    ) -> None:
        """Replace these listeners and balancers (None: it goes), and derive the new result."""
        keys = {listener.key for listener in new.listeners}
        for listener in old.listeners:
            if listener.key not in keys:
                del self.holders[listener.key]
                listeners[listener.key] = None
                steering.pop(listener.key, None)
            if listener.balancer not in new.balancers:
                balancers[listener.balancer] = None
        for listener in new.listeners:
            self.holders[listener.key] = listener.service_port
            balancer = new.balancers.get(listener.balancer)
            if balancer is None:
                listeners[listener.key] = None
            else:
                listeners[listener.key] = listener
                balancers[listener.balancer] = balancer
            if listener.steered:
                steering[listener.key] = Steering.LOCAL if balancer else Steering.UNREACHABLE
            else:
                steering.pop(listener.key, None)
        for vip in new.vips - old.vips:
            self._vips[vip] = self._vips.get(vip, 0) + 1
        for vip in old.vips - new.vips:
            self._vips[vip] -= 1
            if not self._vips[vip]:
                del self._vips[vip]


def _changed(before: Mapping[_K, _V], changes: Mapping[_K, _V | None]) -> Mapping[_K, _V]:
    """The mapping with these changes; the same Python object if they change nothing."""
    assert isinstance(before, Derived)
    return before.derive({key: value for key, value in changes.items() if before.get(key) != value})


def _unopened(wishes: ServiceWishes) -> tuple[ListenerStatus, ...]:
    """The listeners of a Service that are not to be opened, apart from conflicts with other Services."""
    without = (
        status_of(listener, ListenerState.NO_ENDPOINTS)
        for listener in wishes.listeners
        if listener.balancer not in wishes.balancers
    )
    return (*wishes.unopened, *without)


def _contested(all_wishes: Iterable[ServiceWishes]) -> dict[ListenerKey, set[ServicePortName]]:
    """What is wanted more than once, and by whom."""
    first: dict[ListenerKey, ListenerSpec] = {}
    contested: dict[ListenerKey, set[ServicePortName]] = {}
    for wishes in all_wishes:
        for listener in wishes.listeners:
            before = first.setdefault(listener.key, listener)
            if before is not listener:
                contested.setdefault(listener.key, {before.service_port}).add(listener.service_port)
    return contested


def _conflict(loser: ListenerSpec, who: ServicePortName) -> ListenerStatus:
    return status_of(loser, ListenerState.CONFLICT, f"{loser.key} is held by {who}", holder=who)
