"""A TCP relay while it connects: to one endpoint or, where that fails, to another; nobody else is held up."""

from __future__ import annotations

import errno
import socket
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory

from proxyd.relay.engine.balancer import Endpoint
from proxyd.relay.engine.dialling import DIAL_TIMEOUTS, MAX_ATTEMPTS, SHORTAGES, Dialling
from proxyd.relay.engine.poller import ERR, HUP
from proxyd.relay.ipc.slots import ATTEMPTS, CONNECT_US, OPENED
from proxyd.state.marks import OWN_PRIORITY

# Looked up once; `socket` has some as members of an enumeration.
_STREAM = int(socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
_TCP = socket.IPPROTO_TCP
_NODELAY = socket.TCP_NODELAY
_SOCKET = socket.SOL_SOCKET
_PRIORITY = socket.SO_PRIORITY
_IN_PROGRESS = errno.EINPROGRESS
_FAILED_EVENTS = ERR | HUP


class Dialler(Dialling):
    """One accepted connection, until an endpoint has taken it."""

    __slots__ = ()

    NO_ANSWER = "no answer to connect"
    GIVEN_UP = "no endpoint could be reached: client reset"

    def _dial(self) -> None:
        """Begin to connect to the next endpoint; when none is left, turn the client away."""
        plane = self.plane
        balancer = self._balancer
        counters = plane.counters
        now = self._dial_started
        # To these no local port is left; to another there may be one.
        unreached: tuple[Endpoint, ...] = ()
        while self.attempts < MAX_ATTEMPTS:
            if self._refused or self._timed_out or unreached:
                endpoint = self._another(unreached)
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
            sock.setsockopt(_SOCKET, _PRIORITY, OWN_PRIORITY)  # or it might be steered to a listener of ours
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
                    f"no local port left to connect to endpoint {endpoint} of {balancer.name}: "
                    "accepting paused for it"
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

    def _dialled(self, events: int) -> None:
        sock = self._socket
        endpoint = self._endpoint
        assert sock is not None
        assert endpoint is not None
        # Towards an address of this node the kernel may pick the very port that is dialled. If nobody listens
        # there, the socket is connected to itself. The range it picks from may change, so each one is checked.
        if events & _FAILED_EVENTS or sock.getsockname()[:2] == endpoint.address:
            self._dial_after_error(sock)
            return
        plane = self.plane
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

    def _wait_for_port(self) -> None:
        """Dial again when a local port may be free. Only this listener rests: others have other endpoints."""
        self.listener.rest()
        self._dial_later()
