"""The text of the large metric families: the counters of every service port and every endpoint.

prometheus_client takes 1.7 s for 100,000 samples; here it is one join for each family, which takes 0.1 s. The
format is the same, Prometheus text 0.0.4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from proxyd.relay.ipc.slots import (
    ATTEMPTS,
    BYTES_IN,
    BYTES_OUT,
    CLOSED,
    CONNECT_US,
    DATAGRAMS_IN,
    DATAGRAMS_OUT,
    DROPPED,
    DROPPED_OVERRUN,
    DROPPED_TO_CLIENT,
    DROPPED_TO_ENDPOINT,
    EVICTED,
    FAILED,
    FIELDS,
    OPENED,
    REFUSED,
)
from proxyd.state.spec import Endpoint, ServicePortName

# Further service ports and endpoints have no series, and are only counted. A service port's own series has
# the sums of its endpoints.
MAX_SERVICE_PORTS = 20_000
MAX_ENDPOINTS = 10_000

OTHER = "other"
NOTHING = (0,) * FIELDS

# The counters of one row, in the order of proxyd.relay.ipc.slots.
Row = Sequence[int]


class Family(NamedTuple):
    """One metric: its name, type, meaning, and how its values are read from a row."""

    name: str
    kind: str
    text: str
    # For each line of a sample, the suffix of its name and its value. A suffix that ends with a comma, as
    # `reason="x",`, is a label before the others.
    values: tuple[tuple[str, Callable[[Row], float]], ...]


def _family(name: str, kind: str, text: str, value: Callable[[Row], float]) -> Family:
    return Family(name, kind, text, (("", value),))


def _active(row: Row) -> int:
    return max(0, row[OPENED] - row[CLOSED])


PORT_FAMILIES = (
    _family("proxyd_connections_total", "counter", "Connections accepted.", lambda row: row[OPENED]),
    _family("proxyd_connections_active", "gauge", "Connections that are open.", _active),
    _family(
        "proxyd_connections_refused_total",
        "counter",
        "Connections turned away: by source range, or for want of an endpoint.",
        lambda row: row[REFUSED],
    ),
    _family(
        "proxyd_connections_failed_total",
        "counter",
        "Connections for which no endpoint could be reached.",
        lambda row: row[FAILED],
    ),
    _family(
        "proxyd_dial_attempts_total", "counter", "Attempts to connect to an endpoint.", lambda r: r[ATTEMPTS]
    ),
    _family(
        "proxyd_received_bytes_total",
        "counter",
        "Bytes relayed from clients to endpoints.",
        lambda r: r[BYTES_IN],
    ),
    _family(
        "proxyd_sent_bytes_total",
        "counter",
        "Bytes relayed from endpoints to clients.",
        lambda r: r[BYTES_OUT],
    ),
)

# Of UDP ports only. Their connections, in the families above, are flows.
UDP_FAMILIES = (
    _family(
        "proxyd_received_datagrams_total",
        "counter",
        "Datagrams relayed from clients to endpoints.",
        lambda r: r[DATAGRAMS_IN],
    ),
    _family(
        "proxyd_sent_datagrams_total",
        "counter",
        "Datagrams relayed from endpoints to clients.",
        lambda r: r[DATAGRAMS_OUT],
    ),
    _family(
        "proxyd_flows_evicted_total", "counter", "Flows ended to make room for others.", lambda r: r[EVICTED]
    ),
    Family(
        "proxyd_datagrams_dropped_total",
        "counter",
        "Datagrams that were not relayed, by reason.",
        (
            ('reason="refused",', lambda r: r[REFUSED]),
            ('reason="no_endpoint",', lambda r: r[FAILED]),
            ('reason="shortage",', lambda r: r[DROPPED]),
            ('reason="to_endpoint",', lambda r: r[DROPPED_TO_ENDPOINT]),
            ('reason="to_client",', lambda r: r[DROPPED_TO_CLIENT]),
            ('reason="overrun",', lambda r: r[DROPPED_OVERRUN]),
        ),
    ),
)

# Of SCTP ports only. Their connections, in the families above, are associations.
SCTP_FAMILIES = (
    _family(
        "proxyd_received_messages_total",
        "counter",
        "Messages relayed from clients to endpoints.",
        lambda r: r[DATAGRAMS_IN],
    ),
    _family(
        "proxyd_sent_messages_total",
        "counter",
        "Messages relayed from endpoints to clients.",
        lambda r: r[DATAGRAMS_OUT],
    ),
    Family(
        "proxyd_messages_dropped_total",
        "counter",
        "Messages that were not relayed, by where they were to go.",
        (
            ('reason="to_endpoint",', lambda r: r[DROPPED_TO_ENDPOINT]),
            ('reason="to_client",', lambda r: r[DROPPED_TO_CLIENT]),
        ),
    ),
)

ENDPOINT_FAMILIES = (
    _family(
        "proxyd_endpoint_connections_total",
        "counter",
        "Connections made to the endpoint.",
        lambda row: row[OPENED],
    ),
    _family(
        "proxyd_endpoint_connections_active", "gauge", "Connections to the endpoint that are open.", _active
    ),
    _family(
        "proxyd_endpoint_dial_attempts_total",
        "counter",
        "Attempts to connect to the endpoint.",
        lambda r: r[ATTEMPTS],
    ),
    _family(
        "proxyd_endpoint_dial_failures_total",
        "counter",
        "Attempts to connect to the endpoint that failed or took too long.",
        lambda row: row[FAILED],
    ),
    _family(
        "proxyd_endpoint_received_bytes_total",
        "counter",
        "Bytes relayed to the endpoint.",
        lambda r: r[BYTES_IN],
    ),
    _family(
        "proxyd_endpoint_sent_bytes_total",
        "counter",
        "Bytes relayed from the endpoint.",
        lambda r: r[BYTES_OUT],
    ),
    # A summary without quantiles.
    Family(
        "proxyd_endpoint_connect_seconds",
        "summary",
        "Time from the attempt to the connection.",
        (("_sum", lambda row: row[CONNECT_US] / 1e6), ("_count", lambda row: row[OPENED])),
    ),
)


def escape(value: str) -> str:
    """A label's value, escaped."""
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def port_labels(port: ServicePortName) -> str:
    """The labels of a service port. `port` is its name, "" where it has none."""
    return (
        f'namespace="{escape(port.namespace)}",service="{escape(port.name)}",'
        f'port="{escape(port.port)}",protocol="{port.protocol}"'
    )


