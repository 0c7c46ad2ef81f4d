"""The answers of the admin API, as the daemon gives them and the client reads them; camelCase in JSON."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from proxyd.api.problems import Problem
from proxyd.control.feeds.facts import SourceFacts

NO_SUCH_PATH = "NoSuchPath"  # the daemon is of a version that has no such path

# The state of a Service that has no listener.
ALIAS = "Alias"  # ExternalName: a DNS name, nothing to proxy
HEADLESS = "Headless"  # clusterIP None: clients go to the endpoints by themselves
NOT_SERVED = "NotServed"  # nothing that it asks for is served here, such as a NodePort that no address admits


class Counters(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What was counted since the daemon started. Bytes in go from client to endpoint."""

    opened: int = 0
    closed: int = 0
    failed: int = 0
    attempts: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    connect_us: int = 0  # microseconds from connect to connected, added up
    refused: int = 0  # turned away: source range, or no endpoint left

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
            connect_us=self.connect_us + other.connect_us,
            refused=self.refused + other.refused,
        )


NOTHING_COUNTED = Counters()


def total(many: Iterable[Counters]) -> Counters:
    """The sum of counters, most of which may be zero."""
    found = NOTHING_COUNTED
    for one in many:
        if one is not NOTHING_COUNTED:
            found = found + one
    return found


class WorkerFacts(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One worker."""

    pid: int
    state: str = "ready"  # starting, ready, draining, dead
    generation: int = 0  # the last one it acknowledged
    restarts: int = 0


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
    labels: dict[str, str] = {}
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
    leaving_workers: tuple[int, ...] = ()  # processes of earlier programs that still relay, uncounted
    vip_listen: str = ""  # "parked" or "bound"; "" where proxyd makes no VIPs
    vip_listen_reason: str = ""  # why they are bound


class ConnectionView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One connection that is alive. Bytes in go from client to endpoint."""

    namespace: str
    name: str
    port: str = ""  # the service port's name
    protocol: str
    client: str  # ip:port
    frontend: str  # ip:port
    endpoint: str = ""  # ip:port; "" while there is none
    state: str  # connecting, established, half-closed; SCTP: closing; of a UDP flow: unanswered, answered
    age: float  # seconds
    bytes_in: int = 0
    bytes_out: int = 0
    streams_in: int = 0  # SCTP: from client to endpoint
    streams_out: int = 0  # SCTP: from endpoint to client
    client_path: str = ""  # SCTP: the client's address in use
    endpoint_path: str = ""  # SCTP: the endpoint's address in use
    worker: int = 0  # its process

    @property
    def service(self) -> str:
        """The service port: namespace/name:port."""
        return f"{self.namespace}/{self.name}" + (f":{self.port}" if self.port else "")


class ConnectionsView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Connections that are alive, at most as many as were asked for."""

    items: tuple[ConnectionView, ...] = ()
    more: int = 0  # that are not among the items
    silent_workers: tuple[int, ...] = ()  # processes that did not answer in time: theirs are missing


class FailureView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One kind of failure of a Service."""

    time: float  # of the last one, Unix
    first: float  # of the first one that is remembered
    port: str = ""  # the service port's name
    endpoint: str = ""  # ip:port; "" where no single one is to blame
    why: str
    count: int


class EventView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Something that became of a Service's listeners."""

    time: float  # Unix
    what: str


class ServiceDescription(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Everything about one Service."""

    service: ServiceView
    created: str = ""  # RFC 3339
    selector: dict[str, str] = {}
    affinity_seconds: int = 0  # ClientIP affinity; 0 = none
    internal_traffic_policy: str = ""
    external_traffic_policy: str = ""  # "" where nothing comes from outside
    source_ranges: tuple[str, ...] = ()  # CIDRs that may connect from outside; () = all
    listeners: tuple[ListenerView, ...] = ()
    endpoints: tuple[EndpointView, ...] = ()
    failures: tuple[FailureView, ...] = ()  # the latest first
    events: tuple[EventView, ...] = ()  # the latest first


class Refusal(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Why a request is not answered."""

    error: str  # for people
    reason: str = ""  # NO_SUCH_PATH, or ""


class VersionView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The program that runs."""

    version: str
    python: str
    pid: int


class ReloadView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What was found when everything was read again."""

    files: int
    services: int
    problems: tuple[Problem, ...] = ()
    configuration: tuple[
        str, ...
    ] = ()  # what is wrong with the configuration file; the earlier one is in force


class DrainView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A daemon that is stopping."""

    phase: str
    timeout_seconds: float
    connections: int


class UpgradeView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A daemon that makes way for the program that is installed now. The next one has another `started`."""

    pid: int
    version: str  # of the program that makes way
    started: float  # Unix time; as in StatusView


class LogLevelView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What is logged: this level and all above it."""

    level: str  # debug, info, warning, error
