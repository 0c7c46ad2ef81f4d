"""What the accepting half of a listener decides, over real sockets: whom it refuses, when it rests, how much it takes."""

from __future__ import annotations

import contextlib
import os
import socket
from _socket import socket as Socket  # noqa: N812 a class; what a listener makes of a descriptor
from collections.abc import Iterator

import pytest

from proxyd.relay.engine.accepting import MAX_BATCH, Acceptor, SourceRanges
from proxyd.relay.engine.balancer import Balancer, Endpoint
from proxyd.relay.engine.plane import PAUSE_SECONDS, Plane
from proxyd.relay.engine.reporter import Reporter
from proxyd.relay.ipc.channel import Channel
from proxyd.relay.ipc.messages import Drained, ListenerConfig, Trouble
from proxyd.relay.ipc.options import Options
from proxyd.relay.ipc.slots import REFUSED, Slots
from tests.support.manual_loop import ManualLoop

DEADLINE = 30.0
ROW = 3


class Relay:
    """A client that was accepted; it says "hello" and stays until it is ended."""

    def __init__(self, listener: Listener, sock: Socket, address: tuple[str, int]) -> None:
        self.listener = listener
        self.sock = sock
        self.address = address
        self.crashed = False

    def start(self) -> None:
        if self.listener.fails:
            raise RuntimeError("it can't")
        self.sock.send(b"hello")

    def crash(self) -> None:
        self.crashed = True
        self.end()

    def end(self) -> None:
        self.sock.close()
        self.listener.relays.remove(self)
        self.listener.relay_ended()


class Listener(Acceptor):
    """Keeps whom it accepted."""

    fails = False

    def __init__(self, fd: int, world: World, *ranges: str) -> None:
        self.relays: list[Relay] = []
        self.seen = 0
        config = ListenerConfig(7, 1, "TCP", "1.2.3.4:80", list(ranges))
        super().__init__(config, fd, world.balancer, world.plane)

    def accepted(self, fd: int, address: tuple[str, int]) -> Relay:
        self.seen += 1
        self.relays.append(Relay(self, Socket(self.family, socket.SOCK_STREAM, 0, fd), address))
        return self.relays[-1]


class CountingPlane(Plane):
    """Counts how often a listener asks for its share."""

    asked = 0

    def share(self) -> int:
        self.asked += 1
        return super().share()


class World:
    """A plane with control's end of its channel, and listeners on loopback."""

    def __init__(self, resources: contextlib.ExitStack, max_relays: int = 1000) -> None:
        self._resources = resources
        self.loop = loop = resources.enter_context(ManualLoop())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control = Channel(ours)
        channel = Channel(theirs)
        self.slots = Slots.create()
        self.reporter = Reporter(loop, channel)
        options = Options(max_relays=max_relays)
        self.plane = CountingPlane(loop, self.reporter, self.slots, 0, options, now=loop.time)
        self.balancer = Balancer("prod/web", self.slots.view, 1, ROW)
        self.balancer.update([Endpoint("127.0.0.1", 1, 2, 100)], 0)
        for undo in (self.slots.close, ours.close, channel.close, self.reporter.stop, self.plane.shut):
            resources.callback(undo)

    def listen(self, *ranges: str, dual: bool = False) -> tuple[Listener, socket.socket]:
        """A listener, and control's own descriptor of its socket, which is of IPv4 or for both families."""
        if dual:
            sock = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            sock = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._resources.enter_context(sock)
        listener = Listener(os.dup(sock.fileno()), self, *ranges)
        self._resources.callback(self._end, listener)
        return listener, sock

    @staticmethod
    def _end(listener: Listener) -> None:
        listener.close()
        for relay in list(listener.relays):
            relay.end()

    def connect(self, sock: socket.socket, source: str = "127.0.0.1") -> socket.socket:
        """A client whose connection stands at the kernel, accepted or not."""
        port = sock.getsockname()[1]
        return self._resources.enter_context(
            socket.create_connection(("127.0.0.1", port), DEADLINE, source_address=(source, 0))
        )

    def hears(self, client: socket.socket) -> bytes:
        """What comes for a client; b"" at the end, b"reset" instead of the exception."""
        client.setblocking(False)
        heard: list[bytes] = []

        def look() -> bool:
            with contextlib.suppress(BlockingIOError):
                try:
                    heard.append(client.recv(100))
                except ConnectionResetError:
                    heard.append(b"reset")
            return bool(heard)

        self.loop.until(look)
        return heard[0]

    def waits(self, client: socket.socket) -> bool:
        """Whether nothing comes for a client whatever is ready now."""
        self.loop.turn(3)
        client.setblocking(False)
        try:
            client.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False

    @property
    def refused(self) -> int:
        return self.slots.view[ROW + REFUSED]

    def said(self) -> list[object]:
        """What control has been told so far."""
        self.reporter.flush()
        found = []
        while (received := self.control.receive()) is not None:
            found.append(received[0])
        return found

    def trouble(self) -> dict[str, int]:
        return {
            text: n
            for message in self.said()
            if isinstance(message, Trouble)
            for text, n in message.counts.items()
        }