def endpoint_labels(port: str, endpoint: Endpoint) -> str:
    """The labels of an endpoint, after those of its service port."""
    return f'{port},endpoint="{endpoint}"'


def add(rows: Sequence[Row]) -> Row:
    """The sum of rows."""
    return rows[0] if len(rows) == 1 else tuple(map(sum, zip(*rows, strict=True))) if rows else NOTHING


def _opening(name: str, suffix: str) -> str:
    """The beginning of a line, up to the labels."""
    return f"{name}{{{suffix}" if suffix.endswith(",") else f"{name}{suffix}{{"


_AT_ONCE = 2000  # samples that are texts before they become bytes


class Table:
    """Families that have the same samples. Texts soon become bytes, which take a quarter of the memory."""

    def __init__(self, families: Sequence[Family]) -> None:
        self._chunks: list[list[bytes]] = [[] for _ in families]
        self._waiting = 0
        self._lines = [[f"# HELP {f.name} {f.text}\n# TYPE {f.name} {f.kind}\n"] for f in families]
        # An entry for each line of a sample: a summary has two.
        self._columns = [
            (lines.append, _opening(family.name, suffix), value)
            for family, lines in zip(families, self._lines, strict=True)
            for suffix, value in family.values
        ]

    def add(self, labels: str, row: Row) -> None:
        """One sample of each family."""
        for append, name, value in self._columns:
            append(f"{name}{labels}}} {value(row)}\n")
        self._waiting += 1
        if self._waiting >= _AT_ONCE:
            self._flush()

    def chunks(self) -> list[bytes]:
        """The text, in parts."""
        self._flush()
        return [chunk for chunks in self._chunks for chunk in chunks]

    def _flush(self) -> None:
        self._waiting = 0
        for lines, chunks in zip(self._lines, self._chunks, strict=True):
            chunks.append("".join(lines).encode())
            lines.clear()


class Chosen:
    """Chooses which of too many service ports are listed, and keeps its choice: series do not come and go."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: dict[ServicePortName, None] = {}

    def choose(self, sizes: dict[ServicePortName, int]) -> frozenset[ServicePortName]:
        """Service ports whose sizes add up to at most the limit: those chosen before, then others by name."""
        left = self._limit
        kept: dict[ServicePortName, None] = {}
        before = [port for port in self._kept if port in sizes]
        for port in (*before, *sorted(sizes.keys() - self._kept.keys())):
            if sizes[port] <= left:
                left -= sizes[port]
                kept[port] = None
        self._kept = kept
        return frozenset(kept)
