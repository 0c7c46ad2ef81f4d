"""The endpoint's side of a UDP flow: its connected socket, other attempts when one is refused, and figures.

Stages of a flow: WAITING until the endpoint's first reply; ANSWERED until the client sends again; TALKING
from then on; DRAINING when its endpoint or listener is gone and it only waits for a reply under way. A
DRAINING flow is in no listener's table.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from proxyd.relay.engine.balancer import Balancer, Endpoint
from proxyd.relay.engine.plane import Plane
from proxyd.relay.engine.poller import IN, Poller
from proxyd.relay.ipc.slots import (
    ATTEMPTS,
    BYTES_IN,
    BYTES_OUT,
    CLOSED,
    DATAGRAMS_IN,
    DATAGRAMS_OUT,
    DROPPED,
    DROPPED_OVERRUN,
    DROPPED_TO_ENDPOINT,
    FAILED,
    OPENED,
)
from proxyd.relay.udp.mmsg import ClientKey, ClientName, MmsgBuffer, client_address, overruns
from proxyd.relay.udp.postponed import Postponed
from proxyd.state.marks import OWN_PRIORITY

WAITING, ANSWERED, TALKING, DRAINING = range(4)

# Endpoints that are tried for one datagram.
MAX_ATTEMPTS = 8
# A datagram of up to this size is kept until the first reply, so that it can be sent to another endpoint.
KEPT_BYTES = 1472

_U32 = (1 << 32) - 1
_DGRAM = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN})

F = TypeVar("F")  # the class of flows


class Table(Protocol[F]):
    """The flow table, as a flow sees it."""

    plane: Plane
    poller: Poller
    counters: memoryview
    clock: float  # coarse: of the table's last pass
    draining: dict[F, float]  # flows that only wait for a last reply, and since when

    def short(self) -> None:
        """End some flows: something has run out."""

    def closed(self, flow: F, /) -> None:
        """Count a flow out."""


class FlowOwner(Protocol[F]):
    """The listener of a flow, as the flow sees it."""

    address: str  # ip:port
    balancer: Balancer  # of new flows
    fd: int
    flows: dict[ClientKey, F]
    named: dict[ClientName, F]  # those of them that are conversations
    sender: MmsgBuffer  # where replies wait for the end of the batch
    postponed: Postponed
    sendto: Callable[..., int]  # socket.sendto

    @property
    def table(self) -> Table[F]:
        """That of the worker."""

    def open_flow(self, key: ClientKey, data: memoryview | bytes, /) -> None:
        """Begin a flow with a client's datagram."""

    def send_segments(self, data: memoryview, size: int, name: ClientName, /) -> int:
        """Send segments of `size` bytes to a client; how many of them the kernel did not take."""

    def flow_ended(self) -> None:
        """A flow of the listener has ended."""


