"""The canonical form of a valid object: canonical addresses, defaults filled in, v1beta1 slices as v1."""

from __future__ import annotations

from msgspec.structs import replace

from proxyd.api.addresses import canonical_ip, parse_cidr
from proxyd.api.discovery import EndpointAddress, Endpoints, EndpointSlice, SliceEndpoint
from proxyd.api.meta import ObjectMeta
from proxyd.api.pod import Pod, PodIP
from proxyd.api.service import LoadBalancerStatus, Service, ServiceStatus
from proxyd.api.validate import KubeObject

_HOSTNAME = "kubernetes.io/hostname"
_ZONE = "topology.kubernetes.io/zone"


def canonical(thing: KubeObject, *, beta: bool) -> KubeObject:
    """`thing` in canonical form. `beta`: a slice is of v1beta1, whose `topology` names node and zone."""
    match thing:
        case Service():
            return _service(thing)
        case Endpoints():
            return _endpoints(thing)
        case EndpointSlice():
            return _slice(thing, beta=beta)
        case Pod():
            return _pod(thing)


def _meta(meta: ObjectMeta) -> ObjectMeta:
    return meta if meta.namespace else replace(meta, namespace="default")


def _ips(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(canonical_ip, texts)))


def _service(service: Service) -> Service:
    spec, status = service.spec, service.status
    changed = {
        "cluster_ip": canonical_ip(spec.cluster_ip),
        "cluster_ips": _ips(spec.cluster_ips),
        "external_ips": _ips(spec.external_ips),
        "load_balancer_ip": canonical_ip(spec.load_balancer_ip),
        "load_balancer_source_ranges": tuple(
            str(parse_cidr(text.strip())) for text in spec.load_balancer_source_ranges
        ),
    }
    if any(getattr(spec, name) != value for name, value in changed.items()):
        spec = replace(spec, **changed)
    if status.load_balancer.ingress:
        ingress = tuple(replace(entry, ip=canonical_ip(entry.ip)) for entry in status.load_balancer.ingress)
        status = ServiceStatus(load_balancer=LoadBalancerStatus(ingress=ingress))
    return Service(metadata=_meta(service.metadata), spec=spec, status=status)


def _endpoints(endpoints: Endpoints) -> Endpoints:
    def each(addresses: tuple[EndpointAddress, ...]) -> tuple[EndpointAddress, ...]:
        return tuple(
            entry if canonical_ip(entry.ip) == entry.ip else replace(entry, ip=canonical_ip(entry.ip))
            for entry in addresses
        )

    subsets = tuple(
        replace(
            subset, addresses=each(subset.addresses), not_ready_addresses=each(subset.not_ready_addresses)
        )
        for subset in endpoints.subsets
    )
    return Endpoints(metadata=_meta(endpoints.metadata), subsets=subsets)


def _slice(endpoint_slice: EndpointSlice, *, beta: bool) -> EndpointSlice:
    fqdn = endpoint_slice.address_type == "FQDN"

    def each(endpoint: SliceEndpoint) -> SliceEndpoint:
        topology = endpoint.topology
        addresses = endpoint.addresses if fqdn else tuple(map(canonical_ip, endpoint.addresses))
        if addresses == endpoint.addresses and not topology:
            return endpoint
        if not beta:
            return replace(endpoint, addresses=addresses, topology={})
        return replace(
            endpoint,
            addresses=addresses,
            node_name=endpoint.node_name or topology.get(_HOSTNAME, ""),
            zone=endpoint.zone or topology.get(_ZONE, ""),
            topology={},
        )

    return replace(
        endpoint_slice,
        metadata=_meta(endpoint_slice.metadata),
        endpoints=tuple(map(each, endpoint_slice.endpoints)),
    )


def _pod(pod: Pod) -> Pod:
    status = pod.status
    if status.pod_ip or status.pod_ips:
        status = replace(
            status,
            pod_ip=canonical_ip(status.pod_ip),
            pod_ips=tuple(PodIP(ip=canonical_ip(entry.ip)) for entry in status.pod_ips),
        )
    return replace(pod, metadata=_meta(pod.metadata), status=status)
