"""The life of one SCTP association: dial an endpoint, or another; be pumped; shut down or abort, and be counted."""

from __future__ import annotations

import errno
import os
import socket
import time
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory

from proxyd.relay.engine.balancer import Endpoint
from proxyd.relay.engine.dialling import (
    DIAL_TIMEOUTS,
    MAX_ATTEMPTS,
    MAX_SHORTAGES,
    SHORTAGES,
    Owner,
    close_with_reset,
)
from proxyd.relay.engine.plane import PAUSE_SECONDS, Plane
from proxyd.relay.engine.poller import ERR, events_now
from proxyd.relay.ipc.messages import Connection, LiveConnection, address_text
from proxyd.relay.ipc.slots import (
    ATTEMPTS,
    BYTES_IN,
    BYTES_OUT,
    CLOSED,
    CONNECT_US,
    DATAGRAMS_IN,
    DATAGRAMS_OUT,
    DROPPED_TO_CLIENT,
    DROPPED_TO_ENDPOINT,
    FAILED,
    OPENED,
)
from proxyd.relay.sctp.association import NoRoomError, connect, streams_of
from proxyd.relay.sctp.shared import Shared
from proxyd.relay.sctp.side import EDGES, Side
from proxyd.state.sctpsocket import SOL_SCTP, STATUS, STATUS_BYTES, Status, status

# For what is queued to be taken and the shutdown to be answered; by then the kernel has given up by itself
# (its guard timer: five times the largest RTO, 300 s).
SHUTDOWN_SECONDS = 310.0

Streams = tuple[int, int]  # client to endpoint, endpoint to client


