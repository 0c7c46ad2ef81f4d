"""Listening sockets inherited from the program before an upgrade; new clients wait in their backlog."""

from __future__ import annotations

import socket
from collections.abc import Container, Iterable, Iterator

from proxyd.api.service import Protocol
from proxyd.control.workers.handover import ListeningSocket
from proxyd.control.workers.publication import close_listening
from proxyd.host.sockets import ignore_path_mtu
from proxyd.state.spec import ListenerKey, ListenerSpec


class InheritedSockets:
    """Inherited sockets that no listener has taken yet.

    Args:
        handed_over: the sockets, as the program before described them.
    """

    def __init__(self, handed_over: Iterable[ListeningSocket] = ()) -> None:
        self._sockets: dict[tuple[ListenerKey, bool], socket.socket] = {}
        self._bound: dict[socket.socket, ListeningSocket] = {}  # SCTP endpoints
        for one in handed_over:
            sock = socket.socket(fileno=one.descriptor)
            self._sockets[one.key, one.steered] = sock
            if one.protocol is Protocol.SCTP:
                self._bound[sock] = one

    def take(self, spec: ListenerSpec, *, parked: bool = False) -> socket.socket | None:
        """The socket for a listener; None if there is none.

        Args:
            spec: of the listener.
            parked: whether one that is bound to another port will do (see `proxyd.host.parked`).
        """
        sock = self._sockets.pop((spec.key, spec.steered), None)
        if sock is not None and not parked and sock.getsockname()[1] != spec.key.port:
            close_listening(sock)
            return None
        if sock is not None and spec.steered:
            ignore_path_mtu(sock, spec.key)  # an earlier version did not
        return sock

    def at(self, ips: Container[str]) -> Iterator[tuple[ListenerKey, socket.socket]]:
        """The TCP and UDP sockets for listeners at some addresses, which they are left with."""
        for (key, _), sock in self._sockets.items():
            if key.ip in ips and key.protocol is not Protocol.SCTP:
                yield key, sock

    def take_endpoint(
        self, specs: Iterable[ListenerSpec]
    ) -> tuple[socket.socket, tuple[ListenerKey, ...]] | None:
        """An SCTP socket bound to one of these listeners, and all it is bound to; None if there is none."""
        wanted = {spec.key for spec in specs}
        for sock, one in self._bound.items():
            if not wanted.isdisjoint(one.keys):
                del self._bound[sock], self._sockets[one.key, one.steered]
                return sock, one.keys
        return None

    def close(self) -> None:
        """Close those that no listener has taken. Call it when everything that is wanted has been opened."""
        for sock in self._sockets.values():
            close_listening(sock)
        self._sockets.clear()
        self._bound.clear()
