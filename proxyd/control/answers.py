"""The answers of the admin API, for the daemon that gives them and the client that reads them; camelCase in JSON."""

from __future__ import annotations

import msgspec

from proxyd.api.problems import Problem

# What is said of a Service that has no listener.
ALIAS = "Alias"  # ExternalName: a DNS name, nothing to proxy
HEADLESS = "Headless"  # clusterIP None: clients go to the endpoints by themselves
NOT_SERVED = "NotServed"  # nothing that it asks for is served here, as with --vip-mode=none


class Counters(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What was counted since the daemon started. Bytes in go from client to endpoint."""

    opened: int = 0
    closed: int = 0
    failed: int = 0
    attempts: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    @property
    def active(self) -> int:
        """Relays that are alive."""
        return max(0, self.opened - self.closed)

    def __add__(self, other: Counters) -> Counters:
        return Counters(
            opened=self.opened + other.opened,
            closed=self.closed + other.closed,
            failed=self.failed + other.failed,
            attempts=self.attempts + other.attempts,
            bytes_in=self.bytes_in + other.bytes_in,
            bytes_out=self.bytes_out + other.bytes_out,
        )


class WorkerFacts(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One worker."""

    pid: int
    state: str = "ready"  # starting, ready, draining, dead
    generation: int = 0  # the last one it acknowledged
    restarts: int = 0


class SourceFacts(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One source of objects."""

    name: str  # "manifests config/demo"
    synced: bool = False  # it has delivered its first full list
    last_event: float = 0.0  # Unix time; 0 = none yet


class PortView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One port of a Service."""

    name: str = ""
    port: int
    protocol: str
    target_port: int | str = 0
    node_port: int = 0


class ServiceView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One Service. Endpoints are counted by address, in the Service's first address family that has any."""

    namespace: str
    name: str
    type: str
    cluster_ips: tuple[str, ...] = ()
    external_ips: tuple[str, ...] = ()  # and those of its load balancer
    external_name: str = ""
    ports: tuple[PortView, ...] = ()
    endpoints_ready: int = 0
    endpoints_total: int = 0
    connections: int = 0  # alive
    counters: Counters = Counters()
    state: str = ""  # one word
    detail: str = ""
    listeners: dict[str, int] = {}  # how many are in each state

    @property
    def status(self) -> str:
        """State and detail in one line."""
        return f"{self.state}: {self.detail}" if self.detail else self.state


class EndpointView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One endpoint of one service port."""

    namespace: str
    name: str
    port: str = ""  # the service port's name
    protocol: str
    address: str  # ip:port
    ready: bool
    serving: bool
    terminating: bool
    used: bool  # a balancer chooses from it
    node: str = ""
    counters: Counters = Counters()


class ListenerView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One listener."""

    address: str
    port: int
    protocol: str
    role: str
    namespace: str
    name: str
    port_name: str = ""
    state: str
    detail: str = ""
    mapped_from: str = ""  # the address the Service asked for, where another is served

    @property
    def service(self) -> str:
        """The service port: namespace/name:port."""
        return f"{self.namespace}/{self.name}" + (f":{self.port_name}" if self.port_name else "")

    @property
    def status(self) -> str:
        """State and detail in one line."""
        return f"{self.state}: {self.detail}" if self.detail else self.state


class StatusView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The daemon as a whole."""

    version: str
    phase: str
    pid: int
    started: float
    uptime: float  # seconds
    generation: int
    workers: tuple[WorkerFacts, ...]
    sources: tuple[SourceFacts, ...]
    services: int
    listeners: dict[str, int]  # how many are in each state
    endpoints: int
    connections: int  # alive
    counters: Counters
    failing: tuple[ListenerView, ...]  # failed and in conflict
    problems: tuple[Problem, ...]
