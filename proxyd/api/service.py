"""Service (core/v1)."""

from __future__ import annotations

import enum

import msgspec

from proxyd.api.meta import ObjectMeta


class Protocol(enum.StrEnum):
    """Transport protocol of a service port."""

    # Enum's own is written in Python: half of the time of a mapping whose keys have a member in them.
    __hash__ = str.__hash__

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"


class ServiceType(enum.StrEnum):
    """How a Service is exposed."""

    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    LOAD_BALANCER = "LoadBalancer"
    EXTERNAL_NAME = "ExternalName"


class SessionAffinity(enum.StrEnum):
    """Whether a client keeps its endpoint."""

    NONE = "None"
    CLIENT_IP = "ClientIP"


class TrafficPolicy(enum.StrEnum):
    """Which endpoints take traffic: the whole cluster's, or this node's only."""

    __hash__ = str.__hash__  # as above

    CLUSTER = "Cluster"
    LOCAL = "Local"


# Annotation of a Service: how long a UDP flow of it may be idle.
UDP_IDLE_TIMEOUT = "proxyd.io/udp-idle-timeout"
# Annotation of a Service or a Pod: further addresses of it, for SCTP.
SCTP_ADDRESSES = "proxyd.io/sctp-addresses"
# Annotation of an EndpointSlice, Endpoints or Service: further addresses of endpoints, for SCTP.
SCTP_ENDPOINT_ADDRESSES = "proxyd.io/sctp-endpoint-addresses"

DEFAULT_AFFINITY_SECONDS = 10800
MAX_AFFINITY_SECONDS = 86400


class ServicePort(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A port of a Service."""

    port: int
    name: str = ""
    protocol: Protocol = Protocol.TCP
    target_port: int | str | None = None
    node_port: int = 0
    app_protocol: str = ""

    @property
    def target(self) -> int | str:
        """`targetPort`, or `port` if it is missing, 0 or ""."""
        return self.target_port or self.port


class ClientIPConfig(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """Timeout of ClientIP affinity, in seconds."""

    timeout_seconds: int | None = None


class SessionAffinityConfig(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """Settings of session affinity."""

    client_ip: ClientIPConfig | None = msgspec.field(default=None, name="clientIP")


class ServiceSpec(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """`spec` of a Service, with the defaults of the Kubernetes API."""

    type: ServiceType = ServiceType.CLUSTER_IP
    selector: dict[str, str] = {}
    ports: tuple[ServicePort, ...] = ()
    cluster_ip: str = msgspec.field(default="", name="clusterIP")
    cluster_ips: tuple[str, ...] = msgspec.field(default=(), name="clusterIPs")
    ip_families: tuple[str, ...] = ()
    ip_family_policy: str = ""
    external_ips: tuple[str, ...] = msgspec.field(default=(), name="externalIPs")
    external_name: str = ""
    load_balancer_ip: str = msgspec.field(default="", name="loadBalancerIP")
    load_balancer_source_ranges: tuple[str, ...] = ()
    session_affinity: SessionAffinity = SessionAffinity.NONE
    session_affinity_config: SessionAffinityConfig | None = None
    internal_traffic_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    external_traffic_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    health_check_node_port: int = 0
    publish_not_ready_addresses: bool = False
    allocate_load_balancer_node_ports: bool = True

    @property
    def all_cluster_ips(self) -> tuple[str, ...]:
        """All clusterIPs: `clusterIPs`, or else `clusterIP`; never "" or "None"."""
        given = self.cluster_ips or ((self.cluster_ip,) if self.cluster_ip else ())
        return tuple(ip for ip in given if ip and ip != "None")

    @property
    def headless(self) -> bool:
        """Whether it has `clusterIP: None`."""
        return self.cluster_ip == "None" or "None" in self.cluster_ips

    @property
    def affinity_seconds(self) -> int:
        """Timeout of ClientIP affinity in seconds; 0 where the Service has none."""
        if self.session_affinity is not SessionAffinity.CLIENT_IP:
            return 0
        config = self.session_affinity_config
        given = config.client_ip.timeout_seconds if config and config.client_ip else None
        return DEFAULT_AFFINITY_SECONDS if given is None else given


class LoadBalancerIngress(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """One address that a load balancer gave the Service."""

    ip: str = ""
    hostname: str = ""
    ip_mode: str = "VIP"


class LoadBalancerStatus(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """`status.loadBalancer`."""

    ingress: tuple[LoadBalancerIngress, ...] = ()


class ServiceStatus(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """`status` of a Service."""

    load_balancer: LoadBalancerStatus = LoadBalancerStatus()


class Service(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A Service."""

    metadata: ObjectMeta
    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus = ServiceStatus()
