"""The picture of the daemon, from which the admin API's answers are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from proxyd.api.discovery import EndpointSlice
from proxyd.api.meta import ObjectName
from proxyd.api.problems import Problem
from proxyd.api.service import Service, ServiceType
from proxyd.control.admin.schema import Counters, PortView, ServiceView, WorkerFacts
from proxyd.control.feeds.facts import SourceFacts
from proxyd.state.snapshot import Snapshot
from proxyd.state.spec import BalancerKey, BalancerSpec, Endpoint, ListenerStatus, ServicePortName


def _nothing(*_: object) -> Counters:
    return Counters()


class ServiceViews:
    """What is shown of Services without traffic and state, remembered while their objects stay the same."""

    def __init__(self) -> None:
        self._known: dict[ObjectName, tuple[Service, object, ServiceView]] = {}

    def of(self, owner: ObjectName, service: Service, slices: tuple[EndpointSlice, ...]) -> ServiceView:
        """A Service without its counters and its state."""
        known = self._known.get(owner)
        if known is not None and known[0] is service and known[1] is slices:
            return known[2]
        view = _view(service, slices)
        self._known[owner] = (service, slices, view)
        return view

    def forget(self, services: Mapping[ObjectName, Service]) -> None:
        """Forget the Services that are not among these."""
        if len(self._known) > len(services):
            self._known = {key: known for key, known in self._known.items() if key in services}


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon at one moment: all that views are made of."""

    snapshot: Snapshot = Snapshot()
    statuses: tuple[ListenerStatus, ...] = ()  # of every listener that is wanted, served or not
    balancers: Mapping[BalancerKey, BalancerSpec] = {}
    problems: tuple[Problem, ...] = ()
    counters: Callable[[ServicePortName], Counters] = _nothing
    endpoint_counters: Callable[[ServicePortName, Endpoint], Counters] = _nothing
    version: str = ""
    pid: int = 0
    phase: str = "starting"  # starting, serving, draining
    started: float = 0.0  # Unix time
    generation: int = 0
    workers: tuple[WorkerFacts, ...] = ()
    sources: tuple[SourceFacts, ...] = ()
    old_workers: tuple[int, ...] = ()  # workers of earlier programs
    vip_listen: tuple[str, str] = ("", "")  # how listeners of VIPs are opened, and why so
    service_views: ServiceViews = msgspec.field(default_factory=ServiceViews)


def _view(service: Service, slices: tuple[EndpointSlice, ...]) -> ServiceView:
    spec = service.spec
    owner = service.metadata.key
    alias = spec.type is ServiceType.EXTERNAL_NAME
    ready, present = (0, 0) if alias else _count_endpoints(service, slices)
    return ServiceView(
        namespace=owner.namespace,
        name=owner.name,
        labels=service.metadata.labels,
        type=str(spec.type),
        cluster_ips=("None",) if spec.headless else () if alias else spec.all_cluster_ips,
        external_ips=_external_ips(service),
        external_name=spec.external_name if alias else "",
        ports=tuple(
            PortView(
                name=port.name,
                port=port.port,
                protocol=str(port.protocol),
                target_port=port.target,
                node_port=port.node_port,
            )
            for port in spec.ports
        ),
        endpoints_ready=ready,
        endpoints_total=present,
    )


def _external_ips(service: Service) -> tuple[str, ...]:
    ingress = service.status.load_balancer.ingress
    return tuple(dict.fromkeys([*service.spec.external_ips, *(item.ip for item in ingress if item.ip)]))


def _count_endpoints(service: Service, slices: tuple[EndpointSlice, ...]) -> tuple[int, int]:
    """How many endpoint addresses are ready, and how many there are."""
    ips = service.spec.all_cluster_ips
    first = 6 if ips and ":" in ips[0] else 4
    wanted = {(port.name, port.protocol) for port in service.spec.ports}
    ready: set[str] = set()
    found: set[str] = set()
    for family in (f"IPv{first}", f"IPv{10 - first}"):
        for one in slices:
            # A headless Service may have no ports; then its slices have none that could match.
            if one.address_type != family or (
                wanted and not any((p.name, p.protocol) in wanted and p.port is not None for p in one.ports)
            ):
                continue
            for item in one.endpoints:
                if item.addresses:
                    found.add(item.addresses[0])
                    if item.conditions.ready is not False:
                        ready.add(item.addresses[0])
        if found:
            break
    return len(ready), len(found)