class Upstream:
    """The half of a flow that is about its endpoint. `Flow` adds how datagrams move, and how it ends."""

    __slots__ = (
        "_counted", "_fd", "_kept", "_last_turn", "_mmsg", "_overruns", "_poller", "_recv_into", "_sock",
        "_streak", "_table", "_tried", "attempts", "balancer", "bytes_in", "bytes_out", "datagrams_in",
        "datagrams_out", "endpoint", "key", "listener", "name", "send", "stage", "started", "used",
    )  # fmt: skip

    def __init__(self, listener: FlowOwner[Any], key: ClientKey) -> None:
        self.listener = listener
        self.key = key
        self.name: ClientName | None = None  # its key in the listener's `named`, if it is a conversation
        self.balancer = listener.balancer
        self.endpoint: Endpoint | None = None
        self.stage = WAITING
        self.bytes_in = self.bytes_out = self.datagrams_in = self.datagrams_out = 0
        self._table = table = listener.table
        self._poller = table.poller
        self._mmsg = listener.sender
        self._fd = listener.fd
        self.used = table.clock
        self._sock: Socket | None = None
        self._kept: bytes | None = None
        self._tried: tuple[Endpoint, ...] = ()
        self.attempts = 0
        self._counted = (0, 0, 0, 0)
        self._last_turn = self._streak = self._overruns = 0
        self.started = table.plane.now()

    @property
    def done(self) -> bool:
        """Whether it is over."""
        return self._sock is None

    @property
    def service(self) -> str:
        """Name of its service port, namespace/name:port."""
        return self.balancer.name

    @property
    def client_ip(self) -> str:
        """The client's IP address."""
        return client_address(self.key)[0]

    @abstractmethod
    def ready(self, _events: int) -> None:
        """Take replies."""

    @abstractmethod
    def finish(self, reason: str) -> None:
        """Close and count."""

    def dial(self, data: memoryview | bytes) -> bool:
        """Send a datagram to the next endpoint; False where none took it, and the flow is over."""
        if len(data) <= KEPT_BYTES:
            self._kept = bytes(data)
        balancer = self.balancer
        table = self._table
        ip = self.client_ip if balancer.affinity_seconds else ""
        while self.attempts < MAX_ATTEMPTS:
            endpoint = balancer.pick(ip, table.plane.now() if self.attempts else self.started, self._tried)
            if endpoint is None:
                break
            self.endpoint = endpoint
            self.attempts += 1
            table.counters[endpoint.row + ATTEMPTS] += 1
            table.counters[balancer.row + ATTEMPTS] += 1
            try:
                sock = self._connected(endpoint)
                self._sock = sock
                self._overruns = 0
                self.send = sock.send
                self._recv_into = sock.recv_into
                table.counters[endpoint.row + OPENED] += 1
                self.send(data)
            except OSError as error:
                if error.errno in _SHORTAGES:
                    table.short()
                    self.finish("out of resources")
                    if self.listener.postponed.keep(self.key, data):
                        table.plane.reporter.trouble(
                            f"{self._shortage(error)}: idle flows are ended "
                            f"to make room for those of {balancer.name}"
                        )
                    else:
                        self._drop(error, DROPPED)
                    return False
                if error.errno == errno.EMSGSIZE:  # so it would be at any other endpoint
                    self._drop(error, DROPPED_TO_ENDPOINT)
                    self.finish("too large")
                    return False
                self._blame(error)
                continue
            return True
        table.counters[balancer.row + FAILED] += 1
        self.finish("no endpoint")
        return False

    def _connected(self, endpoint: Endpoint) -> Socket:
        """A socket that is connected to an endpoint, and watched."""
        sock = Socket(endpoint.family, _DGRAM, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, OWN_PRIORITY)  # as of TCP
        code = sock.connect_ex(endpoint.address)
        if not code and sock.getsockname()[:2] == endpoint.address:
            code = errno.ECONNREFUSED  # the socket is connected to itself
        if not code:
            try:
                self._poller.add(sock.fileno(), self.ready, IN)
                return sock
            except OSError as error:
                code = error.errno or 0
        sock.close()
        raise OSError(code, os.strerror(code))

    def _close(self) -> None:
        """Close the socket to the endpoint."""
        if self._sock is not None:
            assert self.endpoint is not None
            self.count()
            self._poller.close(self._sock)
            self._sock = None
            self._table.counters[self.endpoint.row + CLOSED] += 1

    # -- errors ----------------------------------------------------------------------------------------------

    def send_failed(self, error: OSError, data: memoryview | bytes) -> None:
        """Act on an error of `send`. The datagram was not sent; the error may be about the one before it."""
        code = error.errno
        if code == errno.EMSGSIZE:
            # A router has told of a smaller MTU than the one before. The kernel knows it now, and makes
            # fragments.
            try:
                self.send(data)
            except OSError as second:
                code, error = second.errno, second
            else:
                self.bytes_in += len(data)
                self.datagrams_in += 1
                return
        if code in _SHORTAGES or code in (errno.EMSGSIZE, errno.EPERM):
            self._drop(error, DROPPED_TO_ENDPOINT)
            return
        was = self.stage
        self._blame(error)
        if was != WAITING:
            self.finish("refused by endpoint")
            self.listener.open_flow(self.key, data)
        elif self.dial(data):
            self.datagrams_in += 1
            self.bytes_in += len(data)

    def _refused(self, error: OSError) -> None:
        """Act on an ICMP error: where no reply has come yet, try another endpoint."""
        if error.errno == errno.EMSGSIZE:
            # A router's: the last datagram is too large for the next link. The kernel makes fragments from
            # now on.
            if self.stage == WAITING and self._kept is not None:
                with contextlib.suppress(OSError):
                    self.send(self._kept)
            return
        was = self.stage
        self._blame(error)
        if was == WAITING and self._kept is not None:
            self.dial(self._kept)
        else:
            self.finish("refused by endpoint")

    def _blame(self, error: OSError) -> None:
        """Note that the endpoint does not take datagrams."""
        endpoint = self.endpoint
        assert endpoint is not None
        self._tried = (*self._tried, endpoint)
        self._close()
        self._table.counters[endpoint.row + FAILED] += 1
        ip = self.client_ip if self.balancer.affinity_seconds else ""
        self.balancer.failed(ip, endpoint, self._table.plane.now())
        why = os.strerror(error.errno or 0)
        self._table.plane.reporter.endpoint_trouble(self.balancer.name, str(endpoint), why)

    def _drop(self, error: OSError, reason: int) -> None:
        """Count a datagram that could not be sent, with the counter `reason`."""
        self._table.counters[self.balancer.row + reason] += 1
        if error.errno == errno.EAGAIN and self._sock is not None:
            why = "the send buffer is full"
        else:
            why = self._shortage(error)
        self._table.plane.reporter.trouble(f"datagrams of {self.balancer.name} were dropped: {why}")

    @staticmethod
    def _shortage(error: OSError) -> str:
        return "no local port left" if error.errno == errno.EAGAIN else os.strerror(error.errno or 0)

    # -- figures ---------------------------------------------------------------------------------------------

    def count(self) -> None:
        """Bring the shared counters up to date."""
        bytes_in, bytes_out, datagrams_in, datagrams_out = self._counted
        self._counted = (self.bytes_in, self.bytes_out, self.datagrams_in, self.datagrams_out)
        more_in, more_out = self.datagrams_in - datagrams_in, self.datagrams_out - datagrams_out
        counters = self._table.counters
        rows = (self.balancer.row, self.endpoint.row) if self.endpoint is not None else (self.balancer.row,)
        for row in rows:
            if more_in:
                counters[row + DATAGRAMS_IN] += more_in
                counters[row + BYTES_IN] += self.bytes_in - bytes_in
            if more_out:
                counters[row + DATAGRAMS_OUT] += more_out
                counters[row + BYTES_OUT] += self.bytes_out - bytes_out
        if (
            self.stage == TALKING
            and self._sock is not None
            and (lost := overruns(self._sock)) != self._overruns
        ):
            counters[self.balancer.row + DROPPED_OVERRUN] += (lost - self._overruns) & _U32
            self._overruns = lost
            self._table.plane.reporter.trouble(
                f"replies of {self.balancer.name} came faster than they could be sent on: some were dropped"
            )
