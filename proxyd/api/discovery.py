"""EndpointSlice (discovery.k8s.io/v1 and v1beta1) and Endpoints (core/v1)."""

from __future__ import annotations

import msgspec

from proxyd.api.meta import ObjectMeta, ObjectName
from proxyd.api.service import Protocol

SERVICE_NAME_LABEL = "kubernetes.io/service-name"


class ObjectReference(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """The object behind an endpoint, usually a Pod."""

    kind: str = ""
    namespace: str = ""
    name: str = ""


class EndpointPort(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """One port of a slice; matched with a service port by its *name*."""

    name: str = ""
    protocol: Protocol = Protocol.TCP
    port: int | None = None


class EndpointConditions(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """Conditions of an endpoint. If they are missing it is ready, serving and not terminating."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ForZone(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A zone that should use an endpoint."""

    name: str


class ForNode(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A node that should use an endpoint."""

    name: str


class EndpointHints(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """The zones and nodes that should use an endpoint."""

    for_zones: tuple[ForZone, ...] = ()
    for_nodes: tuple[ForNode, ...] = ()


class SliceEndpoint(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """One endpoint of a slice; only `addresses[0]` is used, as the API demands."""

    addresses: tuple[str, ...] = ()
    conditions: EndpointConditions = EndpointConditions()
    node_name: str = ""
    zone: str = ""
    hints: EndpointHints | None = None
    target_ref: ObjectReference | None = None
    # v1beta1 names the node here.
    topology: dict[str, str] = {}


class EndpointSlice(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """An EndpointSlice, of either version."""

    metadata: ObjectMeta
    address_type: str = "IPv4"
    endpoints: tuple[SliceEndpoint, ...] = ()
    ports: tuple[EndpointPort, ...] = ()

    @property
    def service(self) -> ObjectName:
        """The Service that this slice belongs to: the one in its label, or else the one of its own name."""
        meta = self.metadata
        return ObjectName(meta.namespace, meta.labels.get(SERVICE_NAME_LABEL) or meta.name)


class EndpointAddress(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """One address of an Endpoints object."""

    ip: str
    node_name: str = ""
    target_ref: ObjectReference | None = None


class EndpointSubset(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """Addresses that share the same ports."""

    addresses: tuple[EndpointAddress, ...] = ()
    not_ready_addresses: tuple[EndpointAddress, ...] = ()
    ports: tuple[EndpointPort, ...] = ()


class Endpoints(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """An Endpoints object: it belongs to the Service of the same name."""

    metadata: ObjectMeta
    subsets: tuple[EndpointSubset, ...] = ()