class SctpRelay:
    """One accepted association, joined to its endpoint.

    Args:
        listener: that accepted it.
        sock: the client's association; owned from now on.
        address: of the client.
        shared: by the relays of the worker.
    """

    __slots__ = (
        "_address", "_alternate", "_balancer", "_connected", "_counted", "_deadline", "_dial_started", "_endpoint",
        "_refused", "_shared", "_shortages", "_socket", "_started", "_streams", "_timed_out", "attempts", "client", "done",
        "listener", "plane", "upstream",
    )  # fmt: skip

    upstream: Side  # once connected
    _endpoint: Endpoint | None  # chosen at present
    _socket: Socket | None  # while dialling

    def __init__(self, listener: Owner, sock: Socket, address: tuple[str, int], shared: Shared) -> None:
        self.listener = listener
        self.attempts = 0
        self.done = False
        self.plane: Plane = listener.plane
        self._balancer = listener.balancer  # stays, whatever becomes of the listener
        self._address = address
        self._endpoint = None
        self._socket = None
        self._connected = False
        self._alternate = 0  # further addresses of the endpoint that were tried
        self._refused: tuple[Endpoint, ...] = ()
        self._timed_out: tuple[Endpoint, ...] = ()
        self._shortages = 0
        self._deadline = 0.0  # of the shutdown
        self._counted = (0, 0, 0, 0)
        self._started = self._dial_started = listener.plane.now()
        self._shared = shared
        self._streams: Streams = streams_of(sock)
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

    # -- dialling --------------------------------------------------------------------------------------------

    def _dial(self) -> None:
        """Begin to connect to the next endpoint; when none is left, turn the client away."""
        while self.attempts < MAX_ATTEMPTS:
            endpoint = self._next_endpoint()
            if endpoint is None:
                break
            self._endpoint = endpoint
            self.attempts += 1
            self.plane.counters[endpoint.row + ATTEMPTS] += 1
            self.plane.counters[self._balancer.row + ATTEMPTS] += 1
            try:
                sock = connect(endpoint, self._first_address(endpoint), self._streams, self._shared)
            except NoRoomError as error:
                self._wait_for_resources(error.code)
                return
            except OSError as error:
                self._attempt_failed(error.errno or 0)
                continue
            try:
                self.plane.poller.add(sock.fileno(), self._dialled, EDGES)
            except OSError as error:
                sock.close()
                self._wait_for_resources(error.errno or 0)
                return
            self._socket = sock
            self.plane.dial_until(self, self._dial_started + DIAL_TIMEOUTS[len(self._timed_out)])
            return
        self._give_up()

    def _next_endpoint(self) -> Endpoint | None:
        """The endpoint to try: the same one while it has an address left that was not, or else another."""
        endpoint = self._endpoint
        if self._alternate and endpoint is not None:
            return endpoint
        now, balancer, client = self._dial_started, self._balancer, self._address[0]
        endpoint = balancer.pick(client, now, (*self._refused, *self._timed_out))
        if endpoint is None and len(self._timed_out) < len(DIAL_TIMEOUTS):
            # Those that were slow to answer get a longer time; those that refused said no.
            endpoint = balancer.pick(client, now, self._refused)
        return endpoint

    def _first_address(self, endpoint: Endpoint) -> int:
        """Which of the endpoint's addresses to try first: the one that answered last, or after failures another."""
        return endpoint.answered + self._alternate + sum(one is endpoint for one in self._timed_out)

    def _dialled(self, events: int) -> None:
        """Take the outcome of an attempt."""
        sock, endpoint = self._socket, self._endpoint
        assert sock is not None
        assert endpoint is not None
        plane = self.plane
        if events & ERR:
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.ECONNREFUSED
            self._socket = None
            close_with_reset(plane, sock)
            self._attempt_failed(code)
            self._dial_started = self.plane.now()
            self._dial()
            return
        counters = plane.counters
        del plane.dialling[self]
        micros = int((plane.now() - self._dial_started) * 1e6)
        counters[endpoint.row + OPENED] += 1
        counters[endpoint.row + CONNECT_US] += micros
        counters[self._balancer.row + CONNECT_US] += micros
        self._balancer.suspects.pop(endpoint, None)
        endpoint.answered = self._first_address(endpoint) % (1 + len(endpoint.further))
        self._socket = None
        self._connected = True
        client = self.client
        side = self.upstream = Side(self, sock, self._shared, held=False)
        side.peer = client
        client.peer = side
        plane.poller.handlers[sock.fileno()] = side.ready
        client.release()
        if not self.done:
            side.ready(events)

    def dial_due(self, now: float) -> None:
        """Give up the endpoint that has not answered in time."""
        if self._socket is not None and (events := events_now(self._socket.fileno())):
            # It has; this worker was too busy to see it before.
            self._dialled(events)
            return
        del self.plane.dialling[self]
        self._dial_started = now
        if self._socket is not None:
            sock, self._socket = self._socket, None
            close_with_reset(self.plane, sock)
            assert self._endpoint is not None
            self._timed_out = (*self._timed_out, self._endpoint)
            self._alternate = 0
            self._note_failure("no answer to INIT")
            if len(self._timed_out) >= len(DIAL_TIMEOUTS):
                self._give_up()
                return
        self._dial()

    def _attempt_failed(self, code: int) -> None:
        endpoint = self._endpoint
        assert endpoint is not None
        self.plane.dialling.pop(self, None)
        if self._alternate < len(endpoint.further):
            self._alternate += 1
            return
        self._alternate = 0
        self._refused = (*self._refused, endpoint)
        self._note_failure(os.strerror(code))

    def _note_failure(self, why: str) -> None:
        endpoint = self._endpoint
        assert endpoint is not None
        self.plane.counters[endpoint.row + FAILED] += 1
        self._balancer.failed(self._address[0], endpoint, self._dial_started)
        self._trouble(why)

    def _trouble(self, why: str) -> None:
        """Tell of something that the endpoint is to blame for."""
        name, reporter = self._balancer.name, self.plane.reporter
        reporter.endpoint_trouble(name, str(self._endpoint), why)
        reporter.failure(name, str(self._endpoint or ""), why)

    def _wait_for_resources(self, code: int) -> None:
        """Dial again when other relays may have ended. No endpoint is to blame."""
        self._forget_endpoint()
        self._alternate = 0
        self._shortages += 1
        if code in SHORTAGES:
            self.plane.pause(f"{os.strerror(code)}: accepting paused")
        else:
            self.plane.reporter.trouble(
                f"no local port left to connect to an endpoint of {self._balancer.name}: each association takes one; "
                "widen net.ipv4.ip_local_port_range"
            )
        if self._shortages > MAX_SHORTAGES:
            self._give_up()
        else:
            self.plane.dial_until(self, self.plane.now() + PAUSE_SECONDS)

    def _give_up(self) -> None:
        self.plane.counters[self._balancer.row + FAILED] += 1
        self.plane.reporter.failure(self._balancer.name, "", "no endpoint could be reached: client aborted")
        self._forget_endpoint()
        self.finish("no endpoint", reset_client=True)

    # -- the end ---------------------------------------------------------------------------------------------

    def reset_by(self, side: Side) -> None:
        """Pass an abort on. What was sent before it has been passed on already."""
        if side is self.client:
            self.finish("reset by client", reset_upstream=True)
        else:
            self.finish("reset by endpoint", reset_client=True)

    def restarted(self, side: Side) -> None:
        """A peer has lost its association and set it up anew: what the other one knows of it is of no use any more."""
        self.finish(f"restarted by {self._name(side)}", reset_client=True, reset_upstream=True)

    def send_failed(self, side: Side, error: OSError, stream: int, size: int) -> bool:
        """A message can't be sent to `side`; whether the relay goes on without it."""
        if error.errno == errno.EPIPE:
            # It shuts down, or was aborted: its own events tell.
            side.deaf = True
            self.count_dropped(side)
            return True
        if error.errno == errno.EINVAL:
            self.count_dropped(side)
            self._trouble(
                f"stream {stream} was used, which the {self._name(side)} does not have: association aborted"
            )
            self.abort("stream not granted")
        elif error.errno == errno.EMSGSIZE:
            self.count_dropped(side)
            self._trouble(
                f"a message of {size} bytes is larger than the send buffer: association aborted; "
                "raise net.core.wmem_max"
            )
            self.abort("message too long")
        else:
            self.reset_by(side)
        return False

    def too_long(self, side: Side) -> None:
        """A message from `side` is longer than those that are relayed."""
        self.count_dropped(side.peer)
        self._trouble(
            f"the {self._name(side)} sent a message of more than {self._shared.max_message} bytes: "
            "association aborted; --sctp-max-message says how long they may be"
        )
        self.abort("message too long")

    def _name(self, side: Side) -> str:
        return "client" if side is self.client else "endpoint"

    def closing(self) -> None:
        """One direction has ended: the rest must follow within SHUTDOWN_SECONDS."""
        if not self._deadline:
            self._deadline = self.plane.now() + SHUTDOWN_SECONDS

    def side_over(self) -> None:
        """One association has come to its end."""
        if self.client.over and self.upstream.over:
            self.finish("closed")

    def abort(self, reason: str) -> None:
        """End at once, both associations with an abort."""
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
        side.held = True  # another turn may have been asked for
        side.forget_parts()
        if reset:
            close_with_reset(self.plane, side.sock)
        else:
            self.plane.poller.close(side.sock)

    def _forget_endpoint(self) -> None:
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None and self._balancer.affinity_seconds:
            self._balancer.ended(self._address[0], endpoint, self.plane.now())

    # -- figures ---------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Bring the counters up to date; end a shutdown that nobody answers. Called once a second."""
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
            endpoint_path = _primary(self.upstream.sock)
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
            paths=(_primary(self.client.sock), endpoint_path),
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


def association_status(sock: Socket) -> Status | None:
    """What the kernel says of an association; None where it has ended."""
    try:
        return status(sock.getsockopt(SOL_SCTP, STATUS, STATUS_BYTES))
    except OSError:
        return None


def _primary(sock: Socket) -> str:
    found = association_status(sock)
    return found.primary if found else ""
