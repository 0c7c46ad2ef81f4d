"""TCP listeners: accept connections for a balancer. How listener classes are found is in `registry`."""

from __future__ import annotations

import socket
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory

from proxyd.relay.engine.accepting import Acceptor
from proxyd.relay.tcp.relay import Relay

_STREAM = int(socket.SOCK_STREAM)


class TcpListener(Acceptor):
    """Accepts TCP connections."""

    def accepted(self, fd: int, address: tuple[str, int]) -> Relay:
        """The relay of a connection."""
        return Relay(self, Socket(self.family, _STREAM, 0, fd), address)
