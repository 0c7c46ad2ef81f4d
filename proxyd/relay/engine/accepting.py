"""The accepting half of TCP and SCTP listeners, and which clients may connect."""

from __future__ import annotations

import errno
import os
import socket
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory
from abc import ABC, abstractmethod
from collections.abc import Sequence
from ipaddress import ip_network
from typing import Protocol

from proxyd.relay.engine.balancer import Balancer
from proxyd.relay.engine.dialling import SHORTAGES, close_with_reset
from proxyd.relay.engine.plane import PAUSE_SECONDS, Plane
from proxyd.relay.engine.poller import IN
from proxyd.relay.engine.reporter import Reporter
from proxyd.relay.ipc.messages import ListenerConfig
from proxyd.relay.ipc.slots import REFUSED

# A listener that is ready turn after turn accepts more at a time. One that is not must not pay for an accept
# that fails.
MAX_BATCH = 16
# Nothing can be accepted from this socket, or not any more.
_UNUSABLE = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP})
_MAPPED = "::ffff:"


class SourceRanges:
    """The client addresses that may connect.

    Args:
        ranges: CIDRs; one that can't be read admits nobody.
    """

    __slots__ = ("_networks", "unreadable")

    def __init__(self, ranges: Sequence[str]) -> None:
        self._networks: list[tuple[int, int, int]] = []  # family, network, mask
        self.unreadable: list[str] = []
        for text in ranges:
            try:
                network = ip_network(text.strip(), strict=False)
            except ValueError:
                self.unreadable.append(text)
                continue
            family = socket.AF_INET if network.version == 4 else socket.AF_INET6
            self._networks.append((family, int(network.network_address), int(network.netmask)))

    @classmethod
    def of(cls, config: ListenerConfig, reporter: Reporter) -> SourceRanges | None:
        """Those of a listener; None where everybody may connect. One that can't be read is reported."""
        if not config.source_ranges:
            return None
        ranges = cls(config.source_ranges)
        if ranges.unreadable:
            reporter.trouble(
                f"listener {config.address}: source range {ranges.unreadable[0]!r} is not a CIDR: "
                "it admits nobody"
            )
        return ranges

    def admit(self, ip: str) -> bool:
        """Whether this client address, as `accept` gives it, may connect."""
        if ip.startswith(_MAPPED) and "." in ip:
            ip = ip[len(_MAPPED) :]
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        address = int.from_bytes(socket.inet_pton(family, ip.partition("%")[0]), "big")
        return any(family == f and address & mask == network for f, network, mask in self._networks)


class Accepted(Protocol):
    """The relay of an accepted client. When it ends it calls `relay_ended` of its listener."""

    def start(self) -> None:
        """Begin. If this raises, `crash` is called."""

    def crash(self) -> None:
        """End after an internal error."""


class Acceptor(ABC):
    """Accepts from one listening socket, which other workers may hold too. A subclass makes the relays.

    Args:
        config: what control said.
        fd: the socket; owned by the listener from now on.
        balancer: of new relays.
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
        self._ranges = SourceRanges.of(config, plane.reporter)
        self._batch = 1
        self._resting = False
        self._last_turn = 0
        self._socket = Socket(fileno=fd)
        self.family = self._socket.family
        # What socket.accept() of the Python layer calls; typeshed does not know it.
        self._accept = self._socket._accept  # type: ignore[attr-defined]  # noqa: SLF001
        try:
            self._socket.setblocking(False)
            plane.poller.add(fd, self._ready, IN)
        except OSError:
            self._socket.close()
            raise

    @abstractmethod
    def accepted(self, fd: int, address: tuple[str, int]) -> Accepted:
        """Make the relay of a client that may connect; the caller starts it.

        Args:
            fd: the client's socket, non-blocking; owned by the relay.
            address: of the client, as accept(2) gives it; with IPv6 it has four parts.
        """

    def close(self) -> None:
        """Stop accepting. Relays go on; `drained` is reported when the last has ended."""
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

    def rest(self) -> None:
        """Accept nothing for a moment. Clients wait in the backlog."""
        if not self._resting and self._socket.fileno() >= 0:
            self._resting = True
            # The socket is level-triggered: it would be reported again and again.
            self.plane.poller.modify(self._socket.fileno(), 0)
            self.plane.loop.call_later(PAUSE_SECONDS, self.resume)

    def resume(self) -> None:
        """Accept again after a pause."""
        self._resting = False
        if self._socket.fileno() >= 0:
            self.plane.poller.modify(self._socket.fileno(), IN)

    def _ready(self, _events: int) -> None:
        """Accept a batch."""
        plane = self.plane
        turn = plane.poller.turns
        self._batch = min(self._batch * 2, MAX_BATCH) if turn == self._last_turn + 1 else 1
        self._last_turn = turn
        share = plane.share()
        balancer, ranges = self.balancer, self._ranges
        for _ in range(self._batch):
            if plane.accepting_paused or not plane.may_accept():
                # The socket is level-triggered: it would be reported again and again.
                plane.poller.modify(self._socket.fileno(), 0)
                plane.rest(self)
                return
            if self.open_relays >= share:
                # As with a Service that has itself as endpoint: each connection makes another.
                plane.reporter.trouble(
                    f"listener {self.address} has nine tenths of what descriptors allow: "
                    "accepting paused for it"
                )
                self.rest()
                return
            try:
                fd, address = self._accept()
            except BlockingIOError:
                self._last_turn = 0
                return
            except OSError as error:
                self._accept_failed(error)
                return
            if not balancer.endpoints or (ranges is not None and not ranges.admit(address[0])):
                plane.counters[balancer.row + REFUSED] += 1
                close_with_reset(plane, Socket(self.family, socket.SOCK_STREAM, 0, fd))
                continue
            relay = self.accepted(fd, address)
            self.open_relays += 1
            try:
                relay.start()
            except Exception:
                relay.crash()
                raise

    def _accept_failed(self, error: OSError) -> None:
        if error.errno in SHORTAGES:
            self.plane.pause(f"{os.strerror(error.errno or 0)}: accepting paused")
        elif error.errno in _UNUSABLE:
            if error.errno != errno.EINVAL:  # control has shut it down, and will tell us to close it
                self.plane.reporter.trouble(
                    f"listener {self.address}: can't accept any more: {error.strerror}"
                )
            # Muting is not enough: the kernel reports a hang-up all the same, and with SCTP a backlog too.
            self.plane.poller.close_shared(self._socket)
        # Any other error is about one client alone (accept(2), "Error handling").
