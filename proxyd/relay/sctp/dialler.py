"""An SCTP relay while it connects: to one endpoint, by each of its addresses, or to another."""

from __future__ import annotations

from proxyd.relay.engine.balancer import Endpoint
from proxyd.relay.engine.dialling import DIAL_TIMEOUTS, MAX_ATTEMPTS, SHORTAGES, Dialling, Owner
from proxyd.relay.engine.poller import ERR
from proxyd.relay.ipc.slots import ATTEMPTS, CONNECT_US, OPENED
from proxyd.relay.sctp.association import NoRoomError, connect
from proxyd.relay.sctp.shared import Shared
from proxyd.relay.sctp.side import EDGES

Streams = tuple[int, int]  # client to endpoint, endpoint to client


class SctpDialler(Dialling):
    """One accepted association, until an endpoint has taken it.

    Args:
        listener: accepted it.
        address: of the client.
        streams: of the client's association, which are offered to the endpoint.
        shared: by the relays of the worker.
    """

    __slots__ = ("_alternate", "_shared", "_streams")

    NO_ANSWER = "no answer to INIT"
    GIVEN_UP = "no endpoint could be reached: client aborted"

    def __init__(self, listener: Owner, address: tuple[str, int], streams: Streams, shared: Shared) -> None:
        super().__init__(listener, address)
        self._alternate = 0  # further addresses of the endpoint that were tried
        self._streams = streams
        self._shared = shared

    def _dial(self) -> None:
        while self.attempts < MAX_ATTEMPTS:
            endpoint = self._endpoint
            if not self._alternate or endpoint is None:
                endpoint = self._another()
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

    def _first_address(self, endpoint: Endpoint) -> int:
        """Index of the address to try first: the one that answered last; after failures another."""
        return endpoint.answered + self._alternate + sum(one is endpoint for one in self._timed_out)

    def _dialled(self, events: int) -> None:
        sock, endpoint = self._socket, self._endpoint
        assert sock is not None
        assert endpoint is not None
        if events & ERR:
            self._dial_after_error(sock)
            return
        plane = self.plane
        counters = plane.counters
        del plane.dialling[self]
        micros = int((plane.now() - self._dial_started) * 1e6)
        counters[endpoint.row + OPENED] += 1
        counters[endpoint.row + CONNECT_US] += micros
        counters[self._balancer.row + CONNECT_US] += micros
        self._balancer.suspects.pop(endpoint, None)
        endpoint.answered = self._first_address(endpoint) % (1 + len(endpoint.further))
        self._socket = None
        self.connected(sock, events)

    def _attempt_failed(self, code: int) -> None:
        """Go on to the endpoint's next address; an endpoint without one is counted out."""
        assert self._endpoint is not None
        if self._alternate < len(self._endpoint.further):
            self._alternate += 1
            return
        self._alternate = 0
        super()._attempt_failed(code)

    def _attempt_timed_out(self) -> None:
        self._alternate = 0
        super()._attempt_timed_out()

    def _wait_for_resources(self, code: int) -> None:
        self._alternate = 0
        if code in SHORTAGES:
            super()._wait_for_resources(code)
            return
        self._forget_endpoint()
        self.plane.reporter.trouble(
            f"no local port left to connect to an endpoint of {self._balancer.name}: "
            "each association takes one; widen net.ipv4.ip_local_port_range"
        )
        self._dial_later()
