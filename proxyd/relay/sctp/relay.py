"""The life of an SCTP association: dial (`dialler`), move messages (`side`), shut down, be counted."""

from __future__ import annotations

import errno
import os
import time
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory

from proxyd.relay.engine.dialling import Owner, close_with_reset
from proxyd.relay.ipc.messages import Connection, LiveConnection, address_text
from proxyd.relay.ipc.slots import (
    BYTES_IN,
    BYTES_OUT,
    CLOSED,
    DATAGRAMS_IN,
    DATAGRAMS_OUT,
    DROPPED_TO_CLIENT,
    DROPPED_TO_ENDPOINT,
    OPENED,
)
from proxyd.relay.sctp.association import primary_address, streams_of
from proxyd.relay.sctp.dialler import SctpDialler
from proxyd.relay.sctp.shared import Shared
from proxyd.relay.sctp.side import EDGES, Side

# For the peer to take what is queued and to answer the shutdown. By then the kernel has given up by itself:
# its guard timer is five times the largest RTO, 300 s.
SHUTDOWN_SECONDS = 310.0


class SctpRelay(SctpDialler):
    """One accepted association, joined to its endpoint.

    Args:
        listener: accepted it.
        sock: the client's association; owned by the relay from now on.
        address: of the client.
        shared: by the relays of the worker.
    """

    __slots__ = ("_connected", "_counted", "_deadline", "_started", "client", "done", "upstream")

    client: Side
    upstream: Side  # once connected

    def __init__(self, listener: Owner, sock: Socket, address: tuple[str, int], shared: Shared) -> None:
        super().__init__(listener, address, streams_of(sock), shared)
        self.done = False
        self._connected = False
        self._deadline = 0.0  # of the shutdown
        self._counted = (0, 0, 0, 0)
        self._started = self._dial_started
        self.client = Side(self, sock, shared, held=True)

    def start(self) -> None:
        """Dial. The caller calls `crash` if this raises."""
        plane = self.plane
        plane.counters[self._balancer.row + OPENED] += 1
        plane.opened(self)
        try:
            plane.poller.add(self.client.sock.fileno(), self.client.ready, EDGES)
        except OSError as error:
            plane.pause(f"{os.strerror(error.errno or 0)}: accepting paused")
            self._give_up()
            return
        self._dial()

    def connected(self, sock: Socket, events: int) -> None:
        """Join the two sides, and send on what the client has sent meanwhile."""
        self._connected = True
        client = self.client
        side = self.upstream = Side(self, sock, self._shared, held=False)
        side.peer = client
        client.peer = side
        self.plane.poller.handlers[sock.fileno()] = side.ready
        client.release()
        if not self.done:
            side.ready(events)

    # -- the end ---------------------------------------------------------------------------------------------

    def reset_by(self, side: Side) -> None:
        """Pass an abort on. Messages that were sent before it have been passed on already."""
        if side is self.client:
            self.finish("reset by client", reset_upstream=True)
        else:
            self.finish("reset by endpoint", reset_client=True)

    def restarted(self, side: Side) -> None:
        """End: a peer has lost its association and set it up anew, so that its state is gone."""
        self.finish(f"restarted by {self._name(side)}", reset_client=True, reset_upstream=True)

    def send_failed(self, side: Side, error: OSError, stream: int, size: int) -> bool:
        """Act on a message that can't be sent to `side`; whether the relay goes on without it."""
        if error.errno == errno.EPIPE:
            # The side shuts down, or was aborted: its own events tell.
            side.deaf = True
            self.count_dropped(side)
            return True
        if error.errno == errno.EINVAL:
            self.count_dropped(side)
            self._blame(
                f"stream {stream} was used, which the {self._name(side)} does not have: association aborted"
            )
            self.abort("stream not granted")
        elif error.errno == errno.EMSGSIZE:
            self.count_dropped(side)
            self._blame(
                f"a message of {size} bytes is larger than the send buffer: association aborted; "
                "raise net.core.wmem_max"
            )
            self.abort("message too long")
        else:
            self.reset_by(side)
        return False

    def too_long(self, side: Side) -> None:
        """End: a message from `side` is longer than any that is relayed."""
        self.count_dropped(side.peer)
        self._blame(
            f"the {self._name(side)} sent a message of more than {self._shared.max_message} bytes: "
            "association aborted; --sctp-max-message says how long they may be"
        )
        self.abort("message too long")

    def _name(self, side: Side) -> str:
        return "client" if side is self.client else "endpoint"

    def closing(self) -> None:
        """Note that one direction has ended: the other must follow within SHUTDOWN_SECONDS."""
        if not self._deadline:
            self._deadline = self.plane.now() + SHUTDOWN_SECONDS

    def side_over(self) -> None:
        """End, if both associations have come to their end."""
        if self.client.over and self.upstream.over:
            self.finish("closed")

    def abort(self, reason: str) -> None:
        """End at once, with an ABORT to both ends."""
        if not self.done:
            self.finish(reason, reset_client=True, reset_upstream=True)

    def crash(self) -> None:
        """End after an internal error."""
        self.abort("internal error")

    def finish(self, reason: str, *, reset_client: bool = False, reset_upstream: bool = False) -> None:
        """Close both sockets and count."""
        if self.done:
            return
        plane = self.plane
        self.done = True
        client = self.client
        if self._connected:
            upstream = self.upstream
            client.drop_pending()
            upstream.drop_pending()
            self._count()
            self._close(client, reset_client)
            self._close(upstream, reset_upstream)
            del client.peer, upstream.peer, self.upstream  # or they would wait for the garbage collector
        else:
            self._close(client, reset_client)
            plane.dialling.pop(self, None)
            if self._socket is not None:
                close_with_reset(plane, self._socket)
                self._socket = None
        del self.client
        counters = plane.counters
        counters[self._balancer.row + CLOSED] += 1
        if self._endpoint is not None and self._connected:
            counters[self._endpoint.row + CLOSED] += 1
        if plane.records:
            self._record(reason)
        self._forget_endpoint()
        plane.closed(self)
        self.listener.relay_ended()

    def _close(self, side: Side, reset: bool) -> None:
        side.held = True  # it may have asked for another turn
        side.forget_parts()
        if reset:
            close_with_reset(self.plane, side.sock)
        else:
            self.plane.poller.close(side.sock)

    # -- figures ---------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Bring the counters up to date, and end a shutdown that nobody answers. Called once a second."""
        if not self._connected:
            return
        self._count()
        if self._deadline and now >= self._deadline:
            self.abort("shutdown not answered")
            return
        for side in (self.client, self.upstream):
            if not self.done:
                side.retry()

    def count_dropped(self, side: Side) -> None:
        """Count a message that could not be sent on to `side`."""
        field = DROPPED_TO_CLIENT if side is self.client else DROPPED_TO_ENDPOINT
        self.plane.counters[self._balancer.row + field] += 1
        if self._endpoint is not None:
            self.plane.counters[self._endpoint.row + field] += 1

    def _count(self) -> None:
        """Add what was moved since the last call."""
        client, upstream = self.client, self.upstream
        moved = (client.bytes, upstream.bytes, client.messages, upstream.messages)
        if moved == self._counted:
            return
        counters, endpoint = self.plane.counters, self._endpoint
        assert endpoint is not None
        for field, new, old in zip(_MOVED, moved, self._counted, strict=True):
            counters[self._balancer.row + field] += new - old
            counters[endpoint.row + field] += new - old
        self._counted = moved

    @property
    def service(self) -> str:
        """Name of its service port, namespace/name:port."""
        return self._balancer.name

    def live(self, now: float) -> LiveConnection | None:
        """What it is and does at this moment; None where it has ended."""
        if self.done:
            return None
        state, endpoint_path = "connecting", ""
        moved = self._counted
        if self._connected:
            state = "closing" if self._deadline else "established"
            endpoint_path = primary_address(self.upstream.sock)
            moved = (self.client.bytes, self.upstream.bytes, self.client.messages, self.upstream.messages)
        return LiveConnection(
            client=address_text(*self._address),
            frontend=self.listener.address,
            service=self._balancer.name,
            endpoint=str(self._endpoint or ""),
            protocol="SCTP",
            seconds=now - self._started,
            bytes_in=moved[0],
            bytes_out=moved[1],
            state=state,
            streams=self._streams,
            paths=(primary_address(self.client.sock), endpoint_path),
        )

    def _record(self, reason: str) -> None:
        record = Connection(
            client=address_text(*self._address),
            frontend=self.listener.address,
            service=self._balancer.name,
            endpoint=str(self._endpoint or ""),
            attempts=self.attempts,
            bytes_in=self._counted[0],
            bytes_out=self._counted[1],
            seconds=self.plane.now() - self._started,
            reason=reason,
            finished=time.time(),
            protocol="SCTP",
            streams=self._streams,
            messages=(self._counted[2], self._counted[3]),
        )
        self.plane.reporter.record(record)


_MOVED = (BYTES_IN, BYTES_OUT, DATAGRAMS_IN, DATAGRAMS_OUT)
