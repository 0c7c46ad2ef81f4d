"""The life of one TCP connection: dial an endpoint, or another; be pumped; end, and be counted."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory
from time import monotonic
from typing import TYPE_CHECKING

from proxyd.relay.balancer import Endpoint
from proxyd.relay.messages import Connection, LiveConnection
from proxyd.relay.plane import PAUSE_SECONDS, Plane
from proxyd.relay.poller import ERR, HUP, IN, RDHUP, events_now
from proxyd.relay.pump import Side
from proxyd.relay.slots import ATTEMPTS, BYTES_IN, BYTES_OUT, CLOSED, CONNECT_US, FAILED, OPENED

if TYPE_CHECKING:
    from proxyd.relay.listener import TcpListener

# Seconds given to each attempt that is not answered (kubernetes pkg/proxy/userspace, EndpointDialTimeouts).
DIAL_TIMEOUTS = (0.25, 0.5, 1.0, 2.0)
# Refusals cost no time but do cost work: a service of thousands of dead endpoints must not eat the worker.
MAX_ATTEMPTS = 64
# How often a relay waits for a descriptor or memory of our own, PAUSE_SECONDS each.
MAX_SHORTAGES = 20
SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
# Keepalive is not needed, and not set, before a relay is this many ticks old.
_KEEPALIVE_TICKS = 5
_KEEPALIVE = (
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
)


def close_with_reset(plane: Plane, sock: Socket) -> None:
    """Close so that the other end sees a reset."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    finally:
        plane.poller.close(sock)


