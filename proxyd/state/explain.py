"""Explains a Service's endpoints: which ones were considered, and whether and why each is used."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from proxyd.api.discovery import EndpointSlice, SliceEndpoint
from proxyd.api.service import Protocol, Service, ServicePort, TrafficPolicy
from proxyd.state.endpoints import Candidate, candidates
from proxyd.state.snapshot import NodeView, Options
from proxyd.state.spec import BalancerKey, Endpoint, ServicePortName
from proxyd.state.wishes import ServiceWishes, service_wishes

_FAMILIES = {"IPv4": 4, "IPv6": 6}


class Considered(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint that was considered for a service port under a traffic policy.

    `address` is ip:port, or the part of it that is known. `target` is the object behind it (`Pod prod/a`), ""
    if the slice names none. `reason` says in a few words why it is used or left out.
    """

    port: str  # the service port's name
    protocol: Protocol
    policy: TrafficPolicy
    address: str
    target: str = ""
    node: str = ""
    used: bool = False
    reason: str


def considered(
    service: Service, slices: tuple[EndpointSlice, ...], node: NodeView, options: Options
) -> tuple[Considered, ...]:
    """Every endpoint of the slices, in their order, for each service port and each traffic policy in use.

    There are none for ExternalName and headless Services, which need no proxy.
    """
    wishes = service_wishes(service, slices, node, options)
    keys = dict.fromkeys(listener.balancer for listener in wishes.listeners)
    families = {key.family for key in keys}
    found: list[Considered] = []
    for port in service.spec.ports:
        mine = [key for key in keys if key.service_port == _name(service, port)]
        for policy in dict.fromkeys(key.policy for key in mine):
            of_policy = {key.family: key for key in mine if key.policy is policy}
            taken: set[Endpoint] = set()
            for one in slices:
                for item in one.endpoints:
                    judge = _Judge(port, policy, one, item)
                    family = _FAMILIES.get(one.address_type, 0)
                    if family in of_policy:
                        found += judge.of_family(of_policy[family], wishes, node, taken)
                    elif not family:
                        found.append(judge.out("a host name: only addresses are proxied"))
                    elif family not in families:
                        found.append(
                            judge.out(f"{one.address_type}: no {one.address_type} listener wants it")
                        )
    return tuple(found)


def _name(service: Service, port: ServicePort) -> ServicePortName:
    return ServicePortName(service.metadata.namespace, service.metadata.name, port.name, port.protocol)


class _Judge:
    """Explains one endpoint of a slice, for one service port and policy."""

    def __init__(
        self, port: ServicePort, policy: TrafficPolicy, one: EndpointSlice, item: SliceEndpoint
    ) -> None:
        self.port, self.policy, self.slice, self.item = port, policy, one, item

    def out(self, reason: str, address: str = "", *, used: bool = False) -> Considered:
        ref = self.item.target_ref
        name = f"{ref.namespace}/{ref.name}" if ref and ref.namespace else ref.name if ref else ""
        return Considered(
            port=self.port.name,
            protocol=self.port.protocol,
            policy=self.policy,
            address=address or next(iter(self.item.addresses), ""),
            target=f"{ref.kind} {name}".strip() if ref else "",
            node=self.item.node_name,
            used=used,
            reason=reason,
        )

    def of_family(
        self, key: BalancerKey, wishes: ServiceWishes, node: NodeView, taken: set[Endpoint]
    ) -> Iterator[Considered]:
        alone = msgspec.structs.replace(self.slice, endpoints=(self.item,))
        mine = candidates(self.port, (alone,), key.family)
        if not mine:
            yield self.out(self._no_candidate())
        balancer = wishes.balancers.get(key)
        chosen = balancer.endpoints if balancer else ()
        for candidate in mine:
            endpoint = candidate.endpoint
            if endpoint not in chosen:
                reason, used = self._left_out(candidate, node), False
            elif endpoint in taken:
                reason, used = "the same address as one before", False
            else:
                taken.add(endpoint)
                ready = "ready" if candidate.ready else "serves while it terminates: no endpoint is ready"
                reason, used = ready, True
            yield self.out(reason, str(endpoint), used=used)

    def _no_candidate(self) -> str:
        if not self.item.addresses:
            return "has no address"
        ports = self.slice.ports
        if not ports:
            return "its slice has no ports"
        named = [port for port in ports if port.name == self.port.name]
        if any(port.protocol == self.port.protocol for port in named):
            return "its slice port has no number"
        if named:
            one = named[0]
            return f"slice port {_quoted(one.name)} is {one.protocol}, the service port {self.port.protocol}"
        names = " or ".join(_quoted(port.name) for port in ports[:3])
        return f"slice port {names} does not match service port {_quoted(self.port.name)}"

    def _left_out(self, candidate: Candidate, node: NodeView) -> str:
        if self.policy is TrafficPolicy.LOCAL and (not candidate.node or candidate.node != node.name):
            where = f"on node {candidate.node}" if candidate.node else "on no node"
            return f"{where}: policy Local takes those of this node ({node.name}) only"
        if candidate.ready:
            hinted = sorted(candidate.nodes) or sorted(candidate.zones)
            return f"hinted for {', '.join(hinted)}" if hinted else "the same address in another slice counts"
        if candidate.terminating:
            return "terminating: others are ready" if candidate.serving else "terminating"
        return "not ready"


def _quoted(name: str) -> str:
    return f"'{name}'" if name else "without a name"
