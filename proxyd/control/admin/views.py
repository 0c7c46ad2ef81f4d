"""What the admin API says, as pure functions from a picture of the daemon to its answers."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Iterator

import msgspec

from proxyd.api.meta import ObjectName
from proxyd.api.service import Service, ServicePort, ServiceType
from proxyd.control.admin.picture import Picture
from proxyd.control.admin.schema import (
    ALIAS,
    HEADLESS,
    NOT_SERVED,
    EndpointView,
    ListenerView,
    ServiceView,
    StatusView,
    total,
)
from proxyd.control.admin.selector import Selector
from proxyd.state.endpoints import Candidate, candidates
from proxyd.state.spec import (
    Endpoint,
    ListenerState,
    ListenerStatus,
    ServicePortName,
)

# Of several listeners the worst one speaks for the Service.
WORST_FIRST = (
    ListenerState.FAILED,
    ListenerState.CONFLICT,
    ListenerState.DISABLED,
    ListenerState.NO_ENDPOINTS,
    ListenerState.SERVING,
)


def services(
    picture: Picture, *, namespace: str = "", name: str = "", selector: Selector | None = None
) -> list[ServiceView]:
    """Every Service in order of namespace and name, or those of one namespace or name."""
    statuses: dict[ObjectName, list[ListenerStatus]] = {}
    for status in picture.statuses:
        owner = ObjectName(status.service_port.namespace, status.service_port.name)
        statuses.setdefault(owner, []).append(status)
    picture.service_views.forget(picture.snapshot.services)
    return [
        _service(picture, key, service, statuses.get(key, []))
        for key, service in _chosen(picture, namespace, name, selector)
    ]


def endpoints(
    picture: Picture, *, namespace: str = "", name: str = "", selector: Selector | None = None
) -> list[EndpointView]:
    """Every endpoint of every service port, IPv4 first, then by address."""
    used: dict[ServicePortName, set[Endpoint]] = {}
    for key, balancer in picture.balancers.items():
        used.setdefault(key.service_port, set()).update(balancer.endpoints)
    found = []
    for owner, service in _chosen(picture, namespace, name, selector):
        slices = picture.snapshot.slices.get(owner, ())
        for port in service.spec.ports:
            service_port = _name_of(owner, port)
            for family in (4, 6):
                found += [
                    _endpoint(picture, service_port, candidate, used.get(service_port, set()))
                    for candidate in candidates(port, slices, family)
                ]
    return found


def listeners(
    picture: Picture, *, namespace: str = "", name: str = "", selector: Selector | None = None
) -> list[ListenerView]:
    """Every listener that is wanted, by address, port and protocol; none while the daemon drains."""
    if picture.phase == "draining":
        return []
    admitted = chosen(picture, selector) if selector else None
    found = [
        _listener(status)
        for status in picture.statuses
        if (not namespace or status.service_port.namespace == namespace)
        and (not name or status.service_port.name == name)
        and (
            admitted is None
            or ObjectName(status.service_port.namespace, status.service_port.name) in admitted
        )
    ]
    return sorted(found, key=_listener_order)


def status(picture: Picture, *, now: float) -> StatusView:
    """The daemon as a whole, at a Unix time."""
    ports = {status.service_port for status in picture.statuses}
    counters = total(picture.counters(port) for port in ports)
    failing = [
        _listener(status)
        for status in picture.statuses
        if status.state in {ListenerState.FAILED, ListenerState.CONFLICT}
    ]
    return StatusView(
        version=picture.version,
        phase=picture.phase,
        pid=picture.pid,
        started=picture.started,
        uptime=max(0.0, now - picture.started),
        generation=picture.generation,
        workers=picture.workers,
        sources=picture.sources,
        services=len(picture.snapshot.services),
        listeners={} if picture.phase == "draining" else _states(picture.statuses),
        endpoints=len({endpoint for b in picture.balancers.values() for endpoint in b.endpoints}),
        connections=counters.active,
        counters=counters,
        failing=tuple(sorted(failing, key=_listener_order)),
        problems=picture.problems,
        leaving_workers=picture.old_workers,
        vip_listen=picture.vip_listen[0],
        vip_listen_reason=picture.vip_listen[1],
    )


def chosen(picture: Picture, selector: Selector) -> set[ObjectName]:
    """The Services whose labels a selector admits."""
    return {
        key for key, service in picture.snapshot.services.items() if selector.admits(service.metadata.labels)
    }


def _chosen(
    picture: Picture, namespace: str, name: str, selector: Selector | None
) -> Iterator[tuple[ObjectName, Service]]:
    if namespace and name:
        one = ObjectName(namespace, name)
        keys = [one] if one in picture.snapshot.services else []
    else:
        keys = sorted(picture.snapshot.services)
    for key in keys:
        if (not namespace or key.namespace == namespace) and (not name or key.name == name):
            service = picture.snapshot.services[key]
            if not selector or selector.admits(service.metadata.labels):
                yield key, service


def _name_of(owner: ObjectName, port: ServicePort) -> ServicePortName:
    return ServicePortName(owner.namespace, owner.name, port.name, port.protocol)


def _states(statuses: Iterable[ListenerStatus]) -> dict[str, int]:
    counts = Counter(status.state for status in statuses)
    return {state.value: counts[state] for state in WORST_FIRST if state in counts}


def _service(
    picture: Picture, owner: ObjectName, service: Service, statuses: list[ListenerStatus]
) -> ServiceView:
    counters = total(picture.counters(_name_of(owner, port)) for port in service.spec.ports)
    state, detail = _summary(service, statuses)
    return msgspec.structs.replace(
        picture.service_views.of(owner, service, picture.snapshot.slices.get(owner, ())),
        connections=counters.active,
        counters=counters,
        state=state,
        detail=detail,
        listeners=_states(statuses),
    )


def _summary(service: Service, statuses: list[ListenerStatus]) -> tuple[str, str]:
    """State and detail of a Service: the worst listener's."""
    if service.spec.type is ServiceType.EXTERNAL_NAME:
        return ALIAS, ""
    if not statuses:
        return (HEADLESS if service.spec.headless else NOT_SERVED), ""
    if all(status.state is ListenerState.SERVING for status in statuses):
        return ListenerState.SERVING.value, ""
    worst = min(statuses, key=lambda status: (WORST_FIRST.index(status.state), status.key))
    return str(worst.state), worst.detail


def _endpoint(
    picture: Picture, service_port: ServicePortName, candidate: Candidate, used: set[Endpoint]
) -> EndpointView:
    return EndpointView(
        namespace=service_port.namespace,
        name=service_port.name,
        port=service_port.port,
        protocol=str(service_port.protocol),
        address=str(candidate.endpoint),
        ready=candidate.ready,
        serving=candidate.serving,
        terminating=candidate.terminating,
        used=candidate.endpoint in used,
        node=candidate.node,
        counters=picture.endpoint_counters(service_port, candidate.endpoint),
    )


def _listener(status: ListenerStatus) -> ListenerView:
    service_port = status.service_port
    return ListenerView(
        address=status.key.ip,
        port=status.key.port,
        protocol=str(status.key.protocol),
        role=str(status.role),
        namespace=service_port.namespace,
        name=service_port.name,
        port_name=service_port.port,
        state=str(status.state),
        detail=status.detail,
        mapped_from=status.mapped_from,
    )


def _listener_order(view: ListenerView) -> tuple[bool, bytes, int, str, str]:
    six = ":" in view.address
    packed = socket.inet_pton(socket.AF_INET6 if six else socket.AF_INET, view.address)
    return six, packed, view.port, view.protocol, view.service
