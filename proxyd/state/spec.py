"""The values that planning works on: keys, balancer and listener specs, and the host state they make up."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from proxyd.api.service import Protocol, TrafficPolicy


class ServicePortName(NamedTuple):
    """Identity of a service port, as in kube-proxy: namespace/name:portName/protocol."""

    namespace: str
    name: str
    port: str  # the port's name, "" where the Service has one unnamed port
    protocol: Protocol

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}:{self.port}" if self.port else f"{self.namespace}/{self.name}"


class Endpoint(NamedTuple):
    """One backend. The address is in canonical text form, without brackets."""

    ip: str
    port: int

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


class ListenerKey(NamedTuple):
    """One address, port and protocol that proxyd holds open."""

    ip: str
    port: int
    protocol: Protocol

    def __str__(self) -> str:
        host = f"[{self.ip}]" if ":" in self.ip else self.ip
        return f"{host}:{self.port}/{self.protocol}"


class BalancerKey(NamedTuple):
    """One set of endpoints to choose from. A service port has one for each traffic policy in use."""

    service_port: ServicePortName
    policy: TrafficPolicy
    family: int  # 4 or 6: endpoints of the listener's address family only


class Role(enum.StrEnum):
    """Why a listener exists."""

    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    EXTERNAL_IP = "ExternalIP"
    LOAD_BALANCER = "LoadBalancer"
    SCTP_ADDRESS = "SctpAddress"  # the annotation proxyd.io/sctp-addresses


class Home(NamedTuple):
    """Identity of a multi-homed SCTP endpoint: listeners of the same home are addresses of one socket."""

    service_port: ServicePortName
    port: int
    role: Role  # of the first of its listeners
    family: int  # of its socket: 6 where any address is


class SctpOptions(NamedTuple):
    """What the operator decided of SCTP."""

    max_message: int = 256 * 1024  # bytes; a larger one ends its association
    max_streams: int = 1024  # of an association in each direction


class BalancerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Which endpoints a balancer chooses from, and how."""

    key: BalancerKey
    endpoints: tuple[Endpoint, ...]  # in order of address; never empty in a host state
    affinity_seconds: int = 0  # ClientIP affinity: idle seconds until a client is forgotten; 0 = none
    udp_idle_seconds: float | None = None  # None: the daemon's default
    further: Mapping[str, tuple[str, ...]] = {}  # SCTP: other addresses of endpoints, by ip


class ListenerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The immutable wish for one listener."""

    key: ListenerKey  # what is bound
    balancer: BalancerKey
    role: Role
    steered: bool = False  # the address is a foreign one: bound transparently, reached through a policy rule
    mapped_from: str = ""  # the address the Service asked for, where --vip-mode=loopback serves another
    source_ranges: tuple[str, ...] = ()  # CIDRs that may connect; () = everybody
    home: Home | None = None  # SCTP: the endpoint that its address belongs to

    @property
    def service_port(self) -> ServicePortName:
        """The service port that the listener belongs to."""
        return self.balancer.service_port


class Steering(enum.StrEnum):
    """What a policy rule does with the traffic to one foreign (address, protocol, port)."""

    LOCAL = "local"  # deliver it to proxyd's listener
    UNREACHABLE = "unreachable"  # refuse it: there is no endpoint


class HostState(msgspec.Struct, frozen=True, kw_only=True):
    """What the node holds, or should hold, for proxyd. Compared with `plan`."""

    balancers: Mapping[BalancerKey, BalancerSpec] = {}
    listeners: Mapping[ListenerKey, ListenerSpec] = {}
    vips: frozenset[str] = frozenset()  # addresses made local by a route
    steering: Mapping[ListenerKey, Steering] = {}


class ListenerState(enum.StrEnum):
    """Status of a listener, as users see it."""

    SERVING = "Serving"
    NO_ENDPOINTS = "NoEndpoints"
    CONFLICT = "Conflict"
    FAILED = "Failed"
    DISABLED = "Disabled"


class ListenerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One listener's status: what it is, and in words why it is not serving and what to do."""

    key: ListenerKey
    service_port: ServicePortName
    role: Role
    state: ListenerState
    detail: str = ""
    mapped_from: str = ""
    holder: ServicePortName | None = None  # in a conflict: who has the address

    def __str__(self) -> str:
        return f"{self.state}: {self.detail}" if self.detail else str(self.state)


def status_of(
    listener: ListenerSpec, state: ListenerState, detail: str = "", *, holder: ServicePortName | None = None
) -> ListenerStatus:
    """A listener's status."""
    return ListenerStatus(
        key=listener.key,
        service_port=listener.service_port,
        role=listener.role,
        state=state,
        detail=detail,
        mapped_from=listener.mapped_from,
        holder=holder,
    )
