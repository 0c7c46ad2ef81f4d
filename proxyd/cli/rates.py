"""The rates that `proxyd top` shows, computed from two samples of the daemon's counters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from proxyd.cli.tables import size
from proxyd.control.admin.schema import Counters, EndpointView, ServiceView


class Row(NamedTuple):
    """One Service, or one endpoint of a service port."""

    name: str
    endpoint: str  # "" for a Service
    connections: int  # alive
    rate: float  # new connections a second
    bytes_in: float  # a second
    bytes_out: float  # a second
    failed: float  # a second: clients of a Service without endpoint or refused, attempts of an endpoint
    failed_total: int  # since the daemon started
    state: str = ""  # of a Service
    status: str = ""  # the same with the reason


SORTS: dict[str, Callable[[Row], tuple[object, ...]]] = {
    "rate": lambda row: (-row.rate, -row.connections, row.name, row.endpoint),
    "connections": lambda row: (-row.connections, -row.rate, row.name, row.endpoint),
    "in": lambda row: (-row.bytes_in, row.name, row.endpoint),
    "out": lambda row: (-row.bytes_out, row.name, row.endpoint),
    "failures": lambda row: (-row.failed, -row.failed_total, row.name, row.endpoint),
    "name": lambda row: (row.name, row.endpoint),
}


class Sample(NamedTuple):
    """What the daemon answered at one moment."""

    time: float  # seconds, monotonic
    services: Sequence[ServiceView]
    endpoints: Sequence[EndpointView]


def service_rows(before: Sample, after: Sample, sort: str) -> list[Row]:
    """A row for every Service, in the order of `sort`."""
    seconds = max(0.001, after.time - before.time)
    earlier = {(item.namespace, item.name): item.counters for item in before.services}
    rows = [
        _row(
            f"{item.namespace}/{item.name}",
            "",
            earlier.get((item.namespace, item.name)),
            item.counters,
            seconds,
            state=item.state,
            status=item.status,
        )
        for item in after.services
    ]
    return sorted(rows, key=SORTS[sort])


def endpoint_rows(before: Sample, after: Sample, sort: str) -> list[Row]:
    """A row for every endpoint of every service port, in the order of `sort`."""
    seconds = max(0.001, after.time - before.time)

    def key(item: EndpointView) -> tuple[str, ...]:
        return item.namespace, item.name, item.port, item.protocol, item.address

    earlier = {key(item): item.counters for item in before.endpoints}
    rows = [
        _row(
            f"{item.namespace}/{item.name}" + (f":{item.port}" if item.port else ""),
            item.address,
            earlier.get(key(item)),
            item.counters,
            seconds,
        )
        for item in after.endpoints
    ]
    return sorted(rows, key=SORTS[sort])


def _row(
    name: str,
    endpoint: str,
    before: Counters | None,
    after: Counters,
    seconds: float,
    *,
    state: str = "",
    status: str = "",
) -> Row:
    earlier = before or after

    def rate(now: int, then: int) -> float:
        # A counter that got smaller has started again at 0.
        return max(0, now - then) / seconds

    failed, failed_earlier = after.failed + after.refused, earlier.failed + earlier.refused
    return Row(
        name=name,
        endpoint=endpoint,
        connections=after.active,
        rate=rate(after.opened, earlier.opened),
        bytes_in=rate(after.bytes_in, earlier.bytes_in),
        bytes_out=rate(after.bytes_out, earlier.bytes_out),
        failed=rate(failed, failed_earlier),
        failed_total=failed,
        state=state,
        status=status,
    )


HEADINGS = ("CONNS", "CONN/S", "IN/S", "OUT/S", "FAIL/S", "FAILED")


def cells(row: Row) -> list[str]:
    """The figures of a row, under HEADINGS."""
    return [
        f"{row.connections:,}",
        f"{row.rate:,.1f}",
        size(row.bytes_in),
        size(row.bytes_out),
        f"{row.failed:,.1f}",
        f"{row.failed_total:,}",
    ]