class Relay:
    """One accepted connection, joined to its endpoint."""

    __slots__ = (
        "_address", "_balancer", "_connected", "_counted_in", "_counted_out", "_dial_started", "_endpoint", "_idle_since",
        "_plane", "_refused", "_shortages", "_socket", "_started", "_ticks", "_timed_out", "attempts", "client", "done",
        "listener", "upstream",
    )  # fmt: skip

    client: Side
    upstream: Side  # once connected
    _endpoint: Endpoint | None  # chosen at present
    _socket: Socket | None  # while dialling

    def __init__(self, listener: TcpListener, sock: Socket, address: tuple[str, int]) -> None:
        self.listener = listener
        self.attempts = 0
        self.done = False
        self._plane = listener.plane
        self._balancer = listener.balancer  # stays, whatever becomes of the listener
        self._address = address
        self._endpoint = None
        self._socket = None
        self._connected = False
        self._refused: tuple[Endpoint, ...] = ()
        self._timed_out: tuple[Endpoint, ...] = ()
        self._shortages = 0
        self._ticks = 0
        self._counted_in = self._counted_out = 0
        self._started = self._idle_since = self._dial_started = monotonic()
        self.client = Side(self, sock, self._plane, held=True)

    def start(self) -> None:
        """Dial. The caller calls `crash` if this raises."""
        plane = self._plane
        plane.counters[self._balancer.row + OPENED] += 1
        plane.opened(self)
        # First the endpoint: where its connect succeeds at once it comes first in the batch, and the client's
        # request can be read when it is reported.
        self._dial()
        if not self.done:
            sock = self.client.sock
            try:
                plane.poller.add(sock.fileno(), self.client.ready)
            except OSError as error:
                plane.pause(f"{os.strerror(error.errno or 0)}: accepting paused")
                self._give_up()

    # -- dialling -------------------------------------------------------------------------------------------------

    def _dial(self) -> None:
        """Begin to connect to the next endpoint; when none is left, turn the client away."""
        plane = self._plane
        balancer = self._balancer
        now = self._dial_started
        while self.attempts < MAX_ATTEMPTS:
            endpoint = balancer.pick(self._address[0], now, (*self._refused, *self._timed_out))
            if endpoint is None and len(self._timed_out) < len(DIAL_TIMEOUTS):
                # Those that were slow to answer get a longer time; those that refused said no.
                endpoint = balancer.pick(self._address[0], now, self._refused)
            if endpoint is None:
                break
            self._endpoint = endpoint
            try:
                sock = Socket(endpoint.family, _STREAM, 0)
            except OSError as error:
                if error.errno in SHORTAGES:
                    self._wait_for_resources(error)
                    return
                self._attempt_failed(error.errno or 0)
                continue
            self.attempts += 1
            plane.counters[endpoint.row + ATTEMPTS] += 1
            plane.counters[balancer.row + ATTEMPTS] += 1
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = sock.connect_ex(endpoint.address)
            if code in (0, errno.EINPROGRESS):
                try:
                    plane.poller.add(sock.fileno(), self._dialled)
                except OSError as error:
                    sock.close()
                    self._wait_for_resources(error)
                    return
                self._socket = sock
                plane.dial_until(self, now + DIAL_TIMEOUTS[len(self._timed_out)])
                return
            sock.close()
            self._attempt_failed(code)
        self._give_up()

    def _dialled(self, events: int) -> None:
        """Take the outcome of an attempt."""
        sock = self._socket
        endpoint = self._endpoint
        assert sock is not None
        assert endpoint is not None
        if events & (ERR | HUP) or (endpoint.ephemeral and sock.getsockname()[:2] == endpoint.address):
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.ECONNREFUSED
            self._socket = None
            close_with_reset(self._plane, sock)
            self._attempt_failed(code)
            self._dial_started = monotonic()
            self._dial()
            return
        plane = self._plane
        counters = plane.counters
        del plane.dialling[self]
        micros = int((monotonic() - self._dial_started) * 1e6)
        row = endpoint.row
        counters[row + OPENED] += 1
        counters[row + CONNECT_US] += micros
        counters[self._balancer.row + CONNECT_US] += micros
        if self._balancer.suspects:
            self._balancer.suspects.pop(endpoint, None)
        self._socket = None
        self._connected = True
        client = self.client
        side = self.upstream = Side(self, sock, plane, held=False)
        side.peer = client
        client.peer = side
        plane.poller.handlers[sock.fileno()] = side.ready
        client.release()
        if events & (IN | RDHUP) and not self.done:
            side.ready(events)

    def dial_due(self, now: float) -> None:
        """Give up the endpoint that has not answered in time."""
        if self._socket is not None and (events := events_now(self._socket.fileno())):
            # It has; this worker was too busy to see it before.
            self._dialled(events)
            return
        del self._plane.dialling[self]
        sock = self._socket
        self._dial_started = now
        if sock is not None:
            self._socket = None
            self._plane.poller.close(sock)
            assert self._endpoint is not None
            self._timed_out = (*self._timed_out, self._endpoint)
            self._note_failure("no answer to connect")
            if len(self._timed_out) >= len(DIAL_TIMEOUTS):
                self._give_up()
                return
        self._dial()

    def _attempt_failed(self, code: int) -> None:
        assert self._endpoint is not None
        self._refused = (*self._refused, self._endpoint)
        if code == errno.EADDRNOTAVAIL or code in SHORTAGES:
            # Ours, not the endpoint's.
            self._plane.reporter.trouble(
                f"no local port or memory left to connect to endpoint {self._endpoint} of {self._balancer.name}: "
                f"{os.strerror(code)}"
            )
        else:
            self._note_failure(os.strerror(code))

    def _note_failure(self, why: str) -> None:
        endpoint = self._endpoint
        assert endpoint is not None
        self._plane.counters[endpoint.row + FAILED] += 1
        self._balancer.failed(self._address[0], endpoint, self._dial_started)
        self._plane.reporter.trouble(f"endpoint {endpoint} of {self._balancer.name}: {why}")
        self._plane.reporter.failure(self._balancer.name, str(endpoint), why)

    def _wait_for_resources(self, error: OSError) -> None:
        """Dial again when other relays may have ended. No endpoint is to blame."""
        self._forget_endpoint()
        self._shortages += 1
        self._plane.pause(f"{os.strerror(error.errno or 0)}: accepting paused")
        if self._shortages > MAX_SHORTAGES:
            self._give_up()
        else:
            self._plane.dial_until(self, monotonic() + PAUSE_SECONDS)

    def _give_up(self) -> None:
        self._plane.counters[self._balancer.row + FAILED] += 1
        self._plane.reporter.failure(self._balancer.name, "", "no endpoint could be reached: client reset")
        self._forget_endpoint()
        self.finish("no endpoint", reset_client=True)

    # -- the end --------------------------------------------------------------------------------------------------

    def reset_by(self, side: Side) -> None:
        """Pass a reset on."""
        if side is self.client:
            self.finish("reset by client", reset_upstream=True)
        else:
            self.finish("reset by endpoint", reset_client=True)

    def write_failed(self, side: Side) -> None:
        """Pass on the reset that a write to `side` met, behind what that side had sent before it."""
        peer = side.peer
        view = self._plane.view
        if peer.pending is None and not side.eof:
            try:
                while size := side.recv_into(view, 0, socket.MSG_DONTWAIT):
                    side.moved += size
                    if peer.send(view[:size], socket.MSG_DONTWAIT) != size:
                        break
            except OSError:
                pass  # nothing more can be read, or there is no room for it
        self.reset_by(side)

    def abort(self, reason: str) -> None:
        """End at once, with a reset to both ends."""
        if not self.done:
            self.finish(reason, reset_client=True, reset_upstream=True)

    def crash(self) -> None:
        """End after an internal error."""
        self.abort("internal error")

    def finish(self, reason: str, *, reset_client: bool = False, reset_upstream: bool = False) -> None:
        """Close both sockets and count."""
        plane = self._plane
        self.done = True
        client = self.client
        self._close(client, reset_client)
        if self._connected:
            upstream = self.upstream
            self._close(upstream, reset_upstream)
            del client.peer, upstream.peer, self.upstream  # or they would wait for the garbage collector
            self._count_bytes(client.moved, upstream.moved)
        else:
            plane.dialling.pop(self, None)
            if self._socket is not None:
                plane.poller.close(self._socket)
                self._socket = None
        del self.client
        counters = plane.counters
        counters[self._balancer.row + CLOSED] += 1
        endpoint = self._endpoint
        if endpoint is not None and self._connected:
            counters[endpoint.row + CLOSED] += 1
        if plane.records:
            self._record(reason)
        self._forget_endpoint()
        plane.closed(self)
        self.listener.relay_ended()

    def _close(self, side: Side, reset: bool) -> None:
        side.held = True  # another turn may have been asked for
        if side.pending is not None:
            self._plane.keep(-len(side.pending))
            side.pending = None
        if reset:
            close_with_reset(self._plane, side.sock)
        else:
            self._plane.poller.close(side.sock)

    def _forget_endpoint(self) -> None:
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None and self._balancer.affinity_seconds:
            self._balancer.ended(self._address[0], endpoint, monotonic())

    # -- figures --------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Bring the counters up to date; end the relay if it is idle for too long. Called once a second."""
        if not self._connected:
            return
        bytes_in, bytes_out = self.client.moved, self.upstream.moved
        if bytes_in != self._counted_in or bytes_out != self._counted_out:
            self._count_bytes(bytes_in, bytes_out)
            self._idle_since = now
        elif self._plane.idle_seconds and now - self._idle_since >= self._plane.idle_seconds:
            self.abort("idle")
            return
        self._ticks += 1
        if self._ticks == _KEEPALIVE_TICKS:
            for level, option, value in _KEEPALIVE:
                self.upstream.sock.setsockopt(level, option, value)

    def _count_bytes(self, bytes_in: int, bytes_out: int) -> None:
        """Add what was moved since the last call."""
        counters = self._plane.counters
        more_in, more_out = bytes_in - self._counted_in, bytes_out - self._counted_out
        self._counted_in, self._counted_out = bytes_in, bytes_out
        assert self._endpoint is not None
        for row in (self._balancer.row, self._endpoint.row):
            if more_in:
                counters[row + BYTES_IN] += more_in
            if more_out:
                counters[row + BYTES_OUT] += more_out

    @property
    def service(self) -> str:
        """Name of its service port, namespace/name:port."""
        return self._balancer.name

    def live(self, now: float) -> LiveConnection:
        """What it is and does at this moment."""
        ip, port = self._address[:2]
        state = "connecting"
        if self._connected:
            state = "half-closed" if self.client.eof or self.upstream.eof else "established"
        return LiveConnection(
            client=f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}",
            frontend=self.listener.address,
            service=self._balancer.name,
            endpoint=str(self._endpoint or ""),
            protocol="TCP",
            seconds=now - self._started,
            bytes_in=self.client.moved if self._connected else 0,
            bytes_out=self.upstream.moved if self._connected else 0,
            state=state,
        )

    def _record(self, reason: str) -> None:
        ip, port = self._address[:2]
        record = Connection(
            client=f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}",
            frontend=self.listener.address,
            service=self._balancer.name,
            endpoint=str(self._endpoint or ""),
            attempts=self.attempts,
            bytes_in=self._counted_in,
            bytes_out=self._counted_out,
            seconds=monotonic() - self._started,
            reason=reason,
            finished=time.time(),
        )
        self._plane.reporter.record(record)
