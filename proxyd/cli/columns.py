"""The resources that `proxyd get` shows: how each is read from the daemon, and its columns in a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from proxyd.cli.tables import NONE, Status, size
from proxyd.control.admin.schema import (
    ConnectionView,
    Counters,
    EndpointView,
    ListenerView,
    PortView,
    ServiceView,
)
from proxyd.control.config.durations import format_duration

Cells = list[object]


class Resource(NamedTuple):
    """One kind of item that `proxyd get` shows."""

    kind: type[Any]  # what an item is decoded as
    singular: str  # for "NAME: not found"
    key: Callable[[Any], tuple[object, ...]]  # identifies an item from one answer to the next
    name: Callable[[Any], str]  # for -o name
    without_counters: Callable[[Any], Any]  # the item without what traffic changes
    headings: Callable[[Sequence[Any], bool], list[str]]  # given all items, and whether -o wide was given
    cells: Callable[[Any, list[str]], Cells]  # of one item, under these headings


def _services_headings(_items: Sequence[ServiceView], wide: bool) -> list[str]:
    headings = ["NAMESPACE", "NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "ENDPOINTS", "CONNS"]
    return [*headings, *(["TOTAL", "FAILED", "IN", "OUT"] if wide else []), "STATUS"]


def _service(item: ServiceView, headings: list[str]) -> Cells:
    endless = item.type == "ExternalName"
    cells: Cells = [
        item.namespace,
        item.name,
        item.type,
        ",".join(item.cluster_ips) or NONE,
        item.external_name or ",".join(item.external_ips) or NONE,
        ",".join(map(port_text, item.ports)) or NONE,
        "-" if endless else f"{item.endpoints_ready}/{item.endpoints_total}",
        "-" if endless else item.connections,
    ]
    if "TOTAL" in headings:
        counters = item.counters
        cells += [counters.opened, counters.failed, size(counters.bytes_in), size(counters.bytes_out)]
    return [*cells, Status(item.state, item.status)]


def _endpoints_headings(_items: Sequence[EndpointView], wide: bool) -> list[str]:
    headings = ["NAMESPACE", "NAME", "PORT", "ENDPOINT", "READY", "SERVING", "TERMINATING"]
    return [*headings, "CONNS", "TOTAL", "FAILED", *(["USED", "IN", "OUT", "NODE"] if wide else [])]


def _endpoint(item: EndpointView, headings: list[str]) -> Cells:
    counters = item.counters
    cells: Cells = [
        item.namespace,
        item.name,
        f"{item.port}/{item.protocol}" if item.port else item.protocol,
        item.address,
        yes(item.ready),
        yes(item.serving),
        yes(item.terminating),
        counters.active,
        counters.opened,
        counters.failed,
    ]
    if "USED" in headings:
        cells += [yes(item.used), size(counters.bytes_in), size(counters.bytes_out), item.node or NONE]
    return cells


def _listeners_headings(items: Sequence[ListenerView], wide: bool) -> list[str]:
    # The column FOR appears where an address is served in place of another.
    mapped = wide or any(item.mapped_from for item in items)
    return ["ADDRESS", "PORT", "PROTOCOL", "ROLE", *(["FOR"] if mapped else []), "SERVICE", "STATUS"]


def _listener(item: ListenerView, headings: list[str]) -> Cells:
    mapped = [item.mapped_from or NONE] if "FOR" in headings else []
    status = Status(item.state, item.status)
    return [item.address, item.port, item.protocol, item.role, *mapped, item.service, status]


def _connections_headings(items: Sequence[ConnectionView], wide: bool) -> list[str]:
    headings = ["SERVICE", "CLIENT", "FRONTEND", "ENDPOINT", "PROTOCOL", "AGE", "IN", "OUT", "STATE"]
    # These columns appear where there is SCTP.
    streams = ["STREAMS", "PATHS"] if wide and any(item.protocol == "SCTP" for item in items) else []
    return [*headings, *streams, *(["WORKER"] if wide else [])]


def _connection(item: ConnectionView, headings: list[str]) -> Cells:
    return [
        item.service,
        item.client,
        item.frontend,
        item.endpoint or NONE,
        item.protocol,
        format_duration(item.age),
        size(item.bytes_in),
        size(item.bytes_out),
        item.state,
        *([_streams(item), _paths(item)] if "STREAMS" in headings else []),
        *([item.worker] if "WORKER" in headings else []),
    ]


def _streams(item: ConnectionView) -> str:
    return f"{item.streams_in}/{item.streams_out}" if item.streams_in else NONE


def _paths(item: ConnectionView) -> str:
    """The addresses that both ends use at the moment."""
    if not item.client_path:
        return NONE
    return f"{item.client_path},{item.endpoint_path or NONE}"


RESOURCES = {
    "services": Resource(
        ServiceView,
        "service",
        lambda item: (item.namespace, item.name),
        lambda item: f"{item.namespace}/{item.name}",
        lambda item: msgspec.structs.replace(item, counters=Counters(), connections=0),
        _services_headings,
        _service,
    ),
    "endpoints": Resource(
        EndpointView,
        "endpoints of service",
        lambda item: (item.namespace, item.name, item.port, item.protocol, item.address),
        lambda item: item.address,
        lambda item: msgspec.structs.replace(item, counters=Counters()),
        _endpoints_headings,
        _endpoint,
    ),
    "listeners": Resource(
        ListenerView,
        "listeners of service",
        lambda item: (item.address, item.port, item.protocol, item.service),
        lambda item: f"{address(item)}/{item.protocol}",
        lambda item: item,
        _listeners_headings,
        _listener,
    ),
    "connections": Resource(
        ConnectionView,
        "connections of service",
        lambda item: (item.protocol, item.client, item.frontend),
        lambda item: item.client,
        lambda item: msgspec.structs.replace(item, age=0.0, bytes_in=0, bytes_out=0),
        _connections_headings,
        _connection,
    ),
}


def address(item: ListenerView) -> str:
    """IP and port of a listener, an IPv6 address in brackets."""
    return f"[{item.address}]:{item.port}" if ":" in item.address else f"{item.address}:{item.port}"


def port_text(port: PortView) -> str:
    """A port of a Service: 80/TCP, with its NodePort 80:30080/TCP."""
    node = f":{port.node_port}" if port.node_port else ""
    return f"{port.port}{node}/{port.protocol}"


def yes(value: bool) -> str:
    """A truth value in a cell: yes or no."""
    return "yes" if value else "no"
