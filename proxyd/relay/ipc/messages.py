"""What control and a worker say to each other: msgpack over a Unix SOCK_SEQPACKET pair, one message a packet.

Descriptors travel as SCM_RIGHTS beside the message that names them, in the order of its `listeners`.
"""

from __future__ import annotations

import msgspec

# A packet carries at most this many descriptors; the kernel's SCM_MAX_FD is 253.
MAX_DESCRIPTORS = 200
# And this many bytes, well below the default socket buffer of 212,992.
MAX_BYTES = 128 * 1024


def address_text(ip: str, port: int) -> str:
    """An address as messages have it: ip:port, [ip]:port of IPv6."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


class BalancerConfig(msgspec.Struct, frozen=True, array_like=True):
    """One balancer. `id` is its round-robin slot and counter slot; one beyond the slots has the spare one."""

    id: int
    name: str  # of the service port, for logs and connection records
    endpoints: list[tuple[str, int, int]]  # ip, port, counter slot
    affinity_seconds: int = 0
    udp_idle_seconds: float | None = None
    further: dict[str, list[str]] = {}  # SCTP: the other addresses of endpoints, by ip


class ListenerConfig(msgspec.Struct, frozen=True, array_like=True):
    """One listener. Its descriptor, a listening socket, comes with the message."""

    id: int
    balancer: int
    protocol: str  # TCP, UDP, SCTP
    address: str  # ip:port, for connection records
    source_ranges: list[str] = []
    implementation: str = ""  # module:class of another distribution; "" for proxyd's own
    gso: bool = True  # UDP: replies may be sent as a buffer of segments


class CloseListener(msgspec.Struct, frozen=True, array_like=True):
    """Stop accepting. Relays that are alive after `drain` seconds are ended; None: they have all the time."""

    id: int
    drain: float | None = None


class Apply(msgspec.Struct, frozen=True, tag="apply"):
    """A part of an update. The part with `last` is answered by an Acknowledged with the same generation.

    Order within a part: balancers, listeners, close, drop_balancers.
    """

    generation: int
    last: bool
    balancers: list[BalancerConfig] = []  # new or changed
    listeners: list[ListenerConfig] = []
    close: list[CloseListener] = []
    drop_balancers: list[int] = []


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Stop accepting, end what is still alive after `drain` seconds, then exit."""

    drain: float


class ListConnections(msgspec.Struct, frozen=True, tag="list"):
    """Which relays are alive? At most `limit` records; of one namespace or Service where it is named."""

    request: int  # repeated in the answer
    limit: int
    namespace: str = ""
    name: str = ""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The worker runs."""

    pid: int


class Acknowledged(msgspec.Struct, frozen=True, tag="ack"):
    """Every part of this generation is in force."""

    generation: int


class Drained(msgspec.Struct, frozen=True, tag="drained"):
    """The last relay of these closed listeners has ended in this worker."""

    listeners: list[int]


class Connection(msgspec.Struct, frozen=True, array_like=True):
    """A finished connection."""

    client: str  # ip:port
    frontend: str  # ip:port
    service: str
    endpoint: str  # ip:port; "" where none could be reached
    attempts: int
    bytes_in: int  # client to endpoint
    bytes_out: int  # endpoint to client
    seconds: float
    reason: str  # why it ended; docs/configuration.md lists all reasons
    finished: float  # Unix time
    protocol: str = ""  # "": TCP
    streams: tuple[int, int] = (0, 0)  # SCTP: to the endpoint, to the client
    messages: tuple[int, int] = (0, 0)  # SCTP: to the endpoint, to the client


class Connections(msgspec.Struct, frozen=True, tag="connections"):
    """The connections that have finished since the last message; `dropped` more did not fit."""

    records: list[Connection]
    dropped: int = 0


class Trouble(msgspec.Struct, frozen=True, tag="trouble"):
    """What an operator should know, each text with how often it was met since the last message.

    A text whose kind is not the text itself is in `kinds`: of one kind are those that tell of the same thing
    at different endpoints of a Service.
    """

    counts: dict[str, int]  # by text
    kinds: dict[str, str] = {}  # by text


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """One kind of failure of a service port, and how often it happened."""

    service: str
    endpoint: str  # ip:port; "" where no single one is to blame
    why: str
    count: int


class Failures(msgspec.Struct, frozen=True, tag="failures"):
    """The failures since the last message; `dropped` more were of too many different kinds."""

    records: list[Failure]
    dropped: int = 0


class LiveConnection(msgspec.Struct, frozen=True, array_like=True):
    """A relay that is alive."""

    client: str  # ip:port
    frontend: str  # ip:port
    service: str
    endpoint: str  # ip:port; "" while there is none
    protocol: str
    seconds: float  # since it was accepted
    bytes_in: int  # client to endpoint
    bytes_out: int  # endpoint to client
    state: str  # connecting, established; TCP: half-closed; SCTP: closing; UDP: unanswered, answered
    streams: tuple[int, int] = (0, 0)  # SCTP: to the endpoint, to the client
    paths: tuple[str, str] = ("", "")  # SCTP: primary addresses of the client and the endpoint


class LiveConnections(msgspec.Struct, frozen=True, tag="live"):
    """A part of the answer to ListConnections. The last part says how many there are beyond the limit."""

    request: int
    records: list[LiveConnection]
    last: bool
    more: int = 0


ToWorker = Apply | Shutdown | ListConnections
FromWorker = Ready | Acknowledged | Drained | Connections | Trouble | Failures | LiveConnections
