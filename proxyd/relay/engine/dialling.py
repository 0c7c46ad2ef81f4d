"""What the relays of TCP and SCTP have in common while they connect to an endpoint: limits, and what they need of their listener."""

from __future__ import annotations

import errno
import socket
import struct
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory
from typing import Protocol

from proxyd.relay.engine.balancer import Balancer
from proxyd.relay.engine.plane import Plane

# Seconds given to each attempt that is not answered (kubernetes pkg/proxy/userspace, EndpointDialTimeouts).
DIAL_TIMEOUTS = (0.25, 0.5, 1.0, 2.0)
# Refusals cost no time but do cost work: a service of thousands of dead endpoints must not eat the worker.
MAX_ATTEMPTS = 64
# How often a relay waits for a descriptor, memory or port of our own, PAUSE_SECONDS each.
MAX_SHORTAGES = 20
SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Owner(Protocol):
    """The listener that accepted a relay's client, as the relay sees it."""

    address: str  # ip:port
    balancer: Balancer  # of new relays
    plane: Plane

    def rest(self) -> None:
        """Accept nothing for a moment."""

    def relay_ended(self) -> None:
        """Count a relay out."""


def close_with_reset(plane: Plane, sock: Socket) -> None:
    """Close so that the other end sees a reset, of SCTP an ABORT."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    finally:
        plane.poller.close(sock)
