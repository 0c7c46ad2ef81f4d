"""Listening sockets that the program before this one left: whoever connects meanwhile waits in their backlog."""

from __future__ import annotations

import socket
from collections.abc import Iterable

from proxyd.control.handover import ListeningSocket
from proxyd.control.publication import close_listening
from proxyd.state.spec import ListenerKey, ListenerSpec


class Inheritance:
    """Sockets that wait for their listener.

    Args:
        left: what was handed over.
    """

    def __init__(self, left: Iterable[ListeningSocket] = ()) -> None:
        self._sockets: dict[tuple[ListenerKey, bool], socket.socket] = {
            (one.key, one.steered): socket.socket(fileno=one.descriptor) for one in left
        }

    def take(self, spec: ListenerSpec) -> socket.socket | None:
        """The socket for a listener; None where there is none."""
        return self._sockets.pop((spec.key, spec.steered), None)

    def close(self) -> None:
        """Close those that no listener is for: everything that is wanted has been opened."""
        for sock in self._sockets.values():
            close_listening(sock)
        self._sockets.clear()
