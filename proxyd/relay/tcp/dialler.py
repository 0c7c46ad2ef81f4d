"""The first part of a TCP relay's life: connect to an endpoint, or to another where that fails, without holding up others."""

from __future__ import annotations

import errno
import os
import socket
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory
from abc import abstractmethod

from proxyd.relay.engine.balancer import Balancer, Endpoint
from proxyd.relay.engine.dialling import (
    DIAL_TIMEOUTS,
    MAX_ATTEMPTS,
    MAX_SHORTAGES,
    SHORTAGES,
    Owner,
    close_with_reset,
)
from proxyd.relay.engine.plane import PAUSE_SECONDS, Plane
from proxyd.relay.engine.poller import ERR, HUP, events_now
from proxyd.relay.ipc.slots import ATTEMPTS, CONNECT_US, FAILED, OPENED

# Looked up once; `socket` has some as members of an enumeration.
_STREAM = int(socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
_TCP = socket.IPPROTO_TCP
_NODELAY = socket.TCP_NODELAY
_IN_PROGRESS = errno.EINPROGRESS
_FAILED_EVENTS = ERR | HUP


class Dialler:
    """One accepted connection, until an endpoint has taken it.

    Args:
        listener: that accepted it.
        address: of the client.
    """

    __slots__ = (
        "_address", "_balancer", "_dial_started", "_endpoint", "_plane", "_refused", "_shortages", "_socket",
        "_timed_out", "attempts", "listener",
    )  # fmt: skip

    _endpoint: Endpoint | None  # chosen at present
    _socket: Socket | None  # while dialling

    def __init__(self, listener: Owner, address: tuple[str, int]) -> None:
        self.listener = listener
        self.attempts = 0
        self._plane: Plane = listener.plane
        self._balancer: Balancer = listener.balancer  # stays, whatever becomes of the listener
        self._address = address
        self._endpoint = None
        self._socket = None
        self._refused: tuple[Endpoint, ...] = ()
        self._timed_out: tuple[Endpoint, ...] = ()
        self._shortages = 0
        self._dial_started = listener.plane.now()

    @abstractmethod
    def connected(self, sock: Socket, events: int) -> None:
        """Take the connected socket, and the events that were reported with the connection."""

    @abstractmethod
    def finish(self, reason: str, *, reset_client: bool = False, reset_upstream: bool = False) -> None:
        """End."""

    @abstractmethod
    def tick(self, now: float) -> None:
        """Do what is done once a second."""

    @abstractmethod
    def crash(self) -> None:
        """End after an internal error."""

    def _dial(self) -> None:
        """Begin to connect to the next endpoint; when none is left, turn the client away."""
        plane = self._plane
        balancer = self._balancer
        counters = plane.counters
        now = self._dial_started
        unreached: tuple[
            Endpoint, ...
        ] = ()  # to which there is no local port left; to another there may be one
        while self.attempts < MAX_ATTEMPTS:
            if self._refused or self._timed_out or unreached:
                endpoint = self._another(now, unreached)
            else:
                endpoint = balancer.pick(self._address[0], now)
            if endpoint is None:
                break
            self._endpoint = endpoint
            try:
                sock = Socket(endpoint.family, _STREAM, 0)
            except OSError as error:
                if error.errno in SHORTAGES:
                    self._wait_for_resources(error.errno or 0)
                    return
                self._attempt_failed(error.errno or 0)
                continue
            self.attempts += 1
            counters[endpoint.row + ATTEMPTS] += 1
            counters[balancer.row + ATTEMPTS] += 1
            sock.setsockopt(_TCP, _NODELAY, 1)
            code = sock.connect_ex(endpoint.address)
            if code == _IN_PROGRESS or not code:
                try:
                    plane.poller.add(sock.fileno(), self._dialled)
                except OSError as error:
                    sock.close()
                    self._wait_for_resources(error.errno or 0)
                    return
                self._socket = sock
                plane.dial_until(self, now + DIAL_TIMEOUTS[len(self._timed_out)])
                return
            sock.close()
            if code == errno.EADDRNOTAVAIL:
                plane.reporter.trouble(
                    f"no local port left to connect to endpoint {endpoint} of {balancer.name}: accepting paused for it"
                )
                self._forget_endpoint()
                unreached = (*unreached, endpoint)
            elif code in SHORTAGES:
                self._wait_for_resources(code)
                return
            else:
                self._attempt_failed(code)
        if unreached:
            self._wait_for_port()
        else:
            self._give_up()

    def _another(self, now: float, unreached: tuple[Endpoint, ...]) -> Endpoint | None:
        """Choose an endpoint when some have failed."""
        balancer = self._balancer
        endpoint = balancer.pick(self._address[0], now, self._refused + self._timed_out + unreached)
        if endpoint is None and len(self._timed_out) < len(DIAL_TIMEOUTS):
            # Those that were slow to answer get a longer time; those that refused said no.
            endpoint = balancer.pick(self._address[0], now, self._refused + unreached)
        return endpoint

    def _dialled(self, events: int) -> None:
        """Take the outcome of an attempt."""
        sock = self._socket
        endpoint = self._endpoint
        assert sock is not None
        assert endpoint is not None
        if events & _FAILED_EVENTS or (endpoint.ephemeral and sock.getsockname()[:2] == endpoint.address):
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.ECONNREFUSED
            self._socket = None
            close_with_reset(self._plane, sock)
            self._attempt_failed(code)
            self._dial_started = self._plane.now()
            self._dial()
            return
        plane = self._plane
        counters = plane.counters
        del plane.dialling[self]
        micros = int((plane.now() - self._dial_started) * 1e6)
        balancer = self._balancer
        row = endpoint.row
        counters[row + OPENED] += 1
        counters[row + CONNECT_US] += micros
        counters[balancer.row + CONNECT_US] += micros
        if balancer.suspects:
            balancer.suspects.pop(endpoint, None)
        self._socket = None
        self.connected(sock, events)

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
        self._note_failure(os.strerror(code))

    def _note_failure(self, why: str) -> None:
        endpoint = self._endpoint
        assert endpoint is not None
        self._plane.counters[endpoint.row + FAILED] += 1
        self._balancer.failed(self._address[0], endpoint, self._dial_started)
        self._plane.reporter.endpoint_trouble(self._balancer.name, str(endpoint), why)
        self._plane.reporter.failure(self._balancer.name, str(endpoint), why)

    def _wait_for_resources(self, code: int) -> None:
        """Dial again when other relays may have ended. No endpoint is to blame."""
        self._forget_endpoint()
        self._plane.pause(f"{os.strerror(code)}: accepting paused")
        self._dial_later()

    def _wait_for_port(self) -> None:
        """Dial again when a local port may be free. Other services have other endpoints: only this listener rests."""
        self.listener.rest()
        self._dial_later()

    def _dial_later(self) -> None:
        self._shortages += 1
        if self._shortages > MAX_SHORTAGES:
            self._give_up()
        else:
            self._plane.dial_until(self, self._plane.now() + PAUSE_SECONDS)

    def _give_up(self) -> None:
        self._plane.counters[self._balancer.row + FAILED] += 1
        self._plane.reporter.failure(self._balancer.name, "", "no endpoint could be reached: client reset")
        self._forget_endpoint()
        self.finish("no endpoint", reset_client=True)

    def _forget_endpoint(self) -> None:
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None and self._balancer.affinity_seconds:
            self._balancer.ended(self._address[0], endpoint, self._plane.now())
