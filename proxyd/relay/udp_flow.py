"""The life of one UDP flow: the datagrams of one client address at one listener, and its socket to the endpoint.

Stages: WAITING until the endpoint's first reply; ANSWERED until the client sends again; TALKING from then on; LEAVING
when its endpoint or listener is gone and only a reply under way is waited for. A LEAVING flow is in no listener's table.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory
from time import monotonic
from typing import TYPE_CHECKING

from proxyd.relay.balancer import Endpoint
from proxyd.relay.messages import LiveConnection
from proxyd.relay.poller import IN
from proxyd.relay.slots import (
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
from proxyd.relay.udp_figures import final_record, live_record, overruns
from proxyd.relay.udp_vector import NAME6_BYTES, NAME_BYTES, SLOTS, ClientKey, ClientName, client_address

if TYPE_CHECKING:
    from proxyd.relay.udp import UdpListener

WAITING, ANSWERED, TALKING, LEAVING = range(4)

# Endpoints tried for one datagram.
MAX_ATTEMPTS = 8
# A datagram up to this size is kept until the first reply, to be sent to another endpoint when one refuses it.
KEPT_BYTES = 1472
# The receive buffer of a flow that has become a conversation.
TALKING_BUFFER = 1024 * 1024
# Replies taken from one flow in one turn once it was ready in so many turns on end. Before, it is one: another read
# would mostly find nothing, and that costs an exception.
MAX_BATCH = 16
STREAK = 4

_U32 = (1 << 32) - 1
_DGRAM = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN})


class Flow:
    """One client of one listener. The client's path is in `UdpListener`, the endpoint's is `ready`."""

    __slots__ = (
        "_counted", "_fd", "_kept", "_last_turn", "_overruns", "_poller", "_recv_into", "_sock", "_streak",
        "_table", "_tried", "_vector", "attempts", "balancer", "bytes_in", "bytes_out", "datagrams_in", "datagrams_out", "endpoint",
        "key", "listener", "name", "send", "stage", "started", "used",
    )  # fmt: skip

    def __init__(self, listener: UdpListener, key: ClientKey) -> None:
        self.listener = listener
        self.key = key
        self.name: ClientName | None = None  # where it is in the listener's `named`
        self.balancer = listener.balancer
        self.endpoint: Endpoint | None = None
        self.stage = WAITING
        self.bytes_in = self.bytes_out = self.datagrams_in = self.datagrams_out = 0
        self._table = table = listener.table
        self._poller = table.poller
        self._vector = listener.sender
        self._fd = listener.fd
        self.used = table.clock
        self._sock: Socket | None = None
        self._kept: bytes | None = None
        self._tried: tuple[Endpoint, ...] = ()
        self.attempts = 0
        self._counted = (0, 0, 0, 0)
        self._last_turn = self._streak = self._overruns = 0
        self.started = monotonic()

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
        """Address of the client, without the port."""
        return client_address(self.key)[0]

    # -- client to endpoint ---------------------------------------------------------------------------------------

    def dial(self, data: memoryview | bytes) -> bool:
        """Send a datagram to the next endpoint; False when the flow is over: no endpoint took it."""
        if len(data) <= KEPT_BYTES:
            self._kept = bytes(data)
        balancer = self.balancer
        table = self._table
        ip = self.client_ip if balancer.affinity_seconds else ""
        while self.attempts < MAX_ATTEMPTS:
            endpoint = balancer.pick(ip, monotonic() if self.attempts else self.started, self._tried)
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
                    self._drop(error, DROPPED)
                    table.short()
                    self.finish("out of resources")
                    return False
                if error.errno == errno.EMSGSIZE:  # as it would be at any other
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
        """A watched socket, connected to an endpoint."""
        sock = Socket(endpoint.family, _DGRAM, 0)
        code = sock.connect_ex(endpoint.address)
        if endpoint.ephemeral and not code and sock.getsockname()[:2] == endpoint.address:
            code = errno.ECONNREFUSED  # it met itself
        if not code:
            try:
                self._poller.add(sock.fileno(), self.ready, IN)
                return sock
            except OSError as error:
                code = error.errno or 0
        sock.close()
        raise OSError(code, os.strerror(code))

    def forward(self, data: memoryview) -> None:
        """Send a datagram of the client. `UdpListener` has the same written out where it does this most."""
        if self.stage != TALKING:
            self.early(data)
        self.used = self._table.clock
        try:
            self.send(data)
        except OSError as error:
            self.send_failed(error, data)
            return
        self.bytes_in += len(data)
        self.datagrams_in += 1

    def early(self, data: memoryview) -> None:
        """Take a datagram of the client on a flow that is not TALKING yet, before it is sent."""
        if self.stage == WAITING:
            self._kept = bytes(data) if len(data) <= KEPT_BYTES else None
        else:
            self.stage = TALKING
            if self._sock is not None:
                # As large as net.core.rmem_max allows: a worker has no privilege.
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TALKING_BUFFER)

    def send_failed(self, error: OSError, data: memoryview) -> None:
        """Act on an error of `send`: the datagram has not left. It may tell of the one before it."""
        code = error.errno
        if code == errno.EMSGSIZE:
            # A router told of a smaller MTU than the one before had; the kernel knows it now, and makes fragments.
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
            self.listener.first(self.key, data)
        elif self.dial(data):
            self.datagrams_in += 1
            self.bytes_in += len(data)

    # -- endpoint to client ---------------------------------------------------------------------------------------

    def ready(self, _events: int) -> None:
        """Take replies. They leave at the end of the batch."""
        turn = self._poller.turns
        left = 1
        if turn == self._last_turn + 1:
            self._streak += 1
            if self._streak >= STREAK:
                left = MAX_BATCH
        else:
            self._streak = 0
        self._last_turn = turn
        vector = self._vector
        recv_into = self._recv_into
        try:
            while left:
                slot = vector.queued
                if slot == SLOTS or vector.to != self._fd:
                    vector.turn_to(self._fd, self.listener.sendto)
                    slot = 0
                size = recv_into(vector.views[slot])
                if vector.v6:
                    vector.names[slot * NAME_BYTES : slot * NAME_BYTES + NAME6_BYTES] = self.key  # type: ignore[assignment]  # bytes here
                else:
                    vector.words[slot * 4] = self.key  # type: ignore[assignment]  # int here
                vector.sizes[2 * slot + 1] = size
                vector.name = self.name
                vector.queued = slot + 1
                self.bytes_out += size
                self.datagrams_out += 1
                self.used = self._table.clock
                if self.stage != TALKING:
                    self._replied()
                    if self._sock is None:
                        return
                left -= 1
        except BlockingIOError:
            self._streak = 0
        except OSError as error:
            self._refused(error)

    def _replied(self) -> None:
        if self.stage == WAITING:
            self.stage = ANSWERED
            self._kept = None
            self._tried = ()
        elif self.stage == LEAVING and self.datagrams_out >= self.datagrams_in:
            self.finish("endpoint removed")

    def _refused(self, error: OSError) -> None:
        """Act on what came instead of a reply, an ICMP error: try another endpoint where nothing has come yet."""
        if error.errno == errno.EMSGSIZE:
            # From a router: what was sent last is too large for the next link. The kernel makes fragments now.
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

    # -- the end --------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Leave the listener's table. A reply under way is waited for, for a moment."""
        if self.datagrams_out >= self.datagrams_in:
            self.finish("endpoint removed")
        else:
            self.listener.flows.pop(self.key, None)
            self._unname()
            self.stage = LEAVING
            self._table.leaving[self] = monotonic()

    def _unname(self) -> None:
        if self.name is not None:
            self.listener.named.pop(self.name, None)

    def adopted(self, listener: UdpListener) -> None:
        """Go on at a listener with the same address and balancer."""
        self.listener = listener
        self._fd = listener.fd

    def crash(self) -> None:
        """End after an internal error."""
        self.finish("internal error")

    def finish(self, reason: str) -> None:
        """Close and count."""
        table = self._table
        flows = self.listener.flows
        if flows.get(self.key) is self:
            del flows[self.key]
            self._unname()
        elif table.leaving.pop(self, None) is None:
            return  # it is over already
        self._close()
        self.count()
        endpoint = self.endpoint
        table.counters[self.balancer.row + CLOSED] += 1
        if endpoint is not None and self.balancer.affinity_seconds:
            self.balancer.ended(self.client_ip, endpoint, monotonic())
        table.closed(self)
        if table.plane.records:
            table.plane.reporter.record(final_record(self, reason))

    def _close(self) -> None:
        """Close the socket to the endpoint."""
        if self._sock is not None:
            assert self.endpoint is not None
            self.count()
            self._poller.close(self._sock)
            self._sock = None
            self._table.counters[self.endpoint.row + CLOSED] += 1

    def _blame(self, error: OSError) -> None:
        """Note that the endpoint does not take datagrams."""
        endpoint = self.endpoint
        assert endpoint is not None
        self._tried = (*self._tried, endpoint)
        self._close()
        self._table.counters[endpoint.row + FAILED] += 1
        ip = self.client_ip if self.balancer.affinity_seconds else ""
        self.balancer.failed(ip, endpoint, monotonic())
        why = os.strerror(error.errno or 0)
        self._table.plane.reporter.trouble(f"endpoint {endpoint} of {self.balancer.name}: {why}")

    def _drop(self, error: OSError, reason: int) -> None:
        """Count a datagram that could not be sent; `reason`: one of the counters of dropped ones."""
        self._table.counters[self.balancer.row + reason] += 1
        if error.errno == errno.EAGAIN and self._sock is not None:
            why = "the send buffer is full"
        else:
            why = "no local port left" if error.errno == errno.EAGAIN else os.strerror(error.errno or 0)
        self._table.plane.reporter.trouble(f"datagrams of {self.balancer.name} were dropped: {why}")

    # -- figures --------------------------------------------------------------------------------------------------

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

    def live(self, now: float) -> LiveConnection:
        """What it is and does at this moment."""
        return live_record(self, now)
