"""Validation of the objects that endpoints come from: Endpoints, EndpointSlices and Pods."""

from __future__ import annotations

from proxyd.api import sctp
from proxyd.api.addresses import not_an_ip, parse_ip, refused_endpoint
from proxyd.api.discovery import Endpoints, EndpointSlice, EndpointSubset
from proxyd.api.findings import Findings, Path, shown
from proxyd.api.names import not_dns1123_label, not_dns1123_subdomain, not_port_name
from proxyd.api.pod import Pod
from proxyd.api.rules import Rules
from proxyd.api.validate_service import MAX_PORT, not_a_port

MAX_SLICE_ENDPOINTS = 1000
MAX_ENDPOINT_ADDRESSES = 100
_VERSIONS = {"IPv4": 4, "IPv6": 6}


def check_endpoints(endpoints: Endpoints, rules: Rules, found: Findings) -> None:
    """Add to `found` all that is wrong with an Endpoints object (kubernetes ValidateEndpoints)."""
    sctp.check_annotations(endpoints.metadata.annotations, found)
    for i, subset in enumerate(endpoints.subsets):
        path: Path = ("subsets", i)
        if not subset.addresses and not subset.not_ready_addresses:
            found.error(path, "must specify `addresses` or `notReadyAddresses`")
        for field, addresses in (
            ("addresses", subset.addresses),
            ("notReadyAddresses", subset.not_ready_addresses),
        ):
            for j, address in enumerate(addresses):
                _check_address(address.ip, (*path, field, j, "ip"), rules, found)
        _check_subset_ports(subset, path, found)


def _check_subset_ports(subset: EndpointSubset, path: Path, found: Findings) -> None:
    for i, port in enumerate(subset.ports):
        here: Path = (*path, "ports", i)
        if port.port is None:
            found.error((*here, "port"), "required")
        elif not 1 <= port.port <= MAX_PORT:
            found.error((*here, "port"), not_a_port(port.port))
        if port.name:
            _check_port_name(port.name, (*here, "name"), found)
        elif len(subset.ports) > 1:
            found.error((*here, "name"), "required: each of several ports has a name")


def check_slice(endpoint_slice: EndpointSlice, rules: Rules, found: Findings) -> None:
    """Add to `found` all that is wrong with an EndpointSlice (kubernetes ValidateEndpointSlice)."""
    sctp.check_annotations(endpoint_slice.metadata.annotations, found)
    kind = endpoint_slice.address_type
    if kind not in _VERSIONS and kind != "FQDN":
        found.error(("addressType",), f"expected IPv4, IPv6 or FQDN, got {shown(kind)}")
        return
    if len(endpoint_slice.endpoints) > MAX_SLICE_ENDPOINTS:
        found.error(
            ("endpoints",),
            f"must have at most {MAX_SLICE_ENDPOINTS} items, got {len(endpoint_slice.endpoints)}",
        )
        return
    for i, endpoint in enumerate(endpoint_slice.endpoints):
        path: Path = ("endpoints", i, "addresses")
        if not endpoint.addresses:
            found.error(path, "required: an endpoint has at least one address")
        elif len(endpoint.addresses) > MAX_ENDPOINT_ADDRESSES:
            found.error(
                path, f"must have at most {MAX_ENDPOINT_ADDRESSES} items, got {len(endpoint.addresses)}"
            )
            continue
        for j, address in enumerate(endpoint.addresses):
            _check_slice_address(address, kind, (*path, j), rules, found)
    names: dict[str, int] = {}
    for i, port in enumerate(endpoint_slice.ports):
        first = names.setdefault(port.name, i)
        if first != i:
            found.error(("ports", i, "name"), f"{shown(port.name)} is already the name of ports[{first}]")
        if port.name:
            _check_port_name(port.name, ("ports", i, "name"), found)
        if port.port is not None and not 1 <= port.port <= MAX_PORT:
            found.error(("ports", i, "port"), not_a_port(port.port))


def _check_slice_address(text: str, kind: str, path: Path, rules: Rules, found: Findings) -> None:
    if kind == "FQDN":
        if reason := not_dns1123_subdomain(text):
            found.error(path, f"{shown(text)} is not a host name: {reason}")
        return
    address = parse_ip(text)
    if address is not None and address.version != _VERSIONS[kind]:
        found.error(path, f"{shown(text)} must be an {kind} address, as addressType says")
    else:
        _check_address(text, path, rules, found)


def check_pod(pod: Pod, rules: Rules, found: Findings) -> None:
    """Add to `found` what keeps a Pod from being an endpoint. It may have no address: it may not run yet."""
    sctp.check_annotations(pod.metadata.annotations, found)
    status = pod.status
    if status.pod_ip:
        _check_address(status.pod_ip, ("status", "podIP"), rules, found)
    for i, entry in enumerate(status.pod_ips):
        path: Path = ("status", "podIPs", i, "ip")
        if i == 0 and status.pod_ip:
            # It must equal podIP, which has been checked.
            if parse_ip(entry.ip) != parse_ip(status.pod_ip):
                found.error(path, f"{shown(entry.ip)} is not the podIP {shown(status.pod_ip)}")
        elif entry.ip:
            _check_address(entry.ip, path, rules, found)
    for i, container in enumerate(pod.spec.containers):
        names: dict[str, int] = {}
        for j, port in enumerate(container.ports):
            here: Path = ("spec", "containers", i, "ports", j)
            if not 1 <= port.container_port <= MAX_PORT:
                found.error((*here, "containerPort"), not_a_port(port.container_port))
            if not port.name:
                continue
            if reason := not_port_name(port.name):
                found.error((*here, "name"), f"{shown(port.name)} is not a port name: {reason}")
            first = names.setdefault(port.name, j)
            if first != j:
                found.error((*here, "name"), f"{shown(port.name)} is already the name of ports[{first}]")


def _check_port_name(name: str, path: Path, found: Findings) -> None:
    if reason := not_dns1123_label(name):
        found.error(path, f"{shown(name)} is not a port name: {reason}")


def _check_address(text: str, path: Path, rules: Rules, found: Findings) -> None:
    reason = (
        refused_endpoint(text, rules.service_cidrs, allow_loopback=rules.allow_loopback_endpoints)
        if parse_ip(text)
        else not_an_ip(text)
    )
    if reason:
        found.error(path, f"{shown(text)} {reason}")
