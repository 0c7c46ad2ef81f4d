"""SCTP listeners: accept associations for a balancer. What one is and how it ends is in `sctp_relay`.

Imported with the first SCTP listener, and so only where the feature gate SCTPSupport is on.
"""

from __future__ import annotations

import errno
import os
import socket
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory

from proxyd.relay.engine.balancer import Balancer
from proxyd.relay.engine.plane import PAUSE_SECONDS, Plane
from proxyd.relay.engine.poller import IN
from proxyd.relay.ipc.messages import ListenerConfig
from proxyd.relay.ipc.slots import REFUSED
from proxyd.relay.sctp.relay import SctpRelay
from proxyd.relay.sctp.side import Shared, shared
from proxyd.relay.tcp.dialler import SHORTAGES, close_with_reset
from proxyd.relay.tcp.listener import MAX_BATCH, SourceRanges
from proxyd.state.sctpsocket import SOL_SCTP, unmapped

_UNUSABLE = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP})


class SctpListener:
    """Accepts associations from one listening socket, which other workers may hold too.

    Args:
        config: what control said.
        fd: the socket; owned by the listener from now on. Accepted sockets inherit its options: stream counts,
            notifications, RECVRCVINFO, NODELAY, buffers.
        balancer: of new associations.
        plane: of the worker.

    Raises:
        OSError: not a socket, or no room to watch it.
    """

    def __init__(self, config: ListenerConfig, fd: int, balancer: Balancer, plane: Plane) -> None:
        self.id = config.id
        self.address = config.address
        self.balancer = balancer
        self.plane = plane
        self.open_relays = 0
        self.closed = False
        self.shared: Shared = shared(plane)
        self._ranges = SourceRanges(config.source_ranges) if config.source_ranges else None
        if self._ranges is not None and self._ranges.unreadable:
            plane.reporter.trouble(
                f"listener {self.address}: source range {self._ranges.unreadable[0]!r} is not a CIDR: it admits nobody"
            )
        self._batch = 1
        self._last_turn = 0
        self._socket = Socket(fileno=fd)
        self._family = self._socket.family
        self._accept = self._socket._accept  # type: ignore[attr-defined]  # noqa: SLF001 accept() is the Python layer; not in typeshed
        try:
            self._socket.setblocking(False)
            plane.poller.add(fd, self._ready, IN)
        except OSError:
            self._socket.close()
            raise

    def close(self) -> None:
        """Stop accepting. Relays go on; a `drained` is reported when the last has ended."""
        if not self.closed:
            self.closed = True
            self.plane.poller.close_shared(self._socket)
            if not self.open_relays:
                self.plane.reporter.drained(self.id)

    def relay_ended(self) -> None:
        """Count a relay out."""
        self.open_relays -= 1
        if self.closed and not self.open_relays:
            self.plane.reporter.drained(self.id)

    def resume(self) -> None:
        """Accept again after a pause."""
        if self._socket.fileno() >= 0:
            self.plane.poller.modify(self._socket.fileno(), IN)

    def _ready(self, _events: int) -> None:
        """Accept a batch."""
        plane = self.plane
        turn = plane.poller.turns
        self._batch = min(self._batch * 2, MAX_BATCH) if turn == self._last_turn + 1 else 1
        self._last_turn = turn
        for _ in range(self._batch):
            if plane.accepting_paused or not plane.may_accept():
                # Level-triggered: it would be reported again and again.
                plane.poller.modify(self._socket.fileno(), 0)
                plane.rest(self)
                return
            if self.open_relays >= plane.share():
                plane.reporter.trouble(
                    f"listener {self.address} has nine tenths of what descriptors allow: accepting paused for it"
                )
                plane.poller.modify(self._socket.fileno(), 0)
                plane.loop.call_later(PAUSE_SECONDS, self.resume)
                return
            try:
                fd, address = self._accept()
            except BlockingIOError:
                self._last_turn = 0
                return
            except OSError as error:
                self._accept_failed(error)
                return
            self._accepted(Socket(self._family, socket.SOCK_STREAM, SOL_SCTP, fd), address)

    def _accepted(self, sock: Socket, address: tuple[str, int]) -> None:
        balancer = self.balancer
        client = (unmapped(address[0]), address[1])
        if not balancer.endpoints or (self._ranges is not None and not self._ranges.admit(client[0])):
            self.plane.counters[balancer.row + REFUSED] += 1
            close_with_reset(self.plane, sock)
            return
        self.open_relays += 1
        relay = SctpRelay(self, sock, client)
        try:
            relay.start()
        except Exception:
            relay.crash()
            raise

    def _accept_failed(self, error: OSError) -> None:
        if error.errno in SHORTAGES:
            self.plane.pause(f"{os.strerror(error.errno or 0)}: accepting paused")
        elif error.errno in _UNUSABLE:
            if error.errno != errno.EINVAL:  # control has stopped it, and will say that it is closed
                self.plane.reporter.trouble(
                    f"listener {self.address}: can't accept any more: {error.strerror}"
                )
            # Muting is not enough: what waits in its backlog is reported always.
            self.plane.poller.close_shared(self._socket)
        # Anything else is the fate of the one association.
