"""Makes a Service's EndpointSlices: from the Pods that its selector matches, and from Endpoints objects."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

from proxyd.api.discovery import (
    SERVICE_NAME_LABEL,
    EndpointAddress,
    EndpointConditions,
    EndpointPort,
    Endpoints,
    EndpointSlice,
    ObjectReference,
    SliceEndpoint,
)
from proxyd.api.meta import ObjectMeta, ObjectName
from proxyd.api.pod import Pod, PodPhase
from proxyd.api.sctp import service_addresses, written
from proxyd.api.service import SCTP_ADDRESSES, SCTP_ENDPOINT_ADDRESSES, Service

MANAGED_BY_LABEL = "endpointslice.kubernetes.io/managed-by"
SKIP_MIRROR_LABEL = "endpointslice.kubernetes.io/skip-mirror"
HEADLESS_LABEL = "service.kubernetes.io/headless"
# The API admits no more endpoints in one slice.
MAX_ENDPOINTS = 1000

_Ports: TypeAlias = tuple[EndpointPort, ...]
_FAMILIES = ("IPv4", "IPv6")


class Selected(NamedTuple):
    """The slices of a Service's Pods.

    Attributes:
        slices: the slices.
        matched: how many Pods the selector matches.
        left_out: those of them without an address.
        unresolved: each named targetPort that a Pod lacks, and the first such Pod.
    """

    slices: tuple[EndpointSlice, ...]
    matched: int
    left_out: tuple[ObjectName, ...]
    unresolved: tuple[tuple[str, ObjectName], ...]


class PodIndex:
    """Pods by namespace and label, in order of name, without those that ended (Succeeded, Failed)."""

    def __init__(self, pods: Mapping[ObjectName, Pod]) -> None:
        self._by_label: dict[tuple[str, str, str], list[Pod]] = {}
        by_label = self._by_label
        for name, pod in sorted(pods.items()):
            if pod.status.phase not in {PodPhase.SUCCEEDED, PodPhase.FAILED}:
                for label, value in pod.metadata.labels.items():
                    by_label.setdefault((name.namespace, label, value), []).append(pod)

    def select(self, namespace: str, selector: Mapping[str, str]) -> list[Pod]:
        """The Pods whose labels contain every pair of the selector; an empty selector selects none."""
        if not selector:
            return []
        candidates = min((self._by_label.get((namespace, *pair), []) for pair in selector.items()), key=len)
        if len(selector) == 1:
            return candidates
        return [pod for pod in candidates if selector.items() <= pod.metadata.labels.items()]


def slices_from_pods(service: Service, pods: PodIndex) -> Selected:
    """The slices that Kubernetes' endpoint slice controller would make for a Service with a selector.

    There is one slice for each address family and each set of resolved ports: a named targetPort is looked up
    by name and protocol among the container ports of each Pod, so its number may differ between Pods. A Pod
    that lacks the name is left out for that port only.

    A Pod is ready if its Ready condition is "True" and it is not being deleted. One without any `conditions`
    is ready unless its phase is Pending or Unknown, as nobody writes conditions by hand. With
    publishNotReadyAddresses every Pod is ready, also one that is being deleted (kubernetes
    endpointslice/utils.go, podToEndpoint).
    """
    matched = pods.select(service.metadata.namespace, service.spec.selector)
    groups: dict[tuple[str, _Ports], list[SliceEndpoint]] = {}
    further: dict[str, tuple[str, ...]] = {}
    left_out: list[ObjectName] = []
    unresolved: dict[str, ObjectName] = {}
    by_number = not any(isinstance(port.target, str) for port in service.spec.ports)
    fixed = _resolve(service, None, {}) if by_number else ()
    for pod in matched:
        addresses = _addresses(pod)
        if not addresses:
            left_out.append(pod.metadata.key)
            continue
        ports = fixed if by_number else _resolve(service, pod, unresolved)
        if not ports and service.spec.ports:
            continue
        conditions = _conditions(pod, publish_not_ready=service.spec.publish_not_ready_addresses)
        target = ObjectReference(kind="Pod", namespace=pod.metadata.namespace, name=pod.metadata.name)
        if SCTP_ADDRESSES in pod.metadata.annotations and (
            others := service_addresses(pod.metadata.annotations)
        ):
            further |= dict.fromkeys(addresses.values(), others)
        for family, address in addresses.items():
            groups.setdefault((family, ports), []).append(
                SliceEndpoint(
                    addresses=(address,),
                    conditions=conditions,
                    node_name=pod.spec.node_name,
                    target_ref=target,
                )
            )
    annotations = {SCTP_ENDPOINT_ADDRESSES: written(further)} if further else {}
    slices = _build(service, groups, "endpointslice-controller.k8s.io", annotations)
    return Selected(slices, len(matched), tuple(left_out), tuple(unresolved.items()))


def slices_from_endpoints(service: Service, endpoints: Endpoints) -> tuple[EndpointSlice, ...]:
    """The slices that mirror a hand-written Endpoints object, as Kubernetes' mirroring controller makes them.

    There are none if the object has the label endpointslice.kubernetes.io/skip-mirror=true. Ports keep their
    names: service ports are matched with them by name, also where each side has one port.
    """
    if endpoints.metadata.labels.get(SKIP_MIRROR_LABEL) == "true":
        return ()
    groups: dict[tuple[str, _Ports], list[SliceEndpoint]] = {}
    for subset in endpoints.subsets:
        for addresses, ready in ((subset.addresses, True), (subset.not_ready_addresses, False)):
            conditions = EndpointConditions(ready=ready, serving=ready, terminating=False)
            for address in addresses:
                groups.setdefault((_family(address.ip), subset.ports), []).append(
                    _mirrored(address, conditions)
                )
    given = endpoints.metadata.annotations.get(SCTP_ENDPOINT_ADDRESSES)
    annotations = {SCTP_ENDPOINT_ADDRESSES: given} if given is not None else {}
    return _build(service, groups, "endpointslicemirroring-controller.k8s.io", annotations)


def _mirrored(address: EndpointAddress, conditions: EndpointConditions) -> SliceEndpoint:
    return SliceEndpoint(
        addresses=(address.ip,),
        conditions=conditions,
        node_name=address.node_name,
        target_ref=address.target_ref,
    )


def _build(
    service: Service,
    groups: Mapping[tuple[str, _Ports], list[SliceEndpoint]],
    manager: str,
    annotations: dict[str, str],
) -> tuple[EndpointSlice, ...]:
    if not groups:
        return ()
    meta = service.metadata
    labels = {**meta.labels, SERVICE_NAME_LABEL: meta.name, MANAGED_BY_LABEL: manager}
    if service.spec.headless:
        labels[HEADLESS_LABEL] = ""
    slices = []
    ordered = sorted(groups.items(), key=_group_order) if len(groups) > 1 else groups.items()
    for (family, ports), members in ordered:
        for start in range(0, len(members), MAX_ENDPOINTS):
            # The name stays the same as long as family and ports do.
            seed = f"{manager} {family} {start} {_described(ports)}"
            name = f"{meta.name}-{zlib.crc32(seed.encode()):08x}"
            slices.append(
                EndpointSlice(
                    metadata=ObjectMeta(
                        name=name, namespace=meta.namespace, labels=labels, annotations=annotations
                    ),
                    address_type=family,
                    endpoints=tuple(members[start : start + MAX_ENDPOINTS]),
                    ports=ports,
                )
            )
    return tuple(slices)


def _group_order(group: tuple[tuple[str, _Ports], object]) -> tuple[str, str]:
    (family, ports), _ = group
    return family, _described(ports)


def _described(ports: Iterable[EndpointPort]) -> str:
    return ",".join(f"{port.name}/{port.protocol}/{port.port}" for port in ports)


def _resolve(service: Service, pod: Pod | None, unresolved: dict[str, ObjectName]) -> _Ports:
    """The service's ports with their numbers at a Pod; those that it lacks are added to `unresolved`."""
    ports = []
    for port in service.spec.ports:
        target = port.target
        if isinstance(target, int):
            number = target
        else:
            assert pod is not None
            found = (
                candidate.container_port
                for container in pod.spec.containers
                for candidate in container.ports
                if candidate.name == target and candidate.protocol == port.protocol
            )
            number = next(found, 0)
            if not number:
                unresolved.setdefault(f"{target}/{port.protocol}", pod.metadata.key)
                continue
        ports.append(EndpointPort(name=port.name, protocol=port.protocol, port=number))
    return tuple(ports)


