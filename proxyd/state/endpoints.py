"""Selects the endpoints of a service port that take traffic.

The contract, as in kubernetes pkg/proxy/topology.go, for one service port and one address family:

- The candidates are the endpoints of each slice of the Service that has a port of the same *name* and
  protocol. Only `addresses[0]` counts. The same ip:port in several slices is one candidate, as usable as the
  most usable of them.
- With policy Cluster the ready ones are used. If hints may be used, all ready ones have node hints and one of
  these names this node, only those that name it are used; else the same goes for zone hints and this node's
  zone. If there is no ready one, those that still serve while they terminate are used.
- With policy Local the same is done among the endpoints on this node, without hints.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import msgspec

from proxyd.api.discovery import EndpointSlice, SliceEndpoint
from proxyd.api.service import ServicePort, TrafficPolicy
from proxyd.state.spec import Endpoint

_FAMILIES = {"IPv4": 4, "IPv6": 6}


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint of a service port, and what slices say of it."""

    endpoint: Endpoint
    ready: bool
    serving: bool
    terminating: bool
    node: str = ""
    zones: frozenset[str] = frozenset()  # those that hints name
    nodes: frozenset[str] = frozenset()  # those that hints name

    @property
    def rank(self) -> int:
        """How usable it is: most if it is ready, less if it serves while it terminates, else not."""
        return 2 if self.ready else 1 if self.serving and self.terminating else 0


def candidates(port: ServicePort, slices: Iterable[EndpointSlice], family: int) -> tuple[Candidate, ...]:
    """Every endpoint that the slices name for a service port, in order of address.

    Args:
        port: the service port; matched by name and protocol.
        slices: the slices of its Service.
        family: 4 or 6.
    """
    found: dict[Endpoint, Candidate] = {}
    for one in slices:
        if _FAMILIES.get(one.address_type) != family:
            continue
        for slice_port in one.ports:
            if (
                slice_port.port is None
                or slice_port.name != port.name
                or slice_port.protocol != port.protocol
            ):
                continue
            for item in one.endpoints:
                if not item.addresses:
                    continue
                new = _candidate(item, slice_port.port)
                old = found.get(new.endpoint)
                if old is None or (new.rank, bool(new.node), new.node) > (old.rank, bool(old.node), old.node):
                    found[new.endpoint] = new
    if len(found) < 2:
        return tuple(found.values())
    return tuple(sorted(found.values(), key=_address_order))


def select(
    all_candidates: Iterable[Candidate],
    policy: TrafficPolicy,
    *,
    node: str = "",
    zone: str = "",
    hints: bool = True,
) -> tuple[Endpoint, ...]:
    """The endpoints to use, in the order of the candidates; () where there are none.

    Args:
        all_candidates: as from `candidates`.
        policy: the traffic policy of the listener.
        node: this node's name.
        zone: this node's zone, "" where unknown.
        hints: whether topology hints may be used; not where a Service has a Local policy.
    """
    if policy is TrafficPolicy.LOCAL:
        pool = [c for c in all_candidates if c.node and c.node == node]
    else:
        pool = list(all_candidates)
    ready = [c for c in pool if c.ready]
    if ready:
        if policy is TrafficPolicy.CLUSTER and hints:
            ready = _hinted(ready, node, zone)
        return tuple(c.endpoint for c in ready)
    return tuple(c.endpoint for c in pool if c.rank == 1)


def _hinted(ready: list[Candidate], node: str, zone: str) -> list[Candidate]:
    if node and all(c.nodes for c in ready):
        mine = [c for c in ready if node in c.nodes]
        if mine:
            return mine
    if zone and all(c.zones for c in ready):
        mine = [c for c in ready if zone in c.zones]
        if mine:
            return mine
    return ready


def _candidate(item: SliceEndpoint, port: int) -> Candidate:
    conditions = item.conditions
    ready = conditions.ready is not False
    serving = conditions.serving is not False if conditions.serving is not None else ready
    hints = item.hints
    return Candidate(
        endpoint=Endpoint(item.addresses[0], port),
        ready=ready,
        serving=serving,
        terminating=bool(conditions.terminating),
        node=item.node_name,
        zones=frozenset(z.name for z in hints.for_zones) if hints else frozenset(),
        nodes=frozenset(n.name for n in hints.for_nodes) if hints else frozenset(),
    )


def _address_order(candidate: Candidate) -> tuple[int, int]:
    ip, port = candidate.endpoint
    if ":" in ip:
        return int(ipaddress.IPv6Address(ip)), port
    # A canonical address needs no checking: this takes a fifth of the time.
    a, b, c, d = map(int, ip.split("."))
    return a << 24 | b << 16 | c << 8 | d, port
