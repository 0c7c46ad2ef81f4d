"""What the node should hold for a snapshot: listeners, balancers, addresses, and who loses an address to whom."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from proxyd.api.meta import ObjectName
from proxyd.api.service import Service
from proxyd.state.snapshot import NodeView, Options, Snapshot
from proxyd.state.spec import (
    BalancerKey,
    BalancerSpec,
    HostState,
    ListenerKey,
    ListenerSpec,
    ListenerState,
    ListenerStatus,
    Steering,
    status_of,
)
from proxyd.state.wishes import ServiceWishes, service_wishes


class DesiredState(msgspec.Struct, frozen=True, kw_only=True):
    """The host state to reach, and the listeners that are not to be opened, each with the reason."""

    host: HostState = HostState()
    unopened: tuple[ListenerStatus, ...] = ()


class Planner:
    """Computes desired states, and remembers what each Service wished for.

    The result depends on the arguments alone: the memory only saves the work for Services that did not change (the
    same immutable objects, compared by identity), so that one change among thousands costs about the same as one
    change among ten.
    """

    def __init__(self) -> None:
        self._context: tuple[NodeView, Options] | None = None
        self._memory: dict[ObjectName, tuple[Service, object, ServiceWishes]] = {}

    def desired(self, snapshot: Snapshot, node: NodeView, options: Options) -> DesiredState:
        """The desired state of a node. See `desired_state`."""
        if self._context != (node, options):
            self._context = (node, options)
            self._memory = {}
        memory: dict[ObjectName, tuple[Service, object, ServiceWishes]] = {}
        for name, service in snapshot.services.items():
            slices = snapshot.slices.get(name, ())
            known = self._memory.get(name)
            if known is None or known[0] is not service or known[1] is not slices:
                known = (service, slices, service_wishes(service, slices, node, options))
            memory[name] = known
        self._memory = memory
        return _merge(known[2] for known in sorted(memory.values(), key=lambda known: known[2].order))


def desired_state(snapshot: Snapshot, node: NodeView, options: Options) -> DesiredState:
    """The desired state of a node.

    Where two service ports want the same address, port and protocol, the Service that was created first keeps it; of
    two created at the same moment the first by namespace and name. The other's status says who holds it.
    """
    return Planner().desired(snapshot, node, options)


def _merge(all_wishes: Iterator[ServiceWishes]) -> DesiredState:
    """Join the wishes of Services, which come in the order in which they may take addresses."""
    holders: dict[ListenerKey, ListenerSpec] = {}
    listeners: dict[ListenerKey, ListenerSpec] = {}
    balancers: dict[BalancerKey, BalancerSpec] = {}
    steering: dict[ListenerKey, Steering] = {}
    unopened: list[ListenerStatus] = []
    vips: set[str] = set()
    for wishes in all_wishes:
        unopened += wishes.unopened
        vips.update(wishes.vips)
        for listener in wishes.listeners:
            key = listener.key
            holder = holders.setdefault(key, listener)
            if holder is not listener:
                # The same service port may want an address twice, say as externalIP and load-balancer IP.
                if holder.service_port != listener.service_port:
                    unopened.append(_conflict(listener, holder))
                continue
            balancer = wishes.balancers.get(listener.balancer)
            if listener.steered:
                steering[key] = Steering.LOCAL if balancer else Steering.UNREACHABLE
            if balancer is None:
                unopened.append(status_of(listener, ListenerState.NO_ENDPOINTS))
                continue
            listeners[key] = listener
            balancers[listener.balancer] = balancer
    host = HostState(balancers=balancers, listeners=listeners, vips=frozenset(vips), steering=steering)
    return DesiredState(host=host, unopened=tuple(unopened))


def _conflict(loser: ListenerSpec, holder: ListenerSpec) -> ListenerStatus:
    return status_of(loser, ListenerState.CONFLICT, f"{loser.key} is held by {holder.service_port}")
