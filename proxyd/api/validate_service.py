"""Validation of Services as in the Kubernetes API server (pkg/apis/core/validation, ValidateService)."""

from __future__ import annotations

from proxyd.api import sctp
from proxyd.api.addresses import not_an_ip, parse_cidr, parse_ip, special
from proxyd.api.durations import parse_duration
from proxyd.api.findings import Findings, Path, shown
from proxyd.api.names import not_dns1123_label, not_dns1123_subdomain, not_port_name
from proxyd.api.rules import Rules
from proxyd.api.service import (
    MAX_AFFINITY_SECONDS,
    UDP_IDLE_TIMEOUT,
    Protocol,
    Service,
    ServicePort,
    ServiceSpec,
    ServiceType,
    SessionAffinity,
)

MAX_PORT = 65535
_FAMILIES = ("IPv4", "IPv6")
_FAMILY_POLICIES = ("SingleStack", "PreferDualStack", "RequireDualStack")
_IP_MODES = ("VIP", "Proxy")
_WITH_NODE_PORTS = (ServiceType.NODE_PORT, ServiceType.LOAD_BALANCER)


def check_service(service: Service, rules: Rules, found: Findings) -> None:
    """Add to `found` all that is wrong with `spec` and `status`."""
    spec = service.spec
    _check_ports(spec, rules, found)
    _check_cluster_ips(spec, found)
    if spec.type is ServiceType.EXTERNAL_NAME:
        _check_external_name(spec, found)
    for i, ip in enumerate(spec.external_ips):
        _check_ip(ip, ("spec", "externalIPs", i), found)
    _check_affinity(spec, found)
    _check_source_ranges(spec, found)
    if not 0 <= spec.health_check_node_port <= MAX_PORT:
        found.error(("spec", "healthCheckNodePort"), not_a_port(spec.health_check_node_port))
    _check_ingress(service, found)
    _check_annotations(service, found)


def not_a_port(port: int) -> str:
    """The message for a port number out of range."""
    return f"{shown(port)} is not a port number (1-{MAX_PORT})"


def _check_ports(spec: ServiceSpec, rules: Rules, found: Findings) -> None:
    if not spec.ports and not spec.headless and spec.type is not ServiceType.EXTERNAL_NAME:
        found.error(("spec", "ports"), "required: give at least one port (or clusterIP: None)")
    names: dict[str, int] = {}
    ports: dict[tuple[Protocol, int], int] = {}
    node_ports: dict[tuple[Protocol, int], int] = {}
    for i, port in enumerate(spec.ports):
        path: Path = ("spec", "ports", i)
        _check_port(port, path, found)
        if port.name:
            if reason := not_dns1123_label(port.name):
                found.error((*path, "name"), f"{shown(port.name)} is not a port name: {reason}")
            first = names.setdefault(port.name, i)
            if first != i:
                found.error((*path, "name"), f"{shown(port.name)} is already the name of ports[{first}]")
        elif len(spec.ports) > 1:
            found.error((*path, "name"), "required: each of several ports has a name")
        first = ports.setdefault((port.protocol, port.port), i)
        if first != i:
            found.error(
                (*path, "port"), f"{shown(port.port)}/{port.protocol} is already the port of ports[{first}]"
            )
        if port.node_port:
            _check_node_port(port.node_port, spec.type, rules, (*path, "nodePort"), found)
            first = node_ports.setdefault((port.protocol, port.node_port), i)
            if first != i:
                found.error(
                    (*path, "nodePort"),
                    f"{shown(port.node_port)}/{port.protocol} is already the nodePort of ports[{first}]",
                )


def _check_port(port: ServicePort, path: Path, found: Findings) -> None:
    if not 1 <= port.port <= MAX_PORT:
        found.error((*path, "port"), not_a_port(port.port))
    target = port.target_port
    if isinstance(target, str):
        if target and (reason := not_port_name(target)):
            found.error((*path, "targetPort"), f"{shown(target)} is not a port name: {reason}")
    elif target and not 1 <= target <= MAX_PORT:
        found.error((*path, "targetPort"), not_a_port(target))


def _check_node_port(node_port: int, kind: ServiceType, rules: Rules, path: Path, found: Findings) -> None:
    if kind not in _WITH_NODE_PORTS:
        found.error(path, f"may not be used when `type` is '{kind}': use NodePort or LoadBalancer")
    first, last = rules.node_port_range
    if not first <= node_port <= last:
        found.error(
            path, f"{shown(node_port)} is not in the range {first}-{last} (--service-node-port-range)"
        )


def _check_cluster_ips(spec: ServiceSpec, found: Findings) -> None:
    one: Path = ("spec", "clusterIP")
    several: Path = ("spec", "clusterIPs")
    given = [(one, spec.cluster_ip)] if spec.cluster_ip else []
    if spec.cluster_ips:
        first = spec.cluster_ips[0]
        if (
            not given
            or first == spec.cluster_ip
            or (parse_ip(first) or 1) == (parse_ip(spec.cluster_ip) or 2)
        ):
            given = []  # clusterIPs has it
        else:
            found.error((*several, 0), f"{shown(first)} is not the clusterIP {shown(spec.cluster_ip)}")
        given += [((*several, i), ip) for i, ip in enumerate(spec.cluster_ips)]
    for path, ip in given:
        if ip == "None":
            if spec.type is not ServiceType.CLUSTER_IP:
                found.error(path, f"may not be set to 'None' for {spec.type} services")
        else:
            _check_vip(ip, path, found)
    if given and spec.type is ServiceType.EXTERNAL_NAME and not spec.headless:
        found.error(given[0][0], "may not be set for ExternalName services")
    _check_families(spec, found)


