"""The text of the big metric families: what every service port and every endpoint counted.

Written here rather than by prometheus_client: 100,000 samples take it 1.7 s, and 0.1 s as one join for each family. The
format is the same, Prometheus text 0.0.4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import starmap
from typing import NamedTuple

from proxyd.relay.slots import (
    ATTEMPTS,
    BYTES_IN,
    BYTES_OUT,
    CLOSED,
    CONNECT_US,
    FAILED,
    FIELDS,
    OPENED,
    REFUSED,
)
from proxyd.state.spec import Endpoint, ServicePortName

MAX_SERVICE_PORTS = 20_000  # further ones are one series of each family
MAX_ENDPOINTS = 10_000  # the endpoints of further service ports are one series for each port

OTHER = "other"
NOTHING = (0,) * FIELDS

# The counters of one row, in the order of proxyd.relay.slots.
Row = Sequence[int]


class Family(NamedTuple):
    """One metric: its name, type, meaning, and how it is read from a row."""

    name: str
    kind: str
    text: str
    value: Callable[[Row], float]


def _active(row: Row) -> int:
    return max(0, row[OPENED] - row[CLOSED])


PORT_FAMILIES = (
    Family("proxyd_connections_total", "counter", "Connections accepted.", lambda row: row[OPENED]),
    Family("proxyd_connections_active", "gauge", "Connections that are open.", _active),
    Family(
        "proxyd_connections_refused_total",
        "counter",
        "Connections turned away: by source range, or for want of an endpoint.",
        lambda row: row[REFUSED],
    ),
    Family(
        "proxyd_connections_failed_total",
        "counter",
        "Connections for which no endpoint could be reached.",
        lambda row: row[FAILED],
    ),
    Family(
        "proxyd_dial_attempts_total", "counter", "Attempts to connect to an endpoint.", lambda r: r[ATTEMPTS]
    ),
    Family(
        "proxyd_received_bytes_total",
        "counter",
        "Bytes relayed from clients to endpoints.",
        lambda r: r[BYTES_IN],
    ),
    Family(
        "proxyd_sent_bytes_total",
        "counter",
        "Bytes relayed from endpoints to clients.",
        lambda r: r[BYTES_OUT],
    ),
)

ENDPOINT_FAMILIES = (
    Family(
        "proxyd_endpoint_connections_total",
        "counter",
        "Connections made to the endpoint.",
        lambda row: row[OPENED],
    ),
    Family(
        "proxyd_endpoint_connections_active", "gauge", "Connections to the endpoint that are open.", _active
    ),
    Family(
        "proxyd_endpoint_dial_attempts_total",
        "counter",
        "Attempts to connect to the endpoint.",
        lambda r: r[ATTEMPTS],
    ),
    Family(
        "proxyd_endpoint_dial_failures_total",
        "counter",
        "Attempts to connect to the endpoint that failed or took too long.",
        lambda row: row[FAILED],
    ),
    Family(
        "proxyd_endpoint_received_bytes_total",
        "counter",
        "Bytes relayed to the endpoint.",
        lambda r: r[BYTES_IN],
    ),
    Family(
        "proxyd_endpoint_sent_bytes_total",
        "counter",
        "Bytes relayed from the endpoint.",
        lambda r: r[BYTES_OUT],
    ),
)
CONNECT_SECONDS = "proxyd_endpoint_connect_seconds"  # a summary without quantiles: sum and count


def escape(value: str) -> str:
    """A label's value."""
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def port_labels(port: ServicePortName) -> str:
    """The labels of a service port. `port` is its name, "" where it has none."""
    return (
        f'namespace="{escape(port.namespace)}",service="{escape(port.name)}",'
        f'port="{escape(port.port)}",protocol="{port.protocol}"'
    )


OTHER_PORTS = f'namespace="",service="{OTHER}",port="",protocol=""'


def endpoint_labels(port: str, endpoint: Endpoint | None) -> str:
    """The labels of an endpoint; None: of all that are not listed one by one."""
    return f'{port},endpoint="{endpoint or OTHER}"'


def add(rows: Sequence[Row]) -> Row:
    """Rows added up."""
    if len(rows) == 1:
        return rows[0]
    return tuple(map(sum, zip(*rows, strict=True))) if rows else NOTHING


def tables(ports: Sequence[tuple[str, Row]], endpoints: Sequence[tuple[str, Row]] | None) -> str:
    """The text of all families: (labels, row) of each service port and, unless None, of each endpoint."""
    parts = [_table(family, ports) for family in PORT_FAMILIES]
    if endpoints is not None:
        parts += [_table(family, endpoints) for family in ENDPOINT_FAMILIES]
        parts.append(_connect_seconds(endpoints))
    return "".join(parts)


def _table(family: Family, samples: Sequence[tuple[str, Row]]) -> str:
    name, value = family.name, family.value
    lines = [f"{name}{{{labels}}} {value(row)}\n" for labels, row in samples]
    return "".join([f"# HELP {name} {family.text}\n# TYPE {name} {family.kind}\n", *lines])


def _connect_seconds(samples: Sequence[tuple[str, Row]]) -> str:
    name = CONNECT_SECONDS

    def pair(labels: str, row: Row) -> str:
        return f"{name}_sum{{{labels}}} {row[CONNECT_US] / 1e6}\n{name}_count{{{labels}}} {row[OPENED]}\n"

    head = f"# HELP {name} Time from the attempt to the connection.\n# TYPE {name} summary\n"
    return "".join([head, *starmap(pair, samples)])


class Chosen:
    """Which service ports have their endpoints listed one by one; the choice is kept, so that series do not flap."""

    def __init__(self, limit: int = MAX_ENDPOINTS) -> None:
        self._limit = limit
        self._kept: dict[ServicePortName, None] = {}

    def choose(self, counts: dict[ServicePortName, int]) -> frozenset[ServicePortName]:
        """Of service ports and how many endpoints each has."""
        left = self._limit
        kept: dict[ServicePortName, None] = {}
        for port in (
            *(port for port in self._kept if port in counts),
            *sorted(counts.keys() - self._kept.keys()),
        ):
            if counts[port] <= left:
                left -= counts[port]
                kept[port] = None
        self._kept = kept
        return frozenset(kept)
