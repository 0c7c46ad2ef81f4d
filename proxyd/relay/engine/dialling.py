"""A relay of TCP or SCTP while it connects to an endpoint: what the two have in common."""

from __future__ import annotations

import errno
import os
import socket
import struct
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory
from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

from proxyd.relay.engine.balancer import Balancer, Endpoint
from proxyd.relay.engine.plane import PAUSE_SECONDS, Plane
from proxyd.relay.engine.poller import events_now
from proxyd.relay.ipc.slots import FAILED

# Seconds given to each attempt that is not answered (kubernetes pkg/proxy/userspace, EndpointDialTimeouts).
DIAL_TIMEOUTS = (0.25, 0.5, 1.0, 2.0)
# Refusals cost no time but do cost work: a service of thousands of dead endpoints must not eat the worker.
MAX_ATTEMPTS = 64
# How often a relay waits for a descriptor, for memory or for a local port, each time PAUSE_SECONDS.
MAX_SHORTAGES = 20
SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Owner(Protocol):
    """The listener that accepted a relay's client, as the relay sees it."""

    address: str  # ip:port
    balancer: Balancer  # of new relays
    plane: Plane

    def rest(self) -> None:
        """Accept nothing for a moment."""

    def relay_ended(self) -> None:
        """Count a relay out."""


def close_with_reset(plane: Plane, sock: Socket) -> None:
    """Close so that the other end sees a reset, of SCTP an ABORT."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    finally:
        plane.poller.close(sock)


class Dialling(ABC):
    """A relay, until an endpoint has taken its client. A subclass says how one attempt is made.

    Args:
        listener: accepted the client.
        address: of the client.
    """

    __slots__ = (
        "_address", "_balancer", "_dial_started", "_endpoint", "_refused", "_shortages", "_socket",
        "_timed_out", "attempts", "listener", "plane",
    )  # fmt: skip

    # What operators read.
    NO_ANSWER: ClassVar[str]
    GIVEN_UP: ClassVar[str]

    _endpoint: Endpoint | None  # the one that is dialled, or has taken the client
    _socket: Socket | None  # while dialling

    def __init__(self, listener: Owner, address: tuple[str, int]) -> None:
        self.listener = listener
        self.plane: Plane = listener.plane
        self.attempts = 0
        self._balancer: Balancer = listener.balancer  # stays the same, whatever becomes of the listener
        self._address = address
        self._endpoint = None
        self._socket = None
        self._refused: tuple[Endpoint, ...] = ()
        self._timed_out: tuple[Endpoint, ...] = ()
        self._shortages = 0
        self._dial_started = listener.plane.now()

    @abstractmethod
    def _dial(self) -> None:
        """Begin to connect to the next endpoint; when none is left, turn the client away."""

    @abstractmethod
    def _dialled(self, events: int) -> None:
        """Act on the outcome of an attempt."""

    @abstractmethod
    def connected(self, sock: Socket, events: int) -> None:
        """Take the connected socket, and the events that were reported with the connection."""

    @abstractmethod
    def finish(self, reason: str, *, reset_client: bool = False, reset_upstream: bool = False) -> None:
        """End, and count the relay out."""

    @abstractmethod
    def tick(self, now: float) -> None:
        """Do what is done once a second."""

    @abstractmethod
    def crash(self) -> None:
        """End after an internal error."""

    def dial_due(self, now: float) -> None:
        """Give up the endpoint that has not answered in time."""
        sock = self._socket
        if sock is not None and (events := events_now(sock.fileno())):
            # It has answered, but this worker was too busy to see it.
            self._dialled(events)
            return
        del self.plane.dialling[self]
        self._dial_started = now
        if sock is not None:
            self._socket = None
            close_with_reset(self.plane, sock)
            self._attempt_timed_out()
            if len(self._timed_out) >= len(DIAL_TIMEOUTS):
                self._give_up()
                return
        self._dial()

    def _another(self, unreached: tuple[Endpoint, ...] = ()) -> Endpoint | None:
        """Choose an endpoint other than those that have failed, and those in `unreached`."""
        balancer, client, now = self._balancer, self._address[0], self._dial_started
        endpoint = balancer.pick(client, now, self._refused + self._timed_out + unreached)
        if endpoint is None and len(self._timed_out) < len(DIAL_TIMEOUTS):
            # Those that were slow to answer get a longer time; those that refused said no.
            endpoint = balancer.pick(client, now, self._refused + unreached)
        return endpoint

    def _dial_after_error(self, sock: Socket) -> None:
        """Close the socket of an attempt that has failed, and dial again."""
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.ECONNREFUSED
        self._socket = None
        close_with_reset(self.plane, sock)
        self._attempt_failed(code)
        self._dial_started = self.plane.now()
        self._dial()

    def _attempt_failed(self, code: int) -> None:
        """Count out an endpoint that could not be reached; `code` is the errno."""
        assert self._endpoint is not None
        self._refused = (*self._refused, self._endpoint)
        self._note_failure(os.strerror(code))

    def _attempt_timed_out(self) -> None:
        """Count out, for now, an endpoint that did not answer."""
        assert self._endpoint is not None
        self._timed_out = (*self._timed_out, self._endpoint)
        self._note_failure(self.NO_ANSWER)

    def _note_failure(self, why: str) -> None:
        endpoint = self._endpoint
        assert endpoint is not None
        self.plane.counters[endpoint.row + FAILED] += 1
        self._balancer.failed(self._address[0], endpoint, self._dial_started)
        self._blame(why)

    def _blame(self, why: str) -> None:
        """Report trouble that is the endpoint's."""
        service, endpoint, reporter = self._balancer.name, str(self._endpoint or ""), self.plane.reporter
        reporter.endpoint_trouble(service, endpoint, why)
        reporter.failure(service, endpoint, why)

    def _wait_for_resources(self, code: int) -> None:
        """Dial again when other relays may have ended. No endpoint is to blame."""
        self._forget_endpoint()
        self.plane.pause(f"{os.strerror(code)}: accepting paused")
        self._dial_later()

    def _dial_later(self) -> None:
        self._shortages += 1
        if self._shortages > MAX_SHORTAGES:
            self._give_up()
        else:
            self.plane.dial_until(self, self.plane.now() + PAUSE_SECONDS)

    def _give_up(self) -> None:
        self.plane.counters[self._balancer.row + FAILED] += 1
        self.plane.reporter.failure(self._balancer.name, "", self.GIVEN_UP)
        self._forget_endpoint()
        self.finish("no endpoint", reset_client=True)

    def _forget_endpoint(self) -> None:
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None and self._balancer.affinity_seconds:
            self._balancer.ended(self._address[0], endpoint, self.plane.now())
