"""The life of a TCP connection: dial an endpoint (`dialler`), move bytes (`pump`), end, be counted."""

from __future__ import annotations

import os
import socket
import time
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory

from proxyd.relay.engine.dialling import Owner, close_with_reset
from proxyd.relay.engine.pipes import Pipe
from proxyd.relay.engine.poller import IN, RDHUP
from proxyd.relay.ipc.messages import Connection, LiveConnection, address_text
from proxyd.relay.ipc.slots import BYTES_IN, BYTES_OUT, CLOSED, OPENED
from proxyd.relay.tcp.dialler import Dialler
from proxyd.relay.tcp.pump import Side

_NOWAIT = int(socket.MSG_DONTWAIT)
_DATA_EVENTS = IN | RDHUP
# Keepalive is set when a relay is this many ticks old: before, it is of no use.
_KEEPALIVE_TICKS = 5
_KEEPALIVE = (
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
)


class Relay(Dialler):
    """One accepted connection, joined to its endpoint.

    Args:
        listener: accepted it.
        sock: the client's; owned by the relay from now on.
        address: of the client.
    """

    __slots__ = (
        "_connected", "_counted_in", "_counted_out", "_idle_since", "_started", "_ticks", "_unsent", "client",
        "done", "upstream",
    )  # fmt: skip

    client: Side
    upstream: Side  # once connected

    def __init__(self, listener: Owner, sock: Socket, address: tuple[str, int]) -> None:
        super().__init__(listener, address)
        self.done = False
        self._connected = False
        self._ticks = 0
        self._counted_in = self._counted_out = 0
        self._unsent = 0  # bytes that were under way when it last seemed idle
        self._started = self._idle_since = self._dial_started
        self.client = Side(self, sock, self.plane, held=True)

    def start(self) -> None:
        """Dial. The caller calls `crash` if this raises."""
        plane = self.plane
        plane.counters[self._balancer.row + OPENED] += 1
        plane.opened(self)
        # The endpoint comes first: where connecting succeeds at once, its event is the first in the batch,
        # and the client's request can be read when it is reported.
        self._dial()
        if not self.done:
            try:
                plane.poller.add(self.client.sock.fileno(), self.client.ready)
            except OSError as error:
                plane.pause(f"{os.strerror(error.errno or 0)}: accepting paused")
                self._give_up()

    def connected(self, sock: Socket, events: int) -> None:
        """Join the two sides. What the client has sent meanwhile is sent on."""
        self._connected = True
        client = self.client
        plane = self.plane
        side = self.upstream = Side(self, sock, plane, held=False)
        side.peer = client
        client.peer = side
        plane.poller.handlers[sock.fileno()] = side.ready
        client.release()
        if events & _DATA_EVENTS and not self.done:
            side.ready(events)

    # -- the end ---------------------------------------------------------------------------------------------

    def reset_by(self, side: Side) -> None:
        """Pass a reset on."""
        if side is self.client:
            self.finish("reset by client", reset_upstream=True)
        else:
            self.finish("reset by endpoint", reset_client=True)

    def write_failed(self, side: Side) -> None:
        """Pass on the reset that a write to `side` met, after the bytes that side had sent before."""
        peer = side.peer
        view = self.plane.view
        if peer.pending is None and not side.eof:
            try:
                while size := side.sock.recv_into(view, 0, _NOWAIT):
                    side.moved += size
                    if peer.sock.send(view[:size], _NOWAIT) != size:
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
        plane = self.plane
        counters = plane.counters
        self.done = True
        client = self.client
        self._close(client, reset_client)
        if self._connected:
            upstream = self.upstream
            self._close(upstream, reset_upstream)
            del client.peer, upstream.peer, self.upstream  # or they would wait for the garbage collector
            self._count_bytes(client.moved, upstream.moved)
            assert self._endpoint is not None
            counters[self._endpoint.row + CLOSED] += 1
        else:
            plane.dialling.pop(self, None)
            if self._socket is not None:
                plane.poller.close(self._socket)
                self._socket = None
        del self.client
        counters[self._balancer.row + CLOSED] += 1
        if plane.records:
            self._record(reason)
        self._forget_endpoint()
        plane.closed(self)
        self.listener.relay_ended()

    def _close(self, side: Side, reset: bool) -> None:
        side.held = True  # it may have asked for another turn
        if side.pending is not None:
            self.plane.keep(-len(side.pending))
            if isinstance(side.pending, Pipe):
                self.plane.pipes.give(side.pending)
            side.pending = None
        if reset:
            close_with_reset(self.plane, side.sock)
        else:
            self.plane.poller.close(side.sock)

    # -- figures ---------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Bring the counters up to date; end the relay if it is idle for too long. Called once a second."""
        if not self._connected:
            return
        bytes_in, bytes_out = self.client.moved, self.upstream.moved
        if bytes_in != self._counted_in or bytes_out != self._counted_out:
            self._count_bytes(bytes_in, bytes_out)
            self._idle_since = now
        elif self.plane.idle_seconds and now - self._idle_since >= self.plane.idle_seconds:
            # Nothing was read. But a slow reader may be taking bytes that were read before, megabytes of
            # them.
            unsent = self.client.unsent() + self.upstream.unsent()
            if not unsent or unsent == self._unsent:
                self.abort("idle")
                return
            self._unsent = unsent
            self._idle_since = now
        self._ticks += 1
        if self._ticks == _KEEPALIVE_TICKS:
            for level, option, value in _KEEPALIVE:
                self.upstream.sock.setsockopt(level, option, value)

    def _count_bytes(self, bytes_in: int, bytes_out: int) -> None:
        """Add the bytes that were moved since the last call."""
        counters = self.plane.counters
        more_in, more_out = bytes_in - self._counted_in, bytes_out - self._counted_out
        self._counted_in, self._counted_out = bytes_in, bytes_out
        assert self._endpoint is not None
        own, row = self._balancer.row, self._endpoint.row
        if more_in:
            counters[own + BYTES_IN] += more_in
            counters[row + BYTES_IN] += more_in
        if more_out:
            counters[own + BYTES_OUT] += more_out
            counters[row + BYTES_OUT] += more_out

    @property
    def service(self) -> str:
        """Name of its service port, namespace/name:port."""
        return self._balancer.name

    def live(self, now: float) -> LiveConnection | None:
        """What it is and does at this moment; None where it has ended."""
        if self.done:
            return None
        state = "connecting"
        if self._connected:
            state = "half-closed" if self.client.eof or self.upstream.eof else "established"
        return LiveConnection(
            client=address_text(*self._address[:2]),
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
        record = Connection(
            client=address_text(*self._address[:2]),
            frontend=self.listener.address,
            service=self._balancer.name,
            endpoint=str(self._endpoint or ""),
            attempts=self.attempts,
            bytes_in=self._counted_in,
            bytes_out=self._counted_out,
            seconds=self.plane.now() - self._started,
            reason=reason,
            finished=time.time(),
        )
        self.plane.reporter.record(record)
