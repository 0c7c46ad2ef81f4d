"""A TCP relay while it connects: endpoints that refuse or do not answer, shortages, clients that do not wait.

Sockets are real, on loopback; the clock is the test's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from _socket import socket as Socket  # noqa: N812 a class; what a listener makes of a descriptor
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from proxyd.relay.engine.balancer import Balancer, Endpoint
from proxyd.relay.engine.dialling import DIAL_TIMEOUTS, MAX_ATTEMPTS, MAX_SHORTAGES
from proxyd.relay.engine.plane import DIAL_SCAN_SECONDS, PAUSE_SECONDS
from proxyd.relay.ipc.messages import Failure
from proxyd.relay.ipc.options import Options
from proxyd.relay.ipc.slots import ATTEMPTS, CLOSED, CONNECT_US, FAILED, OPENED
from proxyd.relay.tcp import dialler
from proxyd.relay.tcp.relay import Relay
from tests.support.plane import PlaneLab, closed_port, no_descriptors

SERVICE = "prod/web"
GIVEN_UP = Failure(SERVICE, "", "no endpoint could be reached: client reset", 1)
RESET = b"reset"


class Listener:
    """Accepted the clients."""

    address = "10.0.0.10:80"

    def __init__(self, lab: Lab) -> None:
        self.balancer = lab.balancer
        self.plane = lab.plane
        self.rests = 0
        self.ended = 0

    def rest(self) -> None:
        self.rests += 1

    def relay_ended(self) -> None:
        self.ended += 1


class Server:
    """An endpoint's process; it does what the test does with its sockets."""

    def __init__(self, lab: Lab, backlog: int = 16) -> None:
        self._lab = lab
        self.sock = lab.resources.enter_context(socket.create_server(("127.0.0.1", 0), backlog=backlog))
        self.sock.setblocking(False)
        self.port: int = self.sock.getsockname()[1]

    def accept(self) -> socket.socket:
        """The connection that comes."""
        got: list[socket.socket] = []

        def look() -> list[socket.socket]:
            with contextlib.suppress(BlockingIOError):
                got.append(self._lab.resources.enter_context(self.sock.accept()[0]))
            return got

        self._lab.loop.until(look)
        return got[0]

    def nobody(self) -> bool:
        """Whether nobody has connected."""
        self._lab.loop.turn(3)
        try:
            self.sock.accept()[0].close()
        except BlockingIOError:
            return True
        return False


