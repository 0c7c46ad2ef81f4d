"""A picture of a daemon, made by hand, for tests of what is shown of it."""

from __future__ import annotations

from collections.abc import Callable

from proxyd.api.discovery import EndpointConditions, EndpointPort, EndpointSlice, SliceEndpoint
from proxyd.api.meta import ObjectMeta, ObjectName
from proxyd.api.problems import Problem
from proxyd.api.service import Protocol, Service, ServicePort, ServiceSpec, ServiceType, TrafficPolicy
from proxyd.control.admin.history import History
from proxyd.control.admin.picture import Picture
from proxyd.control.admin.schema import (
    ConnectionsView,
    Counters,
    DrainView,
    ReloadView,
    UpgradeView,
    WorkerFacts,
)
from proxyd.control.feeds.facts import SourceFacts
from proxyd.state.snapshot import Snapshot
from proxyd.state.spec import (
    BalancerKey,
    BalancerSpec,
    Endpoint,
    ListenerKey,
    ListenerState,
    ListenerStatus,
    Role,
    ServicePortName,
)

TCP, UDP, SCTP = Protocol.TCP, Protocol.UDP, Protocol.SCTP


def port_name(name: str, port: str = "", protocol: Protocol = TCP) -> ServicePortName:
    namespace, _, name = name.partition("/")
    return ServicePortName(namespace, name, port, protocol)


def service(name: str, **spec) -> Service:
    namespace, _, name = name.partition("/")
    return Service(metadata=ObjectMeta(namespace=namespace, name=name), spec=ServiceSpec(**spec))


def slice_of(
    name: str, ports: list[tuple[str, int, Protocol]], *addresses: tuple[str, EndpointConditions]
) -> EndpointSlice:
    namespace, _, name = name.partition("/")
    return EndpointSlice(
        metadata=ObjectMeta(namespace=namespace, name=name),
        ports=tuple(EndpointPort(name=n, port=p, protocol=protocol) for n, p, protocol in ports),
        endpoints=tuple(SliceEndpoint(addresses=(ip,), conditions=c) for ip, c in addresses),
    )


def listener(
    address: str,
    owner: ServicePortName,
    state: ListenerState,
    detail: str = "",
    *,
    role: Role = Role.CLUSTER_IP,
    mapped_from: str = "",
) -> ListenerStatus:
    ip, _, port = address.rpartition(":")
    return ListenerStatus(
        key=ListenerKey(ip, int(port), owner.protocol),
        service_port=owner,
        role=role,
        state=state,
        detail=detail,
        mapped_from=mapped_from,
    )


READY = EndpointConditions()
NOT_READY = EndpointConditions(ready=False, serving=False)
ENDING = EndpointConditions(ready=False, serving=True, terminating=True)

WEB = port_name("prod/web")
DNS_UDP = port_name("prod/dns", "udp", UDP)
DNS_TCP = port_name("prod/dns", "tcp", TCP)
SIG = port_name("prod/sig", "diameter", SCTP)
LATE = port_name("test/late")


def picture(**changes) -> Picture:
    """Six Services: one that serves, one without endpoints, SCTP, in conflict, headless, and an alias."""
    services = [
        service(
            "prod/web",
            type=ServiceType.NODE_PORT,
            cluster_ip="10.0.0.10",
            ports=(ServicePort(port=80, node_port=30080, target_port=9376),),
        ),
        service(
            "prod/dns",
            cluster_ip="10.0.0.53",
            ports=(
                ServicePort(port=53, name="udp", protocol=UDP),
                ServicePort(port=53, name="tcp", protocol=TCP),
            ),
        ),
        service(
            "prod/sig",
            cluster_ip="10.0.0.77",
            ports=(ServicePort(port=3868, name="diameter", protocol=SCTP),),
        ),
        service(
            "test/late", cluster_ip="10.0.0.10", external_ips=("192.0.2.1",), ports=(ServicePort(port=80),)
        ),
        service("prod/db", cluster_ip="None", selector={"app": "db"}),
        service("prod/ext", type=ServiceType.EXTERNAL_NAME, external_name="my.database.example.com"),
    ]
    slices = [
        slice_of("prod/web", [("", 9376, TCP)], *((f"10.1.0.{n}", READY) for n in (3, 1, 2))),
        slice_of(
            "prod/dns", [("udp", 53, UDP), ("tcp", 53, TCP)], ("10.1.0.5", NOT_READY), ("10.1.0.6", ENDING)
        ),
        slice_of("prod/sig", [("diameter", 3868, SCTP)], ("10.1.0.7", READY), ("10.1.0.8", READY)),
        slice_of("prod/db", [], ("10.1.0.9", READY)),
    ]
    web = BalancerKey(WEB, TrafficPolicy.CLUSTER, 4)
    facts = {
        "snapshot": Snapshot(
            services={s.metadata.key: s for s in services}, slices={s.metadata.key: (s,) for s in slices}
        ),
        "statuses": (
            listener("10.0.0.10:80", WEB, ListenerState.SERVING),
            listener("192.168.0.2:30080", WEB, ListenerState.SERVING, role=Role.NODE_PORT),
            listener("10.0.0.53:53", DNS_UDP, ListenerState.NO_ENDPOINTS),
            listener("10.0.0.53:53", DNS_TCP, ListenerState.NO_ENDPOINTS),
            listener("10.0.0.77:3868", SIG, ListenerState.DISABLED, "SCTPSupport"),
            listener("10.0.0.10:80", LATE, ListenerState.CONFLICT, "10.0.0.10:80/TCP is held by prod/web"),
            listener("192.0.2.1:80", LATE, ListenerState.NO_ENDPOINTS, role=Role.EXTERNAL_IP),
        ),
        "balancers": {
            web: BalancerSpec(key=web, endpoints=tuple(Endpoint(f"10.1.0.{n}", 9376) for n in (1, 2, 3)))
        },
        "problems": (
            Problem(file="config/web.yaml", line=14, kind="Service", object="prod/bad", message="no ports"),
        ),
        "counters": lambda name: (
            Counters(opened=1328, closed=200, failed=1, bytes_in=5_000_000) if name == WEB else Counters()
        ),
        "endpoint_counters": lambda _, endpoint: Counters(opened=int(endpoint.ip[-1])),
        "version": "0.1.0",
        "pid": 812,
        "phase": "serving",
        "started": 1_000_000.0,
        "generation": 7,
        "workers": (WorkerFacts(pid=813, generation=7), WorkerFacts(pid=814, generation=7, restarts=1)),
        "sources": (SourceFacts(name="manifests config", synced=True, last_event=1_000_000.0),),
    }
    return Picture(**{**facts, **changes})


def key(name: str) -> ObjectName:
    namespace, _, name = name.partition("/")
    return ObjectName(namespace, name)


class Shown:
    """What an admin server shows, where nothing can be ordered.

    Args:
        draw: gives the picture at each moment.
    """

    def __init__(self, draw: Callable[[], Picture] = picture) -> None:
        self.history = History()
        self.picture = draw

    async def connections(self, **_asked: object) -> ConnectionsView:
        raise AssertionError("nobody asked for connections")

    async def reload(self) -> ReloadView:
        raise AssertionError("nobody ordered a reload")

    async def upgrade(self) -> UpgradeView:
        raise AssertionError("nobody ordered an upgrade")

    def drain(self, seconds: float | None) -> DrainView:
        raise AssertionError(f"nobody ordered the end, after {seconds} s")
