"""What a worker is started with."""

from __future__ import annotations

import msgspec


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a worker, the same for its whole life."""

    tcp_idle_timeout: float = 0.0  # seconds without a byte after which a TCP relay is ended; 0: never
    tcp_splice: bool = True  # bulk goes by splice(2), which copies nothing
    records: bool = False  # send a Connection for every relay that ended
    max_relays: int = 0  # at once; 0: as many as descriptors allow
    udp_timeout: float = 60.0  # seconds after which an idle UDP flow is ended
    sctp_max_message: int = 256 * 1024  # bytes; a larger one ends its association
    alone: bool = False  # in a process of its own
    workers: int = 1  # that share the node's local ports, and the user's pipes
