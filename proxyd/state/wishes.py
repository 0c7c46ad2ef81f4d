"""The wishes of one Service, regardless of all others: listeners, balancers, VIPs."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping

import msgspec

from proxyd.api.addresses import parse_cidr, parse_ip
from proxyd.api.discovery import EndpointSlice
from proxyd.api.durations import parse_duration
from proxyd.api.sctp import further_addresses, service_addresses
from proxyd.api.service import UDP_IDLE_TIMEOUT, Protocol, Service, ServicePort, ServiceType, TrafficPolicy
from proxyd.state.endpoints import candidates, select
from proxyd.state.homes import at_home, with_further
from proxyd.state.inside import admit_inside, inside_ranges
from proxyd.state.occupied import why_not
from proxyd.state.snapshot import NodeView, Options
from proxyd.state.spec import (
    BalancerKey,
    BalancerSpec,
    ListenerKey,
    ListenerSpec,
    ListenerState,
    ListenerStatus,
    Role,
    ServicePortName,
    status_of,
)

# Characters that the source ranges of a listener may have together: they are told to workers in one message.
MAX_SOURCE_RANGES = 100_000
_GATES = {Protocol.SCTP: "SCTPSupport"}


class ServiceWishes(msgspec.Struct, frozen=True, kw_only=True):
    """The wishes of a Service.

    A listener has no endpoint if its balancer is not in `balancers`. Of two Services that want an address the
    first by `order` gets it: by creation, then by name.
    """

    order: tuple[bool, str, str, str]
    listeners: tuple[ListenerSpec, ...] = ()
    balancers: Mapping[BalancerKey, BalancerSpec] = {}
    vips: frozenset[str] = frozenset()
    unopened: tuple[ListenerStatus, ...] = ()


class Frontend(msgspec.Struct, frozen=True):
    """An address and port at which clients reach a service port."""

    ip: str
    port: int
    role: Role


def service_wishes(
    service: Service, slices: tuple[EndpointSlice, ...], node: NodeView, options: Options
) -> ServiceWishes:
    """The wishes of a Service on a node.

    ExternalName and headless Services have none, as there is nothing to proxy.
    """
    meta, spec = service.metadata, service.spec
    order = (not meta.creation_timestamp, meta.creation_timestamp, meta.namespace, meta.name)
    if spec.type is ServiceType.EXTERNAL_NAME or spec.headless:
        return ServiceWishes(order=order)
    local_ips = {address.ip for address in node.addresses}
    inside = inside_ranges(node, options)
    listeners: list[ListenerSpec] = []
    unopened: list[ListenerStatus] = []
    balancers: dict[BalancerKey, BalancerSpec] = {}
    vips: set[str] = set()
    for port in spec.ports:
        name = ServicePortName(meta.namespace, meta.name, port.name, port.protocol)
        admitted: list[ListenerSpec] = []
        for frontend in _frontends(service, port, node, options):
            listener, refusal = _listener(service, name, frontend, local_ips, options)
            is_vip = _is_vip(frontend, local_ips, options)
            if refusal is None and is_vip and (why := why_not(frontend.ip, node.occupied)):
                refusal = (ListenerState.CONFLICT, f"{frontend.ip} {why}; give the Service another clusterIP")
            refusal = refusal or _left_to_endpoint(listener, port, slices)
            if refusal is not None:
                unopened.append(status_of(listener, *refusal))
                continue
            admitted.append(listener)
            if is_vip:
                vips.add(listener.key.ip)
        chosen = {
            key: _balancer(service, port, slices, node, key)
            for key in dict.fromkeys(listener.balancer for listener in admitted)
        }
        admitted = admit_inside(
            admitted,
            chosen,
            inside,
            # mypy knows no default of a lambda
            lambda key, port=port: _balancer(service, port, slices, node, key),  # type: ignore[misc]
        )
        if port.protocol is Protocol.SCTP:
            admitted = at_home(admitted, {key for key, balancer in chosen.items() if balancer.endpoints})
            further = _further(service, slices, options)
            chosen = {key: with_further(balancer, further) for key, balancer in chosen.items()}
        listeners += admitted
        for listener in admitted:
            if chosen[listener.balancer].endpoints:
                balancers[listener.balancer] = chosen[listener.balancer]
    return ServiceWishes(
        order=order,
        listeners=tuple(listeners),
        balancers=balancers,
        vips=frozenset(vips),
        unopened=tuple(unopened),
    )


def _frontends(service: Service, port: ServicePort, node: NodeView, options: Options) -> Iterator[Frontend]:
    spec = service.spec
    for ip in spec.all_cluster_ips:
        yield Frontend(ip, port.port, Role.CLUSTER_IP)
    for ip in spec.external_ips:
        yield Frontend(ip, port.port, Role.EXTERNAL_IP)
    if port.protocol is Protocol.SCTP:
        for ip in service_addresses(service.metadata.annotations):
            if ip not in spec.all_cluster_ips and ip not in spec.external_ips:
                yield Frontend(ip, port.port, Role.SCTP_ADDRESS)
    families = _families(service)
    if spec.type is ServiceType.LOAD_BALANCER:
        for ingress in service.status.load_balancer.ingress:
            if not ingress.ip or ingress.ip_mode == "Proxy":
                continue
            # A load balancer may have addresses of a family that the Service does not have.
            if _family(ingress.ip) in families or port.protocol is Protocol.SCTP:
                yield Frontend(ingress.ip, port.port, Role.LOAD_BALANCER)
    if port.node_port and spec.type in (ServiceType.NODE_PORT, ServiceType.LOAD_BALANCER):
        for ip in nodeport_addresses(node, options):
            if _family(ip) in families:
                yield Frontend(ip, port.node_port, Role.NODE_PORT)


def nodeport_addresses(node: NodeView, options: Options) -> tuple[str, ...]:
    """The node addresses that --nodeport-addresses and --bind-address admit for NodePorts."""
    wanted = options.nodeport_addresses
    networks = [ipaddress.ip_network(cidr, strict=False) for cidr in wanted if cidr != "primary"]
    chosen = []
    for address in node.addresses:
        ip = ipaddress.ip_address(address.ip)
        if options.bind_addresses and address.ip not in options.bind_addresses:
            continue
        if ip.is_loopback and not options.localhost_nodeports:
            continue
        if (
            wanted
            and not ("primary" in wanted and address.primary)
            and not any(ip in net for net in networks)
        ):
            continue
        chosen.append(address.ip)
    return tuple(chosen)


def _listener(
    service: Service, name: ServicePortName, frontend: Frontend, local_ips: set[str], options: Options
) -> tuple[ListenerSpec, tuple[ListenerState, str] | None]:
    """The listener for a frontend, and the reason why it can't be opened, if there is one."""
    spec = service.spec
    internal = frontend.role in (Role.CLUSTER_IP, Role.SCTP_ADDRESS)
    policy = spec.internal_traffic_policy if internal else spec.external_traffic_policy
    family = _family(frontend.ip)
    ip, mapped_from, refusal = frontend.ip, "", None
    ours = ip in local_ips or _is_loopback(ip)
    if options.vip_mode.loopback and not ours:
        if family == 4:
            ip, mapped_from = "127." + ip.split(".", 1)[1], ip
        else:
            refusal = (
                ListenerState.FAILED,
                f"--vip-mode=loopback has no loopback address for {ip}; use --vip-mode=route",
            )
    listener = ListenerSpec(
        key=ListenerKey(ip, frontend.port, name.protocol),
        balancer=BalancerKey(name, policy, family),
        role=frontend.role,
        # SCTP finds its addresses in the kernel's table of local ones alone, so they can't be steered.
        steered=not internal
        and not ours
        and not mapped_from
        and options.steer_external_ips
        and name.protocol is not Protocol.SCTP,
        mapped_from=mapped_from,
        source_ranges=_source_ranges(service, family) if frontend.role is Role.LOAD_BALANCER else (),
    )
    if (
        frontend.role is Role.EXTERNAL_IP
        and options.vip_mode.serve
        and name.protocol is not Protocol.SCTP  # its associations have addresses of both families
        and family not in _families(service)
    ):
        # kubernetes pkg/proxy/serviceport.go: a family's proxy takes its addresses if it has a clusterIP.
        refusal = (
            ListenerState.DISABLED,
            (
                f"the Service has no IPv{family} clusterIP; add IPv{family} to spec.ipFamilies, and for "
                "manifests such a range to --service-cluster-ip-range"
            ),
        )
    ranges = listener.source_ranges
    if sum(map(len, ranges)) + 3 * len(ranges) > MAX_SOURCE_RANGES:
        refusal = (
            ListenerState.FAILED,
            f"{len(ranges)} loadBalancerSourceRanges are more than a listener can have: use larger ranges",
        )
    if frontend.role is Role.CLUSTER_IP and not options.vip_mode.serve:
        refusal = (ListenerState.DISABLED, "--vip-mode=none")
    if name.protocol not in options.protocols:
        gate = _GATES.get(name.protocol, f"{name.protocol} is not relayed by this version")
        refusal = (ListenerState.DISABLED, gate)
    return listener, refusal


