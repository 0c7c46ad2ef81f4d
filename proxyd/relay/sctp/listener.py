"""SCTP listeners: accept associations for a balancer. What becomes of one is in `sctp.relay`.

Imported with the first SCTP listener, and so only where the feature gate SCTPSupport is on.
"""

from __future__ import annotations

import socket
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory

from proxyd.relay.engine.accepting import Acceptor
from proxyd.relay.engine.balancer import Balancer
from proxyd.relay.engine.plane import Plane
from proxyd.relay.ipc.messages import ListenerConfig
from proxyd.relay.sctp.relay import SctpRelay
from proxyd.relay.sctp.shared import Shared, shared
from proxyd.state.sctpsocket import SOL_SCTP, unmapped


class SctpListener(Acceptor):
    """Accepts associations.

    They inherit the options of the listening socket: stream counts, notifications, RECVRCVINFO, NODELAY,
    buffers.
    """

    def __init__(self, config: ListenerConfig, fd: int, balancer: Balancer, plane: Plane) -> None:
        self.shared: Shared = shared(plane)
        super().__init__(config, fd, balancer, plane)

    def accepted(self, fd: int, address: tuple[str, int]) -> SctpRelay:
        """The relay of an association."""
        sock = Socket(self.family, socket.SOCK_STREAM, SOL_SCTP, fd)
        return SctpRelay(self, sock, (unmapped(address[0]), address[1]), self.shared)