def _addresses(pod: Pod) -> dict[str, str]:
    """The Pod's first address of each family, from podIPs or else podIP."""
    status = pod.status
    given = [entry.ip for entry in status.pod_ips if entry.ip] or ([status.pod_ip] if status.pod_ip else [])
    addresses: dict[str, str] = {}
    for address in given:
        addresses.setdefault(_family(address), address)
    return addresses


def _family(address: str) -> str:
    return _FAMILIES[":" in address]


# There are eight of them, and they are frozen: all endpoints share them.
_CONDITIONS = {
    (ready, serving, terminating): EndpointConditions(ready=ready, serving=serving, terminating=terminating)
    for ready in (False, True)
    for serving in (False, True)
    for terminating in (False, True)
}


def _conditions(pod: Pod, *, publish_not_ready: bool) -> EndpointConditions:
    status = pod.status
    if status.conditions:
        serving = any(
            condition.type == "Ready" and condition.status == "True" for condition in status.conditions
        )
    else:
        serving = status.phase not in {PodPhase.PENDING, PodPhase.UNKNOWN}
    terminating = bool(pod.metadata.deletion_timestamp)
    return _CONDITIONS[publish_not_ready or (serving and not terminating), serving, terminating]


def usable(slices: Iterable[EndpointSlice]) -> bool:
    """Whether any endpoint takes traffic: it is ready, or it is serving while it terminates."""
    return any(
        endpoint.conditions.ready is not False
        or (endpoint.conditions.serving is not False and endpoint.conditions.terminating is True)
        for item in slices
        for endpoint in item.endpoints
    )