class Lab(PlaneLab):
    """A listener, its balancer, and relays that dial."""

    def __init__(self, resources: contextlib.ExitStack) -> None:
        super().__init__(resources, Options(max_relays=1000, records=True))
        self.row = self.slots.row(0, 1)
        self.balancer = Balancer(SERVICE, self.slots.view, 1, self.row)
        self.listener = Listener(self)
        self.endpoints: list[Endpoint] = []
        self.relay: Relay
        resources.callback(self._end)

    def _end(self) -> None:
        for relay in list(self.plane.relays):
            assert isinstance(relay, Relay)
            relay.abort("the test is over")

    def balance(self, *ports: int, affinity: int = 0) -> list[Endpoint]:
        """Have these ports as endpoints, which are dialled in this order."""
        self.endpoints = [
            Endpoint("127.0.0.1", port, slot, self.slots.row(0, slot)) for slot, port in enumerate(ports, 2)
        ]
        self.balancer.update(self.endpoints, affinity)
        return self.endpoints

    def server(self) -> Server:
        return Server(self)

    def refusing(self) -> int:
        """A port that refuses."""
        sock, port = closed_port()
        self.resources.callback(sock.close)
        return port

    def silent(self) -> int:
        """A port that does not answer: its backlog is full."""
        server = Server(self, backlog=0)
        for _ in range(3):
            sock = self.resources.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", server.port))
        return server.port

    def client(self) -> tuple[Socket, socket.socket]:
        """The relay's socket of a client, and the client's own."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            far = self.resources.enter_context(socket.create_connection(server.getsockname()))
            near, _ = server.accept()
        far.setblocking(False)
        return Socket(fileno=near.detach()), far

    def dial(self) -> socket.socket:
        """Begin a relay; returns its client."""
        sock, far = self.client()
        self.relay = Relay(self.listener, sock, far.getsockname())
        self.relay.start()
        return far

    def hears(self, sock: socket.socket) -> bytes:
        """What comes next at a socket of the test: b"" is FIN."""
        sock.setblocking(False)
        got: list[bytes] = []

        def look() -> list[bytes]:
            with contextlib.suppress(BlockingIOError):
                try:
                    got.append(sock.recv(1000))
                except ConnectionResetError:
                    got.append(RESET)
            return got

        self.loop.until(look)
        return got[0]

    def waits(self, sock: socket.socket) -> bool:
        """Whether nothing comes for a client."""
        self.loop.turn(3)
        with pytest.raises(BlockingIOError):
            sock.recv(1)
        return True

    def joined(self, client: socket.socket, server: Server) -> bool:
        """Whether bytes go both ways between a client and an endpoint."""
        upstream = server.accept()
        client.send(b"ping")
        heard = self.hears(upstream)
        upstream.send(b"pong")
        return (heard, self.hears(client)) == (b"ping", b"pong")

    def attempts(self) -> list[int]:
        """How often each endpoint was dialled."""
        return [self.count(endpoint.row, ATTEMPTS) for endpoint in self.endpoints]

    def failed(self) -> list[int]:
        """How often dialling each endpoint has failed."""
        return [self.count(endpoint.row, FAILED) for endpoint in self.endpoints]

    def figures(self) -> tuple[int, int, int]:
        """Of the service: relays begun, ended, and those for which no endpoint was found."""
        opened, closed, failed = (self.count(self.row, field) for field in (OPENED, CLOSED, FAILED))
        assert closed == self.listener.ended
        assert opened - closed == len(self.plane.relays)
        return opened, closed, failed

    def turned_away(self, client: socket.socket) -> None:
        """The client is reset, as no endpoint was found, and nothing is left of its relay."""
        assert self.hears(client) == RESET
        assert self.figures() == (1, 1, 1)
        assert GIVEN_UP in self.failures()
        assert [record.reason for record in self.records()] == ["no endpoint"]
        assert not self.plane.dialling


@pytest.fixture
def lab() -> Iterator[Lab]:
    with contextlib.ExitStack() as resources:
        yield Lab(resources)


class Scripted(Socket):
    """A socket to an endpoint for which the kernel has these errors first; integration tests have them."""

    codes: ClassVar[dict[int, list[int]]]  # by port

    def connect_ex(self, address: Any) -> int:
        codes = self.codes.get(address[1])
        return codes.pop(0) if codes else super().connect_ex(address)


def script(monkeypatch: pytest.MonkeyPatch, codes: dict[int, list[int]]) -> None:
    monkeypatch.setattr(Scripted, "codes", codes, raising=False)
    monkeypatch.setattr(dialler, "Socket", Scripted)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# -- an endpoint that answers --------------------------------------------------------------------------------


def test_a_client_is_joined_to_its_endpoint(lab: Lab) -> None:
    server = lab.server()
    (endpoint,) = lab.balance(server.port)
    client = lab.dial()
    lab.loop.now += 0.002
    assert lab.joined(client, server)
    assert (lab.attempts(), lab.failed(), lab.figures()) == ([1], [0], (1, 0, 0))
    assert lab.count(endpoint.row, OPENED) == 1
    assert lab.count(endpoint.row, CONNECT_US) == lab.count(lab.row, CONNECT_US) == pytest.approx(2000, abs=1)
    assert not lab.plane.dialling


def test_what_the_endpoint_says_with_the_connection_is_heard(lab: Lab) -> None:
    server = lab.server()
    lab.balance(server.port)
    client = lab.dial()
    upstream, _ = server.sock.accept()  # before the relay has heard that it is connected
    with upstream:
        upstream.send(b"greeting")
        assert lab.hears(client) == b"greeting"


# -- an endpoint that refuses --------------------------------------------------------------------------------


def test_after_one_that_refuses_the_next_is_dialled(lab: Lab) -> None:
    server = lab.server()
    refusing, _ = lab.balance(lab.refusing(), server.port)
    client = lab.dial()
    assert lab.joined(client, server)
    assert (lab.attempts(), lab.failed(), lab.figures()) == ([1, 1], [1, 0], (1, 0, 0))
    assert lab.trouble() == {f"endpoint {refusing} of {SERVICE}: Connection refused": 1}
    assert lab.failures() == [Failure(SERVICE, str(refusing), "Connection refused", 1)]
    # For a while others come first.
    for _ in range(3):
        assert lab.joined(lab.dial(), server)
    assert lab.attempts() == [1, 4]


def test_a_client_is_reset_when_all_refuse(lab: Lab) -> None:
    lab.balance(lab.refusing(), lab.refusing(), lab.refusing())
    lab.turned_away(lab.dial())
    assert (lab.attempts(), lab.failed()) == ([1, 1, 1], [1, 1, 1])
    assert [(record.endpoint, record.attempts) for record in lab.records()] == [("", 3)]


def test_of_many_dead_endpoints_not_all_are_dialled(lab: Lab) -> None:
    port = lab.refusing()
    lab.balance(*[port] * (MAX_ATTEMPTS + 6))
    lab.turned_away(lab.dial())
    assert sum(lab.attempts()) == MAX_ATTEMPTS


def test_a_client_with_affinity_stays_at_the_endpoint_that_took_it(lab: Lab) -> None:
    server = lab.server()
    lab.balance(lab.refusing(), server.port, affinity=100)
    assert lab.joined(lab.dial(), server)
    lab.loop.advance(50)  # the one that refused is no suspect any more
    for _ in range(3):
        assert lab.joined(lab.dial(), server)
    assert lab.attempts() == [1, 4]


def test_a_socket_that_is_connected_to_itself_is_a_refusal(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """By chance the kernel may give a socket the very port that it connects to, where nobody listens."""

    class Bound(Socket):
        def connect_ex(self, address: Any) -> int:
            if address[1] == port:
                self.bind(address)
            return super().connect_ex(address)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(dialler, "Socket", Bound)
    server = lab.server()
    lab.balance(port, server.port)
    assert lab.joined(lab.dial(), server)
    assert (lab.attempts(), lab.failed()) == ([1, 1], [1, 0])
    assert [failure.why for failure in lab.failures()] == ["Connection refused"]


# -- an endpoint that does not answer ------------------------------------------------------------------------


def test_after_one_that_does_not_answer_in_time_the_next_is_dialled(lab: Lab) -> None:
    server = lab.server()
    silent, _ = lab.balance(lab.silent(), server.port)
    client = lab.dial()
    lab.loop.advance(DIAL_TIMEOUTS[0] - 0.01)
    assert server.nobody()
    lab.loop.advance(0.01 + DIAL_SCAN_SECONDS)
    assert lab.joined(client, server)
    assert (lab.attempts(), lab.failed(), lab.figures()) == ([1, 1], [1, 0], (1, 0, 0))
    assert lab.failures() == [Failure(SERVICE, str(silent), "no answer to connect", 1)]
    assert not lab.plane.dialling


def test_a_lone_silent_endpoint_gets_longer_each_time_and_then_the_client_is_reset(lab: Lab) -> None:
    lab.balance(lab.silent())
    before = descriptors()
    client = lab.dial()
    for attempt, seconds in enumerate(DIAL_TIMEOUTS, 1):
        lab.loop.advance(seconds - 0.01)
        assert lab.attempts() == [attempt]
        assert lab.waits(client)
        lab.loop.advance(0.01 + DIAL_SCAN_SECONDS)
    lab.turned_away(client)
    assert (lab.attempts(), lab.failed()) == ([4], [4])
    assert descriptors() == before + 1, "the client's own socket"


def test_those_that_refused_are_not_asked_again_those_that_were_slow_are(lab: Lab) -> None:
    lab.balance(lab.refusing(), lab.silent(), lab.silent())
    client = lab.dial()
    lab.loop.until(lambda: lab.attempts() == [1, 1, 0])
    for seconds in DIAL_TIMEOUTS:
        lab.loop.advance(seconds + DIAL_SCAN_SECONDS)
    lab.turned_away(client)
    assert (lab.attempts(), lab.failed()) == ([1, 2, 2], [1, 2, 2])


def test_of_many_silent_endpoints_four_are_tried(lab: Lab) -> None:
    lab.balance(*[lab.silent()] * 6)
    client = lab.dial()
    for seconds in DIAL_TIMEOUTS:
        lab.loop.advance(seconds + DIAL_SCAN_SECONDS)
    lab.turned_away(client)
    assert lab.attempts() == [1, 1, 1, 1, 0, 0]


def test_one_that_did_not_answer_has_no_second_try_before_the_others_had_theirs(lab: Lab) -> None:
    server = lab.server()
    _, other = lab.balance(lab.silent(), server.port)
    client = lab.dial()
    # The other one has failed elsewhere, and it is the silent one's turn.
    lab.balancer.failed("192.0.2.1", other, lab.loop.now)
    lab.slots.view[1] = 0
    lab.loop.advance(DIAL_TIMEOUTS[0] + DIAL_SCAN_SECONDS)
    assert lab.joined(client, server)
    assert lab.attempts() == [1, 1]


def test_an_answer_that_the_worker_was_too_busy_to_see_counts(lab: Lab) -> None:
    server = lab.server()
    lab.balance(server.port)
    client = lab.dial()
    lab.loop.now += 10
    lab.relay.dial_due(lab.loop.now)  # the timer comes first
    assert lab.joined(client, server)
    assert (lab.attempts(), lab.failed()) == ([1], [0])


def test_when_the_endpoints_are_removed_meanwhile_the_client_is_reset(lab: Lab) -> None:
    (silent,) = lab.balance(lab.silent())
    client = lab.dial()
    lab.balancer.update([], 0)
    lab.loop.advance(DIAL_TIMEOUTS[0] + DIAL_SCAN_SECONDS)
    lab.turned_away(client)
    assert silent not in lab.balancer.suspects


# -- shortages -----------------------------------------------------------------------------------------------


def test_out_of_descriptors_it_is_tried_again_and_no_endpoint_is_blamed(lab: Lab) -> None:
    server = lab.server()
    lab.balance(server.port)
    sock, client = lab.client()
    lab.relay = Relay(lab.listener, sock, client.getsockname())
    with no_descriptors():
        lab.relay.start()
        assert lab.plane.accepting_paused
        lab.loop.advance(PAUSE_SECONDS + DIAL_SCAN_SECONDS)
        assert lab.waits(client)
    lab.loop.advance(PAUSE_SECONDS - 0.01)
    assert server.nobody()
    lab.loop.advance(0.01 + DIAL_SCAN_SECONDS)
    assert lab.joined(client, server)
    assert (lab.attempts(), lab.failed(), lab.figures()) == ([1], [0], (1, 0, 0))
    assert lab.trouble() == {"Too many open files: accepting paused": 2}
    assert lab.failures() == []


def test_a_client_does_not_wait_for_descriptors_for_ever(lab: Lab) -> None:
    lab.balance(lab.server().port)
    sock, client = lab.client()
    lab.relay = Relay(lab.listener, sock, client.getsockname())
    with no_descriptors():
        lab.relay.start()
        for _ in range(MAX_SHORTAGES - 1):
            lab.loop.advance(PAUSE_SECONDS + DIAL_SCAN_SECONDS)
        assert lab.waits(client)
        lab.loop.advance(PAUSE_SECONDS + DIAL_SCAN_SECONDS)
    lab.turned_away(client)
    assert (lab.attempts(), lab.failed()) == ([0], [0])


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_a_connect_that_meets_a_shortage_is_tried_again(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    server = lab.server()
    lab.balance(server.port)
    script(monkeypatch, {server.port: [code]})
    client = lab.dial()
    assert server.nobody()
    assert lab.plane.accepting_paused
    lab.loop.advance(PAUSE_SECONDS + DIAL_SCAN_SECONDS)
    assert lab.joined(client, server)
    assert (lab.failed(), lab.figures()) == ([0], (1, 0, 0))
    assert lab.trouble() == {f"{os.strerror(code)}: accepting paused": 1}


def test_a_socket_that_cannot_be_watched_is_closed_and_it_is_tried_again(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = lab.server()
    lab.balance(server.port)
    sock, client = lab.client()
    lab.relay = Relay(lab.listener, sock, client.getsockname())
    before = descriptors()
    add = lab.plane.poller.add

    def full(*_: object) -> None:
        monkeypatch.setattr(lab.plane.poller, "add", add)
        raise OSError(errno.ENOSPC, "no watches left")

    monkeypatch.setattr(lab.plane.poller, "add", full)
    lab.relay.start()
    assert descriptors() == before
    server.accept().close()  # the connection that was given up
    lab.loop.advance(PAUSE_SECONDS + DIAL_SCAN_SECONDS)
    assert lab.joined(client, server)
    assert lab.failed() == [0]


def test_where_no_local_port_is_left_to_an_endpoint_another_is_dialled(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = lab.server(), lab.server()
    lab.balance(first.port, second.port)
    script(monkeypatch, {first.port: [errno.EADDRNOTAVAIL]})
    assert lab.joined(lab.dial(), second)
    assert (lab.failed(), lab.listener.rests, lab.plane.accepting_paused) == ([0, 0], 0, False)


def test_where_no_local_port_is_left_to_any_endpoint_this_listener_alone_rests(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = lab.server()
    (endpoint,) = lab.balance(server.port)
    script(monkeypatch, {server.port: [errno.EADDRNOTAVAIL]})
    client = lab.dial()
    assert (lab.listener.rests, lab.plane.accepting_paused) == (1, False)
    lab.loop.advance(PAUSE_SECONDS + DIAL_SCAN_SECONDS)
    assert lab.joined(client, server)
    assert (lab.failed(), lab.listener.rests) == ([0], 1)
    assert lab.trouble() == {
        f"no local port left to connect to endpoint {endpoint} of {SERVICE}: accepting paused for it": 1
    }


def test_an_endpoint_that_cannot_be_reached_is_blamed_and_the_next_is_dialled(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = lab.server(), lab.server()
    endpoint, _ = lab.balance(first.port, second.port)
    script(monkeypatch, {first.port: [errno.EHOSTUNREACH]})
    assert lab.joined(lab.dial(), second)
    assert lab.failed() == [1, 0]
    assert lab.failures() == [Failure(SERVICE, str(endpoint), "No route to host", 1)]


# -- clients that do not wait --------------------------------------------------------------------------------


def test_a_client_that_resets_while_dialling_is_let_go(lab: Lab) -> None:
    lab.balance(lab.silent())
    before = descriptors()
    client = lab.dial()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    lab.loop.until(lambda: lab.listener.ended)
    assert lab.figures() == (1, 1, 0)
    assert not lab.plane.dialling
    assert descriptors() == before
    assert [record.reason for record in lab.records()] == ["reset by client"]
    lab.loop.advance(DIAL_TIMEOUTS[0] + DIAL_SCAN_SECONDS)
    assert (lab.attempts(), lab.failed()) == ([1], [0])


def test_a_client_that_resets_during_a_shortage_is_let_go(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    server = lab.server()
    lab.balance(server.port)
    script(monkeypatch, {server.port: [errno.ENOBUFS]})
    client = lab.dial()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    lab.loop.until(lambda: lab.listener.ended)
    lab.loop.advance(PAUSE_SECONDS + DIAL_SCAN_SECONDS)
    assert server.nobody()
    assert lab.figures() == (1, 1, 0)


def test_a_request_and_its_end_that_came_before_the_endpoint_is_connected(lab: Lab) -> None:
    server = lab.server()
    lab.balance(lab.silent(), server.port)
    client = lab.dial()
    client.send(b"request")
    client.shutdown(socket.SHUT_WR)
    assert lab.waits(client)
    lab.loop.advance(DIAL_TIMEOUTS[0] + DIAL_SCAN_SECONDS)
    upstream = server.accept()
    assert lab.hears(upstream) == b"request"
    assert lab.hears(upstream) == b""
    upstream.send(b"answer")
    assert lab.hears(client) == b"answer"
    upstream.close()
    assert lab.hears(client) == b""
    (record,) = lab.records()
    assert (record.reason, record.attempts, record.bytes_in, record.bytes_out) == ("closed", 2, 7, 6)
    assert lab.figures() == (1, 1, 0)


def test_a_client_that_ends_while_dialling_ends_at_its_endpoint(lab: Lab) -> None:
    server = lab.server()
    lab.balance(lab.silent(), server.port)
    client = lab.dial()
    client.close()
    lab.loop.turn(3)
    lab.loop.advance(DIAL_TIMEOUTS[0] + DIAL_SCAN_SECONDS)
    upstream = server.accept()
    assert lab.hears(upstream) == b""
    upstream.close()
    lab.loop.until(lambda: lab.listener.ended)
    assert lab.figures() == (1, 1, 0)