def _left_to_endpoint(
    listener: ListenerSpec, port: ServicePort, slices: tuple[EndpointSlice, ...]
) -> tuple[ListenerState, str] | None:
    """Why a listener is not opened at an address of this node that is itself an endpoint of the service port.

    Such an endpoint, of a Pod in the node's network, has the port or wants it: while it is not ready too. A
    listener in its place would hinder it, or connect to itself for ever.
    """
    key = listener.key
    if listener.steered or not any(found.port == key.port for one in slices for found in one.ports):
        return None
    for candidate in candidates(port, slices, listener.balancer.family):
        if candidate.endpoint == (key.ip, key.port):
            if candidate.rank:
                return ListenerState.SERVING, "its endpoint has this address and port itself"
            return (
                ListenerState.NO_ENDPOINTS,
                "left to its endpoint at this address and port, which is not ready",
            )
    return None


def _balancer(
    service: Service, port: ServicePort, slices: tuple[EndpointSlice, ...], node: NodeView, key: BalancerKey
) -> BalancerSpec:
    spec = service.spec
    both = (spec.internal_traffic_policy, spec.external_traffic_policy)
    endpoints = select(
        candidates(port, slices, key.family),
        key.policy,
        node=node.name,
        zone=node.zone,
        hints=TrafficPolicy.LOCAL not in both,
    )
    return BalancerSpec(
        key=key,
        endpoints=endpoints,
        affinity_seconds=spec.affinity_seconds,
        udp_idle_seconds=_udp_idle_seconds(service, port),
    )