def _check_families(spec: ServiceSpec, found: Findings) -> None:
    path: Path = ("spec", "clusterIPs")
    if len(spec.cluster_ips) > len(_FAMILIES):
        found.error(path, "at most two, one of each IP family")
    elif "None" in spec.cluster_ips and len(spec.cluster_ips) > 1:
        found.error(path, "'None' stands alone")
    else:
        addresses = [parse_ip(ip) for ip in spec.cluster_ips]
        versions = [address.version for address in addresses if address]
        if len(set(versions)) < len(versions):
            found.error((*path, 1), "is of the same IP family as the first: at most one of each")
    for i, family in enumerate(spec.ip_families):
        if family not in _FAMILIES:
            found.error(("spec", "ipFamilies", i), f"expected IPv4 or IPv6, got {shown(family)}")
        elif family in spec.ip_families[:i]:
            found.error(("spec", "ipFamilies", i), f"{family} is given twice")
        elif i < len(spec.all_cluster_ips):
            address = parse_ip(spec.all_cluster_ips[i])
            if address and f"IPv{address.version}" != family:
                found.error(("spec", "ipFamilies", i), f"{family} does not fit the clusterIP {address}")
    policy = spec.ip_family_policy
    if policy and policy not in _FAMILY_POLICIES:
        found.error(
            ("spec", "ipFamilyPolicy"),
            f"expected SingleStack, PreferDualStack or RequireDualStack, got {shown(policy)}",
        )
    if policy == "SingleStack" and len(spec.cluster_ips) > 1:
        found.error(path, "may only hold one value when `ipFamilyPolicy` is 'SingleStack'")


def _check_external_name(spec: ServiceSpec, found: Findings) -> None:
    path: Path = ("spec", "externalName")
    name = spec.external_name.removesuffix(".")
    if not name:
        found.error(path, "required: an ExternalName service is an alias for a host name")
    elif reason := not_dns1123_subdomain(name):
        found.error(path, f"{shown(spec.external_name)} is not a host name: {reason}")


def _check_affinity(spec: ServiceSpec, found: Findings) -> None:
    client_ip = spec.session_affinity_config and spec.session_affinity_config.client_ip
    if not client_ip:
        return
    path: Path = ("spec", "sessionAffinityConfig", "clientIP", "timeoutSeconds")
    if spec.session_affinity is SessionAffinity.NONE:
        found.warning(path[:2], "has no effect: `sessionAffinity` is 'None'")
    seconds = client_ip.timeout_seconds
    if seconds is not None and not 1 <= seconds <= MAX_AFFINITY_SECONDS:
        found.error(path, f"{shown(seconds)} is not in the range 1-{MAX_AFFINITY_SECONDS} (seconds)")


def _check_source_ranges(spec: ServiceSpec, found: Findings) -> None:
    path: Path = ("spec", "loadBalancerSourceRanges")
    if spec.load_balancer_source_ranges and spec.type is not ServiceType.LOAD_BALANCER:
        found.error(path, "may only be used when `type` is 'LoadBalancer'")
    for i, text in enumerate(spec.load_balancer_source_ranges):
        if parse_cidr(text.strip()) is None:
            found.error((*path, i), f"{shown(text)} is not a CIDR such as 10.0.0.0/8")


def _check_ingress(service: Service, found: Findings) -> None:
    for i, ingress in enumerate(service.status.load_balancer.ingress):
        path: Path = ("status", "loadBalancer", "ingress", i)
        if ingress.ip:
            _check_vip(ingress.ip, (*path, "ip"), found)
        if ingress.ip_mode and ingress.ip_mode not in _IP_MODES:
            found.error((*path, "ipMode"), f"expected VIP or Proxy, got {shown(ingress.ip_mode)}")


def _check_annotations(service: Service, found: Findings) -> None:
    sctp.check_annotations(service.metadata.annotations, found)
    text = service.metadata.annotations.get(UDP_IDLE_TIMEOUT)
    if text is None:
        return
    path: Path = ("metadata", "annotations", UDP_IDLE_TIMEOUT)
    try:
        if not parse_duration(text):
            found.warning(path, f"has no effect: expected a duration over 0, got {shown(text)}")
    except ValueError as error:
        found.warning(path, f"has no effect: {error}")


def _check_ip(text: str, path: Path, found: Findings) -> None:
    if reason := special(text):
        found.error(path, f"{shown(text)} {reason}")


def _check_vip(text: str, path: Path, found: Findings) -> None:
    """Refuses VIPs that no client can connect to. A loopback address is allowed: it needs no root."""
    address = parse_ip(text)
    if address is None:
        found.error(path, f"{shown(text)} {not_an_ip(text)}")
    elif address.is_unspecified:
        found.error(path, f"{shown(text)} may not be unspecified ({address})")
    elif address.is_multicast:
        found.error(path, f"{shown(text)} may not be a multicast address")
