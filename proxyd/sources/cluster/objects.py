"""Decodes objects of the API server leniently: it has validated them, and may be newer than proxyd.

An object is refused only if planning cannot work with it: a value of another type, an invalid address, a port
out of range. Each object is good or bad by itself.
"""

from __future__ import annotations

import re
from typing import Generic, TypeAlias, TypeVar

import msgspec
from msgspec.structs import replace

from proxyd.api.addresses import parse_cidr, parse_ip
from proxyd.api.canonical import canonical
from proxyd.api.discovery import Endpoints, EndpointSlice
from proxyd.api.findings import Findings, Path, field_path, shown
from proxyd.api.meta import ObjectMeta, ObjectName
from proxyd.api.problems import Problem, Severity
from proxyd.api.service import Service
from proxyd.api.shape import fit

_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_ZONES = ("topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone")
# The cluster autoscaler is about to delete a node that has this taint: load balancers should leave it.
_TO_BE_DELETED = "ToBeDeletedByClusterAutoscaler"
_MAX_PORT = 65535
# An IPv4 address in canonical form: it need not be parsed.
_plain = re.compile(r"(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?:\.(?!\Z)|\Z)){4}", re.ASCII).fullmatch
_FAMILIES = {"IPv4": 4, "IPv6": 6}


class Taint(msgspec.Struct, frozen=True, kw_only=True):
    """A taint of a node."""

    key: str = ""
    value: str = ""
    effect: str = ""