def _further(
    service: Service, slices: tuple[EndpointSlice, ...], options: Options
) -> dict[str, tuple[str, ...]]:
    """Further addresses of SCTP endpoints, by an endpoint's own; slices win over their Service."""
    said: dict[str, tuple[str, ...]] = {}
    for metadata in (service.metadata, *(one.metadata for one in slices)):
        said.update(further_addresses(metadata.annotations, options.vip_ranges))
    return said


def _udp_idle_seconds(service: Service, port: ServicePort) -> float | None:
    """The seconds in the Service's annotation; None if it is missing or wrong, of which a warning tells."""
    text = service.metadata.annotations.get(UDP_IDLE_TIMEOUT)
    if text is None or port.protocol is not Protocol.UDP:
        return None
    try:
        return parse_duration(text) or None
    except ValueError:
        return None


def _source_ranges(service: Service, family: int) -> tuple[str, ...]:
    """The ranges of one family; if it has none, those of the other, so that not everybody may connect."""
    ranges = tuple(text.strip() for text in service.spec.load_balancer_source_ranges)
    mine = tuple(text for text in ranges if (":" in text) == (family == 6))
    return mine or ranges


def _families(service: Service) -> frozenset[int]:
    """The address families of a Service: those of its clusterIPs, or else `ipFamilies`, or else IPv4."""
    spec = service.spec
    given = frozenset(_family(ip) for ip in spec.all_cluster_ips)
    return given or frozenset(6 if f == "IPv6" else 4 for f in spec.ip_families) or frozenset({4})


def _is_vip(frontend: Frontend, local_ips: set[str], options: Options) -> bool:
    """Whether an address is for proxyd to make local: a clusterIP, or one of SCTP from the service range."""
    if not options.vip_mode.route or _is_loopback(frontend.ip):
        return False
    if frontend.role is Role.SCTP_ADDRESS:
        return _is_in_range(frontend.ip, local_ips, options)
    return frontend.role is Role.CLUSTER_IP


def _is_in_range(ip: str, local_ips: set[str], options: Options) -> bool:
    """Whether proxyd has to make an address local: it is in the service range, and not the node's own."""
    address = parse_ip(ip)
    ranges = [network for cidr in options.vip_ranges if (network := parse_cidr(cidr)) is not None]
    return ip not in local_ips and address is not None and any(address in network for network in ranges)


def _family(ip: str) -> int:
    return 6 if ":" in ip else 4


def _is_loopback(ip: str) -> bool:
    return ip.startswith("127.") or ip == "::1"