@pytest.fixture
def resources() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def world(resources: contextlib.ExitStack) -> World:
    return World(resources)


# Who may connect.


def test_a_client_of_no_source_range_is_reset_and_counted_and_no_relay_is_made(world: World) -> None:
    listener, sock = world.listen("127.0.0.2/32", "10.0.0.0/8")
    assert world.hears(world.connect(sock, "127.0.0.3")) == b"reset"
    assert (world.refused, listener.seen, listener.open_relays) == (1, 0, 0)
    assert world.hears(world.connect(sock, "127.0.0.2")) == b"hello"
    assert (world.refused, listener.seen, listener.open_relays) == (1, 1, 1)


def test_who_is_refused_takes_no_place_from_those_who_come_with_him(world: World) -> None:
    listener, sock = world.listen("127.0.0.2/32")
    clients = [world.connect(sock, f"127.0.0.{2 + number % 2}") for number in range(40)]
    answers = [world.hears(client) for client in clients]
    assert answers == [b"hello", b"reset"] * 20
    assert (world.refused, listener.open_relays) == (20, 20)


def test_an_ipv4_client_of_an_ipv6_socket_is_judged_by_its_ipv4_address(
    world: World,
) -> None:
    _, sock = world.listen("127.0.0.2/32", "fd00::/8", dual=True)
    assert world.hears(world.connect(sock, "127.0.0.3")) == b"reset"
    assert world.hears(world.connect(sock, "127.0.0.2")) == b"hello"


def test_a_source_range_that_cannot_be_read_admits_nobody_and_is_told_once(world: World) -> None:
    _, sock = world.listen("10.0.0.0/99")
    assert world.hears(world.connect(sock)) == b"reset"
    assert world.trouble() == {
        "listener 1.2.3.4:80: source range '10.0.0.0/99' is not a CIDR: it admits nobody": 1
    }


def test_where_no_endpoint_is_left_clients_are_reset_and_counted(world: World) -> None:
    listener, sock = world.listen()
    world.balancer.update([], 0)
    assert world.hears(world.connect(sock)) == b"reset"
    assert (world.refused, listener.seen) == (1, 0)


@pytest.mark.parametrize(
    ("ranges", "ip", "admitted"),
    [
        (["10.0.0.0/8"], "10.255.255.255", True),
        (["10.0.0.0/8"], "11.0.0.0", False),
        (["10.1.2.3/8"], "10.9.9.9", True),  # bits of the host do not matter
        (["10.0.0.0/8"], "::ffff:10.0.0.1", True),
        (["10.0.0.0/8"], "::ffff:11.0.0.1", False),
        (["0.0.0.0/0"], "fd00::1", False),
        (["::/0"], "10.0.0.1", False),
        ([" fd00::/8 "], "fd12::1", True),
        (["fe80::/10"], "fe80::1%lo", True),
        (["nonsense", "fd00::/8"], "fd00::1", True),
        (["nonsense"], "10.0.0.1", False),
    ],
)
def test_source_ranges(ranges: list[str], ip: str, admitted: bool) -> None:
    assert SourceRanges(ranges).admit(ip) is admitted


# When it rests.


def test_a_listener_that_rests_leaves_clients_in_the_backlog_until_the_pause_is_over(world: World) -> None:
    listener, sock = world.listen()
    listener.rest()
    client = world.connect(sock)
    world.loop.advance(PAUSE_SECONDS * 0.99)
    assert world.waits(client)
    world.loop.advance(PAUSE_SECONDS * 0.02)
    assert world.hears(client) == b"hello"


def test_rest_said_again_while_it_rests_neither_lengthens_the_pause_nor_cuts_the_next_one_short(
    world: World,
) -> None:
    listener, sock = world.listen()
    listener.rest()
    world.loop.advance(PAUSE_SECONDS * 0.5)
    listener.rest()  # as every relay says that has waited for a local port
    world.loop.advance(PAUSE_SECONDS * 0.51)
    assert world.hears(world.connect(sock)) == b"hello"
    listener.rest()
    client = world.connect(sock)
    world.loop.advance(PAUSE_SECONDS * 0.99)
    assert world.waits(client)
    world.loop.advance(PAUSE_SECONDS * 0.02)
    assert world.hears(client) == b"hello"


