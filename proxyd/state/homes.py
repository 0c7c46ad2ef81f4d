"""Groups the SCTP listeners of a Service into homes: the listeners of a home are addresses of one socket.

A home has the listeners of one service port and one port number with the same traffic policy and the same
source ranges, so that the same endpoints are meant for all clients. NodePorts are not grouped: the node's
addresses come and go, and are not the Service's.

A client that came over one address may go on over another. So all listeners of a home share a balancer, whose
family is that of the first address that has endpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from proxyd.api.service import TrafficPolicy
from proxyd.state.spec import BalancerKey, BalancerSpec, Home, ListenerSpec, Role


def at_home(listeners: Sequence[ListenerSpec], usable: Collection[BalancerKey]) -> list[ListenerSpec]:
    """The SCTP listeners of one service port, each with its home.

    Args:
        listeners: those that are to be opened; the first of each home decides.
        usable: the balancers that have endpoints.
    """
    groups: dict[tuple[TrafficPolicy, tuple[str, ...]], list[ListenerSpec]] = {}
    for listener in listeners:
        if listener.role is not Role.NODE_PORT:
            groups.setdefault((listener.balancer.policy, listener.source_ranges), []).append(listener)
    homes = {}
    for members in groups.values():
        first = members[0]
        balancer = next((one.balancer for one in members if one.balancer in usable), first.balancer)
        home = Home(
            first.service_port, first.key.port, first.role, max(_family(one.key.ip) for one in members)
        )
        for member in members:
            homes[member.key] = msgspec.structs.replace(member, balancer=balancer, home=home)
    return [homes.get(listener.key, listener) for listener in listeners]


def with_further(balancer: BalancerSpec, further: Mapping[str, tuple[str, ...]]) -> BalancerSpec:
    """A balancer whose endpoints have these further addresses (by an endpoint's own)."""
    mine = {endpoint.ip: further[endpoint.ip] for endpoint in balancer.endpoints if endpoint.ip in further}
    return msgspec.structs.replace(balancer, further=mine) if mine else balancer


def _family(ip: str) -> int:
    return 6 if ":" in ip else 4