class NodeSpec(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """`spec` of a Node."""

    taints: tuple[Taint, ...] = ()
    pod_cidr: str = msgspec.field(default="", name="podCIDR")
    pod_cidrs: tuple[str, ...] = msgspec.field(default=(), name="podCIDRs")


class NodeAddress(msgspec.Struct, frozen=True, kw_only=True):
    """An address or a host name of a node."""

    type: str = ""
    address: str = ""


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`status` of a Node."""

    addresses: tuple[NodeAddress, ...] = ()


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A Node (core/v1)."""

    metadata: ObjectMeta
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()

    @property
    def zone(self) -> str:
        """The zone in its labels; "" if there is none."""
        labels = self.metadata.labels
        return next((labels[label] for label in _ZONES if labels.get(label)), "")

    @property
    def host_ips(self) -> tuple[str, ...]:
        """The primary address of each family, as of kubernetes pkg/util/node, GetNodeHostIPs."""
        parsed = [
            str(ip)
            for kind in ("InternalIP", "ExternalIP")
            for entry in self.status.addresses
            if entry.type == kind and (ip := parse_ip(entry.address)) is not None
        ]
        by_family: dict[bool, str] = {}
        for text in parsed:
            by_family.setdefault(":" in text, text)
        return tuple(by_family.values())

    @property
    def pod_cidrs(self) -> tuple[str, ...]:
        """The ranges of its Pods' addresses."""
        return self.spec.pod_cidrs or ((self.spec.pod_cidr,) if self.spec.pod_cidr else ())

    @property
    def eligible(self) -> bool:
        """Whether load balancers should send it traffic (kubernetes pkg/proxy/healthcheck, nodeEligible)."""
        return not self.metadata.deletion_timestamp and all(
            taint.key != _TO_BE_DELETED for taint in self.spec.taints
        )


ClusterObject: TypeAlias = Service | EndpointSlice | Endpoints | Node
T = TypeVar("T", bound=Service | EndpointSlice | Endpoints | Node)


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """An object that cannot be used, and why. `name` is None if it cannot be read either."""

    name: ObjectName | None
    resource_version: str
    problem: Problem


class _Head(msgspec.Struct, kw_only=True):
    metadata: ObjectMeta | None = None


class Codec(Generic[T]):
    """Decodes objects of one kind.

    Args:
        kind: the struct type.
        beta: the objects are of v1beta1, whose `topology` names node and zone.
    """

    def __init__(self, kind: type[T], *, beta: bool = False) -> None:
        self.kind = kind
        self._beta = beta
        self._decoder = msgspec.json.Decoder(kind)

    def decode(self, raw: bytes | msgspec.Raw) -> T | Refused:
        """An object from JSON; raises nothing."""
        try:
            thing = self._decoder.decode(raw)
        except (msgspec.DecodeError, ValueError, RecursionError):
            found = Findings()
            loose = self._loosely(raw, found)
            if loose is None:
                return self._refuse(raw, found)
            thing = loose
        fault = _fault(thing)
        if fault is not None:
            found = Findings()
            found.error(*fault)
            return self._refuse(raw, found)
        return self._finish(thing)

    def _loosely(self, raw: bytes | msgspec.Raw, found: Findings) -> T | None:
        """Decodes once more, without nulls and empty enum values: Go sends them, and msgspec refuses them."""
        try:
            value = msgspec.json.decode(raw)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            found.error((), str(error))
            return None
        return fit(value, self.kind, found)

    def _finish(self, thing: T) -> T:
        meta = thing.metadata
        if _LAST_APPLIED in meta.annotations:  # it is half of the object's size, and nobody needs it
            annotations = {key: value for key, value in meta.annotations.items() if key != _LAST_APPLIED}
            thing = replace(thing, metadata=replace(meta, annotations=annotations))
        if isinstance(thing, Node) or (not self._beta and _is_canonical(thing)):
            return thing
        return canonical(thing, beta=self._beta)  # type: ignore[return-value]  # it keeps the type

    def _refuse(self, raw: bytes | msgspec.Raw, found: Findings) -> Refused:
        name, version = None, ""
        try:
            meta = msgspec.json.decode(raw, type=_Head).metadata
        except (msgspec.DecodeError, ValueError, RecursionError):
            meta = None
        if meta is not None and meta.name:
            name, version = meta.key, meta.resource_version
        first = found.found[0]
        problem = Problem(
            severity=Severity.ERROR,
            kind=self.kind.__name__,
            object=str(name or "(without a name)"),
            path=field_path(first.path),
            message=first.message,
        )
        return Refused(name=name, resource_version=version, problem=problem)


def _is_canonical(thing: ClusterObject) -> bool:
    """Whether `canonical` would change nothing. Almost always so, and this takes a third of its time."""
    match thing:
        case EndpointSlice():
            return all(
                len(endpoint.addresses) == 1 and _plain(endpoint.addresses[0]) and not endpoint.topology
                for endpoint in thing.endpoints
            )
        case Service():
            spec = thing.spec
            unusual = (
                spec.external_ips
                or spec.load_balancer_ip
                or spec.load_balancer_source_ranges
                or thing.status.load_balancer.ingress
            )
            return not unusual and all(_plain(ip) for ip in (*spec.cluster_ips, spec.cluster_ip) if ip)
    return False


def _fault(thing: ClusterObject) -> tuple[Path, str] | None:
    """The path and the reason why planning cannot work with an object; None if it can."""
    if not thing.metadata.name:
        return ("metadata", "name"), "required"
    match thing:
        case Service():
            return _service_fault(thing)
        case EndpointSlice():
            return _slice_fault(thing)
        case Endpoints():
            return _endpoints_fault(thing)
    return None


def _service_fault(service: Service) -> tuple[Path, str] | None:
    spec = service.spec
    given: list[tuple[Path, str]] = [(("spec", "clusterIP"), spec.cluster_ip)]
    given += [(("spec", "clusterIPs", i), ip) for i, ip in enumerate(spec.cluster_ips)]
    given += [(("spec", "externalIPs", i), ip) for i, ip in enumerate(spec.external_ips)]
    ingress = service.status.load_balancer.ingress
    given += [(("status", "loadBalancer", "ingress", i, "ip"), entry.ip) for i, entry in enumerate(ingress)]
    for path, ip in given:
        if ip and ip != "None" and not _plain(ip) and parse_ip(ip) is None:
            return path, f"{shown(ip)} is not an IP address"
    for i, text in enumerate(spec.load_balancer_source_ranges):
        if parse_cidr(text.strip()) is None:
            return ("spec", "loadBalancerSourceRanges", i), f"{shown(text)} is not a CIDR"
    for i, port in enumerate(spec.ports):
        if not 1 <= port.port <= _MAX_PORT:
            return ("spec", "ports", i, "port"), f"{shown(port.port)} is not a port number"
        if not 0 <= port.node_port <= _MAX_PORT:
            return ("spec", "ports", i, "nodePort"), f"{shown(port.node_port)} is not a port number"
    return None


def _slice_fault(thing: EndpointSlice) -> tuple[Path, str] | None:
    version = _FAMILIES.get(thing.address_type)
    if version is None:
        return None  # host names, or something newer: planning ignores such endpoints
    for i, endpoint in enumerate(thing.endpoints):
        for j, text in enumerate(endpoint.addresses):
            if version == 4 and _plain(text):
                continue
            address = parse_ip(text)
            if address is None or address.version != version:
                return (
                    "endpoints",
                    i,
                    "addresses",
                    j,
                ), f"{shown(text)} is not an {thing.address_type} address"
    for i, port in enumerate(thing.ports):
        if port.port is not None and not 1 <= port.port <= _MAX_PORT:
            return ("ports", i, "port"), f"{shown(port.port)} is not a port number"
    return None


def _endpoints_fault(thing: Endpoints) -> tuple[Path, str] | None:
    for i, subset in enumerate(thing.subsets):
        for field, addresses in (
            ("addresses", subset.addresses),
            ("notReadyAddresses", subset.not_ready_addresses),
        ):
            for j, address in enumerate(addresses):
                if parse_ip(address.ip) is None:
                    return ("subsets", i, field, j, "ip"), f"{shown(address.ip)} is not an IP address"
        for j, port in enumerate(subset.ports):
            if port.port is not None and not 1 <= port.port <= _MAX_PORT:
                return ("subsets", i, "ports", j, "port"), f"{shown(port.port)} is not a port number"
    return None


def same_state(old: ClusterObject, new: ClusterObject) -> bool:
    """Whether two objects are equal but for their resourceVersion."""
    if type(old) is not type(new):
        return False
    a, b = old.metadata, new.metadata
    if a.resource_version and a.resource_version == b.resource_version and a.uid == b.uid:
        return True
    return replace(new, metadata=replace(b, resource_version=a.resource_version)) == old