def test_a_listener_closed_while_it_rests_stays_closed(world: World) -> None:
    listener, sock = world.listen()
    listener.rest()
    listener.close()
    client = world.connect(sock)
    world.loop.advance(PAUSE_SECONDS * 1.5)
    listener.rest()
    listener.resume()
    assert world.waits(client)
    assert listener.seen == 0


def test_when_the_worker_pauses_all_its_listeners_rest_and_go_on(world: World) -> None:
    one, first = world.listen()
    two, second = world.listen()
    world.plane.pause("out of something: accepting paused")
    clients = [world.connect(first), world.connect(second)]
    world.loop.turn(3)
    world.loop.advance(PAUSE_SECONDS * 0.99)
    assert all(map(world.waits, clients))
    world.loop.advance(PAUSE_SECONDS * 0.02)
    assert list(map(world.hears, clients)) == [b"hello", b"hello"]
    assert (one.open_relays, two.open_relays) == (1, 1)
    assert world.trouble() == {"out of something: accepting paused": 1}


# How much it takes.


def test_one_listener_takes_nine_tenths_the_rest_is_for_others(resources: contextlib.ExitStack) -> None:
    world = World(resources, max_relays=10)
    greedy, sock = world.listen()
    other, second = world.listen()
    clients = [world.connect(sock) for _ in range(12)]
    world.loop.until(lambda: greedy.open_relays == 9)
    # It rests, again and again; others do not.
    assert world.hears(world.connect(second)) == b"hello"
    assert (greedy.open_relays, other.open_relays) == (9, 1)
    text = "listener 1.2.3.4:80 has nine tenths of what descriptors allow: accepting paused for it"
    assert text in world.trouble()
    # Whoever ends makes room for the next in the backlog.
    other.relays[0].end()
    greedy.relays[0].end()
    world.loop.advance(PAUSE_SECONDS)
    assert world.hears(clients[9]) == b"hello"
    assert world.waits(clients[10])


def test_a_listener_asks_for_its_share_once_a_batch(world: World) -> None:
    listener, sock = world.listen()
    for _ in range(31 + 5 * MAX_BATCH):  # batches of 1, 2, 4, 8, 16, 16 ...
        world.connect(sock)
    turns = world.plane.poller.turns
    world.loop.until(lambda: listener.seen == 31 + 5 * MAX_BATCH)
    assert world.plane.asked == world.plane.poller.turns - turns == 10


def test_a_burst_is_taken_in_growing_batches_a_trickle_singly(world: World) -> None:
    listener, sock = world.listen()
    for number in range(1, 4):
        assert world.hears(world.connect(sock)) == b"hello"
        assert (listener.seen, world.plane.poller.turns) == (number, number)


def test_of_a_batch_no_more_are_taken_than_the_share_allows(resources: contextlib.ExitStack) -> None:
    world = World(resources, max_relays=20)
    listener, sock = world.listen()
    for _ in range(31):
        world.connect(sock)
    world.loop.until(world.trouble)
    assert listener.open_relays == listener.seen == 18


# What goes wrong.


def test_a_relay_that_cannot_begin_is_ended_and_the_next_client_is_served(world: World) -> None:
    listener, sock = world.listen()
    listener.fails = True
    assert world.hears(world.connect(sock)) == b""
    assert (listener.seen, listener.open_relays) == (1, 0)
    assert [text for text in world.trouble() if "RuntimeError: it can't" in text]
    listener.fails = False
    assert world.hears(world.connect(sock)) == b"hello"


def test_a_socket_that_control_has_shut_down_is_watched_no_more(world: World) -> None:
    listener, sock = world.listen()
    sock.shutdown(socket.SHUT_RDWR)
    world.loop.until(lambda: listener._socket.fileno() < 0)
    assert world.trouble() == {}
    listener.close()
    assert Drained([7]) in world.said()


def test_drained_is_reported_with_the_last_relay_of_a_closed_listener(world: World) -> None:
    listener, sock = world.listen()
    for _ in range(2):
        assert world.hears(world.connect(sock)) == b"hello"
    listener.relays[0].end()
    listener.close()
    assert Drained([7]) not in world.said()
    listener.close()
    listener.relays[0].end()
    assert world.said() == [Drained([7])]


def test_what_is_no_socket_is_refused(world: World) -> None:
    read_end, write_end = os.pipe()
    with pytest.raises(OSError, match="socket"):
        Listener(read_end, world)
    os.close(read_end)
    os.close(write_end)
