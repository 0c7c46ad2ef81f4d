"""Which SCTP listeners of a Service are addresses of one multi-homed endpoint.

Those of one service port and one port number, if the same endpoints are meant for their clients: the same
traffic policy and the same source ranges. NodePorts stay single: the node's addresses come and go, and are
not the Service's.

All of a home's listeners share a balancer, of the family of the first address that has endpoints, since a
client that came over one may go on over another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from proxyd.api.service import TrafficPolicy
from proxyd.state.spec import BalancerKey, BalancerSpec, Home, ListenerSpec, Role


def at_home(listeners: Sequence[ListenerSpec], usable: Collection[BalancerKey]) -> list[ListenerSpec]:
    """The SCTP listeners of one service port, each with its home.

    Args:
        listeners: that are to be opened, in the order of who is first.
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
    """A balancer whose endpoints have these further addresses, named by the first of each."""
    mine = {endpoint.ip: further[endpoint.ip] for endpoint in balancer.endpoints if endpoint.ip in further}
    return msgspec.structs.replace(balancer, further=mine) if mine else balancer


def _family(ip: str) -> int:
    return 6 if ":" in ip else 4
