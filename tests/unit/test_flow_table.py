"""UDP flows and their table: endpoints that refuse or go, who makes room for whom, and when a flow is idle.

Sockets are real, on loopback; the clock is the test's. The listener is a small one of the test.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from _socket import socket as Socket  # noqa: N812 a class; what a listener makes of a descriptor
from collections import deque
from collections.abc import Callable, Iterator

import pytest

from proxyd.relay.engine.balancer import Balancer, Endpoint
from proxyd.relay.ipc.options import Options
from proxyd.relay.ipc.slots import (
    ATTEMPTS,
    BYTES_IN,
    BYTES_OUT,
    CLOSED,
    DATAGRAMS_IN,
    DATAGRAMS_OUT,
    DROPPED,
    DROPPED_TO_CLIENT,
    EVICTED,
    FAILED,
    OPENED,
)
from proxyd.relay.udp.flow import Flow
from proxyd.relay.udp.mmsg import ClientKey, ClientName, client_key
from proxyd.relay.udp.postponed import Postponed
from proxyd.relay.udp.table import (
    BRIEF_SECONDS,
    DRAIN_SECONDS,
    HURRIED_SECONDS,
    IDLE_SECONDS,
    TICK_SECONDS,
    WAIT_SECONDS,
    FlowTable,
    Victim,
    flow_table,
)
from proxyd.relay.udp.upstream import KEPT_BYTES, MAX_ATTEMPTS
from tests.support.plane import PlaneLab, closed_port, no_descriptors

SERVICE = "prod/dns"


class Listener:
    """Owns flows; a test hands it the datagrams of its clients."""

    def __init__(self, lab: Lab) -> None:
        self.table = lab.table
        self.balancer = lab.balancer
        self.sock = Socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", 0))
        self.fd = self.sock.fileno()
        self.sendto = self.sock.sendto
        self.address = f"127.0.0.1:{self.sock.getsockname()[1]}"
        self.flows: dict[ClientKey, Flow] = {}
        self.named: dict[ClientName, Flow] = {}
        self.sender = self.table.sender(socket.AF_INET)
        self.postponed = Postponed(lab.plane.poller, self.take)
        self.victims: deque[Victim] = deque()
        self.overruns = 0
        self.ended = 0
        self.table.listeners[self.address] = self

    def take(self, key: ClientKey, data: memoryview | bytes) -> None:
        """Send a client's datagram on."""
        if key in self.flows:
            self.flows[key].forward(data)
        else:
            self.open_flow(key, data)

    def open_flow(self, key: ClientKey, data: memoryview | bytes) -> None:
        self.table.make_room(self)
        self.table.opened()
        flow = self.flows[key] = Flow(self, key)
        if flow.dial(data):
            flow.datagrams_in = 1
            flow.bytes_in = len(data)

    def send_segments(self, _data: memoryview, _size: int, _name: ClientName, /) -> int:
        raise AssertionError("no bulk here")

    def flow_ended(self) -> None:
        self.ended += 1

    def count(self) -> None:
        """Nothing is received here."""


class Peer:
    """A UDP socket of the test: a client, or an endpoint's server."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.sock = lab.resources.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.sock.bind(("127.0.0.1", 0))
        self.sock.setblocking(False)
        self.name: tuple[str, int] = self.sock.getsockname()
        self.port = self.name[1]
        self.key = client_key(self.name)

    def hears(self) -> tuple[bytes, tuple[str, int]]:
        """The next datagram, and where it comes from."""
        got: list[tuple[bytes, tuple[str, int]]] = []

        def look() -> object:
            with contextlib.suppress(BlockingIOError):
                got.append(self.sock.recvfrom(1 << 16))
            return got

        self._lab.loop.until(look)
        return got[0]

    def waits(self) -> bool:
        """Whether nothing comes."""
        self._lab.loop.turn(3)
        with pytest.raises(BlockingIOError):
            self.sock.recv(1)
        return True

    def answers(self, data: bytes) -> bytes:
        """As a server: answer the next datagram, and return it."""
        heard, where = self.hears()
        self.sock.sendto(data, where)
        return heard


class Lab(PlaneLab):
    """A flow table, one listener, its balancer, and a clock."""

    def __init__(self, resources: contextlib.ExitStack, **options: float | None) -> None:
        settings = {"max_relays": 1000, **options}
        super().__init__(resources, Options(records=True, **settings))  # type: ignore[arg-type]  # mixed
        self.row = self.slots.row(0, 1)
        self.balancer = Balancer(SERVICE, self.slots.view, 1, self.row)
        self.table: FlowTable = flow_table(self.plane)
        self.endpoints: list[Endpoint] = []
        resources.callback(self._end)
        self.listener = self.listen()

    def _end(self) -> None:
        for flow in [*self.table, *self.table.draining]:
            flow.finish("the test is over")

    def listen(self) -> Listener:
        listener = Listener(self)
        self.resources.callback(listener.sock.close)
        self.resources.callback(self._end)
        return listener

    def balance(self, *ports: int) -> list[Endpoint]:
        """Have these ports as endpoints, which are used in this order."""
        self.endpoints = [
            Endpoint("127.0.0.1", port, slot, self.slots.row(0, slot)) for slot, port in enumerate(ports, 2)
        ]
        self.balancer.update(self.endpoints, 0)
        return self.endpoints

    def remove(self, gone: Endpoint) -> None:
        """An endpoint goes; the listener drains its flows."""
        self.balancer.update([endpoint for endpoint in self.endpoints if endpoint is not gone], 0)
        for flow in [flow for flow in self.listener.flows.values() if flow.endpoint is gone]:
            flow.drain()

    def server(self) -> Peer:
        """One server, which is the only endpoint."""
        server = Peer(self)
        self.balance(server.port)
        return server

    def refusing(self) -> int:
        """A port that refuses."""
        sock, port = closed_port(socket.SOCK_DGRAM)
        self.resources.callback(sock.close)
        return port

    def says(self, client: Peer | int, data: bytes = b"?", listener: Listener | None = None) -> Flow | None:
        """A client, or one that only has a port, sends a datagram. Returns its flow, if it has one then."""
        key = client_key(("127.0.0.1", client)) if isinstance(client, int) else client.key
        listener = listener or self.listener
        listener.take(key, data)
        return listener.flows.get(key)

    def flow(self, client: Peer | int, data: bytes = b"?", listener: Listener | None = None) -> Flow:
        """The same, where it has a flow."""
        flow = self.says(client, data, listener)
        assert flow is not None
        return flow

    def answered(self, client: Peer, server: Peer, listener: Listener | None = None) -> Flow:
        """A single exchange."""
        flow = self.flow(client, b"question", listener)
        assert server.answers(b"answer") == b"question"
        assert client.hears()[0] == b"answer"
        return flow

    def talking(self, client: Peer, server: Peer, listener: Listener | None = None) -> Flow:
        """A conversation."""
        self.answered(client, server, listener)
        return self.answered(client, server, listener)

    def time(self, seconds: float) -> None:
        """Let time pass; the table has its passes."""
        end = self.loop.now + seconds
        while self.loop.now < end - 1e-6:
            self.loop.advance(min(TICK_SECONDS, end - self.loop.now))

    def evicted(self) -> int:
        return self.count(self.row, EVICTED)

    def reasons(self) -> list[str]:
        """Why flows have ended."""
        return [record.reason for record in self.records()]

    def figures(self, field: int) -> list[int]:
        """A counter of the service, and of each endpoint."""
        return [self.count(row, field) for row in (self.row, *(endpoint.row for endpoint in self.endpoints))]


def over(flow: Flow) -> bool:
    """Whether a flow has ended."""
    return flow.done


@pytest.fixture
def resources() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def lab(resources: contextlib.ExitStack) -> Lab:
    return Lab(resources)


# -- flows ---------------------------------------------------------------------------------------------------


def test_a_new_client_gets_a_flow_and_replies_come_from_the_listeners_address(lab: Lab) -> None:
    server, client = lab.server(), Peer(lab)
    lab.flow(client, b"question")
    data, flow = server.hears()
    assert data == b"question"
    server.sock.sendto(b"answer", flow)
    assert client.hears() == (b"answer", lab.listener.sock.getsockname())
    assert (lab.plane.flows, lab.figures(OPENED)[1:], lab.figures(ATTEMPTS)) == (1, [1], [1, 1])


def test_a_known_client_keeps_its_flow_and_others_have_their_own(lab: Lab) -> None:
    first, second = Peer(lab), Peer(lab)
    lab.balance(first.port, second.port)
    client, other = Peer(lab), Peer(lab)
    flow = lab.flow(client, b"1")
    _, source = first.hears()
    assert lab.flow(other, b"x") is not flow
    assert second.hears()[0] == b"x"
    for data in (b"2", b"3"):
        assert lab.flow(client, data) is flow
        assert first.hears() == (data, source)
        first.sock.sendto(b"re " + data, source)
        assert client.hears()[0] == b"re " + data
    assert lab.listener.named == {client.name: flow}, "it has become a conversation; the other has not"
    assert lab.plane.flows == 2


def test_a_reply_is_nobody_elses(lab: Lab) -> None:
    server, clients = lab.server(), [Peer(lab) for _ in range(5)]
    sources = []
    for number, client in enumerate(clients):
        lab.flow(client, b"%d" % number)
        sources.append(server.hears()[1])
    for number, source in reversed(list(enumerate(sources))):
        server.sock.sendto(b"to %d" % number, source)
    assert [client.hears()[0] for client in clients] == [b"to %d" % number for number in range(5)]
    assert all(client.waits() for client in clients)


def test_figures_are_brought_up_to_date_by_a_pass(lab: Lab) -> None:
    server, client = lab.server(), Peer(lab)
    lab.talking(client, server)
    lab.time(2 * TICK_SECONDS)
    for field, value in ((DATAGRAMS_IN, 2), (DATAGRAMS_OUT, 2), (BYTES_IN, 16), (BYTES_OUT, 12), (CLOSED, 0)):
        assert lab.figures(field) == [value, value]
    lab.flow(client, b"more").finish("ended")
    for field, value in ((DATAGRAMS_IN, 3), (DATAGRAMS_OUT, 2), (BYTES_IN, 20), (BYTES_OUT, 12), (CLOSED, 1)):
        assert lab.figures(field) == [value, value]
    (record,) = lab.records()
    assert (record.bytes_in, record.bytes_out, record.attempts, record.reason) == (20, 12, 1, "ended")
    assert (lab.plane.flows, lab.listener.ended, lab.listener.flows, lab.listener.named) == (0, 1, {}, {})


def test_a_reply_that_the_kernel_does_not_take_is_counted(lab: Lab) -> None:
    server = lab.server()
    lab.flow(0)  # nothing can be sent to port 0
    server.answers(b"answer")
    lab.loop.until(lambda: lab.count(lab.row, DROPPED_TO_CLIENT))
    assert lab.count(lab.row, DROPPED_TO_CLIENT) == 1
    assert list(lab.trouble()) == [
        f"listener {lab.listener.address}: replies to UDP clients were dropped: the kernel did not take them"
    ]


# -- idle ----------------------------------------------------------------------------------------------------


def waiting(lab: Lab, client: Peer, _server: Peer) -> Flow:
    return lab.flow(client)


@pytest.mark.parametrize(
    ("stage", "timeout", "own", "seconds"),
    [
        (waiting, None, None, WAIT_SECONDS),
        (waiting, 3.0, None, WAIT_SECONDS),  # an endpoint may think for long, whatever is said of idle flows
        (waiting, 30.0, None, 30),
        (waiting, 30.0, 20.0, 20),
        (Lab.answered, None, None, BRIEF_SECONDS),
        (Lab.answered, 3.0, None, 3),
        (Lab.answered, 30.0, None, 30),
        (Lab.answered, 30.0, 20.0, 20),
        (Lab.talking, None, None, IDLE_SECONDS),
        (Lab.talking, 3.0, None, 3),
        (Lab.talking, 30.0, 5.0, 5),
    ],
)
def test_an_idle_flow_is_ended(
    resources: contextlib.ExitStack,
    stage: Callable[[Lab, Peer, Peer], Flow],
    timeout: float | None,
    own: float | None,
    seconds: float,
) -> None:
    lab = Lab(resources, udp_timeout=timeout)
    server, client = lab.server(), Peer(lab)
    lab.balancer.udp_idle_seconds = own
    flow = stage(lab, client, server)
    lab.time(seconds - 0.01)
    assert not over(flow)
    assert lab.plane.flows == 1
    lab.time(3 * TICK_SECONDS)
    assert over(flow)
    assert (lab.plane.flows, lab.reasons(), lab.figures(CLOSED)) == (0, ["idle"], [1, 1])
    # The client may come again.
    assert lab.flow(client) is not flow


def test_a_flow_is_idle_since_its_last_datagram_not_since_the_pass_before_that(lab: Lab) -> None:
    lab.server()
    lab.flow(1)
    lab.loop.now += TICK_SECONDS - 0.1
    flow = lab.flow(2)
    lab.time(0.3)
    lab.time(WAIT_SECONDS - 0.5)
    assert not over(flow)


@pytest.mark.parametrize("speaker", ["client", "server"])
def test_a_flow_that_is_used_again_and_again_stays(resources: contextlib.ExitStack, speaker: str) -> None:
    lab = Lab(resources, udp_timeout=30)
    server, client = lab.server(), Peer(lab)
    flow = lab.flow(client)
    _, source = server.hears()
    server.sock.sendto(b"answer", source)
    client.hears()
    lab.flow(client)
    server.hears()
    for _ in range(5):
        lab.time(25)
        lab.answered(Peer(lab), server)
        if speaker == "client":
            assert lab.flow(client) is flow
            server.hears()
        else:
            server.sock.sendto(b"answer", source)
            client.hears()
    lab.time(25)
    assert not over(flow)
    lab.time(10)
    assert over(flow)


def test_while_the_table_fills_up_single_exchanges_end_sooner(resources: contextlib.ExitStack) -> None:
    lab = Lab(resources, max_relays=16)
    server = lab.server()
    clients = [Peer(lab) for _ in range(9)]
    conversation = lab.talking(clients[0], server)
    flows = [lab.answered(client, server) for client in clients[1:]]
    lab.time(HURRIED_SECONDS - 0.01)
    assert not any(over(flow) for flow in flows)
    lab.time(3 * TICK_SECONDS)
    assert all(over(flow) for flow in flows)
    assert not over(conversation)


def test_many_idle_flows_are_ended_some_at_a_time_and_one_used_meanwhile_stays(lab: Lab) -> None:
    lab.server()
    flows = [lab.flow(port) for port in range(1, 451)]
    lab.time(WAIT_SECONDS + TICK_SECONDS)
    while not lab.listener.ended:
        lab.time(TICK_SECONDS)
    assert 0 < lab.listener.ended <= 200
    left = [flow for flow in flows if not over(flow)]
    left[-1].forward(b"here I am")
    for _ in range(3):
        lab.loop.advance(0.01)
    assert [flow for flow in flows if not over(flow)] == left[-1:]


def test_without_flows_there_are_no_passes(lab: Lab) -> None:
    lab.server()
    flow = lab.flow(1)
    flow.finish("ended")
    lab.time(2 * TICK_SECONDS)
    clock = lab.table.clock
    lab.time(100)
    assert lab.table.clock == clock
    flow = lab.flow(1)
    assert flow.used == lab.loop.now, "the clock does not lag behind for the first flow after a rest"
    lab.time(WAIT_SECONDS - 0.01)
    assert not over(flow)


# -- room ----------------------------------------------------------------------------------------------------


def test_one_listener_has_three_quarters_of_the_table_and_its_longest_idle_flows_make_room(
    resources: contextlib.ExitStack,
) -> None:
    lab = Lab(resources, max_relays=16)
    lab.server()
    other = lab.listen()
    elsewhere = lab.flow(1, listener=other)
    flows = []
    for port in range(1, 13):
        flows.append(lab.flow(port))
        lab.time(TICK_SECONDS)
    assert lab.evicted() == 0
    for number, port in enumerate(range(13, 16), 1):
        lab.flow(port)
        assert lab.evicted() == number
        assert [over(flow) for flow in flows] == [True] * number + [False] * (12 - number)
    assert not over(elsewhere)
    assert (len(lab.listener.flows), lab.reasons()) == (12, ["evicted"] * 3)
    assert list(lab.trouble()) == [
        "as many UDP flows as there may be: the longest idle are ended; raise the limit of open files"
    ]


def test_where_the_table_is_full_the_longest_idle_of_all_listeners_makes_room(
    resources: contextlib.ExitStack,
) -> None:
    lab = Lab(resources, max_relays=16)
    lab.server()
    listeners = [lab.listener, lab.listen(), lab.listen()]
    flows = []
    for port in range(16):
        flows.append(lab.flow(port + 1, listener=listeners[port % 2]))
        lab.time(TICK_SECONDS)
    lab.flow(100, listener=listeners[2])
    assert [over(flow) for flow in flows] == [True] + [False] * 15
    assert lab.plane.flows == 16


def test_of_a_flood_the_flood_goes_not_those_who_were_answered(resources: contextlib.ExitStack) -> None:
    lab = Lab(resources, max_relays=16)
    server = lab.server()
    friends = [lab.answered(Peer(lab), server), lab.talking(Peer(lab), server)]
    lab.time(TICK_SECONDS)
    for port in range(1, 100):
        lab.flow(port)
        server.hears()
    assert not any(over(flow) for flow in friends)
    assert lab.evicted() == 99 + 2 - 12


def test_of_a_flood_that_is_answered_those_who_wait_stay(resources: contextlib.ExitStack) -> None:
    lab = Lab(resources, max_relays=16)
    server = lab.server()
    friends = [lab.flow(1)]
    server.hears()
    friends.append(lab.talking(Peer(lab), server))
    for _ in range(20):
        lab.answered(Peer(lab), server)
    assert not any(over(flow) for flow in friends)


def test_conversations_go_only_when_there_is_nothing_else(resources: contextlib.ExitStack) -> None:
    lab = Lab(resources, max_relays=16)
    server = lab.server()
    flows = []
    for _ in range(12):
        flows.append(lab.talking(Peer(lab), server))
        lab.time(TICK_SECONDS)
    newcomer = lab.flow(1)
    assert [over(flow) for flow in flows] == [True] + [False] * 11
    lab.flow(2)
    assert [over(flow) for flow in flows[:3]] == [True, True, False], "it had been chosen with the first"
    lab.flow(3)
    assert over(newcomer), "one that waits goes before a conversation"
    assert [over(flow) for flow in flows[:3]] == [True, True, False]


def test_a_flow_that_was_used_since_it_was_chosen_is_spared(resources: contextlib.ExitStack) -> None:
    lab = Lab(resources, max_relays=16)
    lab.server()
    flows = []
    for port in range(1, 13):
        flows.append(lab.flow(port))
        lab.time(TICK_SECONDS)
    lab.flow(13)  # two are chosen, one ends
    assert [over(flow) for flow in flows[:3]] == [True, False, False]
    lab.flow(2)
    lab.flow(14)
    assert [over(flow) for flow in flows[:4]] == [True, False, True, False]


def test_where_most_flows_only_wait_for_a_last_reply_one_of_these_goes(
    resources: contextlib.ExitStack,
) -> None:
    lab = Lab(resources, max_relays=16)
    (gone, _) = lab.balance(Peer(lab).port, Peer(lab).port)
    lab.balancer.update([gone], 0)
    drained = []
    for port in range(1, 13):
        drained.append(lab.flow(port))
        lab.time(0.1)
    lab.remove(gone)
    assert len(lab.table.draining) == 12
    stay = [lab.flow(port) for port in range(1, 5)]
    assert lab.evicted() == 0
    lab.flow(5)
    assert [over(flow) for flow in drained] == [True] + [False] * 11
    assert not any(over(flow) for flow in stay)
    assert lab.evicted() == 1


# -- endpoints that go ---------------------------------------------------------------------------------------


def test_a_reply_under_way_when_the_endpoint_is_removed_still_arrives(lab: Lab) -> None:
    old, new, client = Peer(lab), Peer(lab), Peer(lab)
    gone, _ = lab.balance(old.port, new.port)
    flow = lab.flow(client, b"1")
    _, source = old.hears()
    lab.remove(gone)
    assert not over(flow)
    # The client goes on with another endpoint meanwhile.
    assert lab.flow(client, b"2") is not flow
    assert new.answers(b"re 2") == b"2"
    assert client.hears()[0] == b"re 2"
    old.sock.sendto(b"re 1", source)
    assert client.hears()[0] == b"re 1"
    assert over(flow)
    assert (lab.plane.flows, lab.reasons(), lab.table.draining) == (1, ["endpoint removed"], {})
    lab.answered(client, new)


def test_a_reply_that_does_not_come_is_not_waited_for_for_long(lab: Lab) -> None:
    (gone,) = lab.balance(Peer(lab).port)
    flow = lab.flow(1)
    lab.remove(gone)
    lab.time(DRAIN_SECONDS - TICK_SECONDS)
    assert not over(flow)
    lab.time(2 * TICK_SECONDS)
    assert over(flow)
    assert (lab.plane.flows, lab.reasons()) == (0, ["endpoint removed"])


def test_a_flow_without_a_reply_under_way_ends_with_its_endpoint(lab: Lab) -> None:
    server, client = lab.server(), Peer(lab)
    flow = lab.talking(client, server)
    lab.remove(lab.endpoints[0])
    assert over(flow)
    assert (lab.plane.flows, lab.listener.named, lab.reasons()) == (0, {}, ["endpoint removed"])


def test_where_all_endpoints_are_gone_the_flow_is_over(lab: Lab) -> None:
    lab.balance()
    assert lab.says(1) is None
    assert (lab.plane.flows, lab.count(lab.row, FAILED), lab.reasons()) == (0, 1, ["no endpoint"])


# -- endpoints that refuse -----------------------------------------------------------------------------------


def test_a_first_datagram_that_is_refused_goes_to_the_next_endpoint(lab: Lab) -> None:
    server, client = Peer(lab), Peer(lab)
    refusing, _ = lab.balance(lab.refusing(), server.port)
    flow = lab.flow(client, b"question")
    assert server.answers(b"answer") == b"question"
    assert client.hears()[0] == b"answer"
    assert lab.flow(client) is flow
    assert (lab.figures(FAILED), lab.figures(ATTEMPTS)) == ([0, 1, 0], [2, 1, 1])
    assert lab.trouble() == {f"endpoint {refusing} of {SERVICE}: Connection refused": 1}
    # For a while others come first.
    assert lab.flow(Peer(lab), b"other").endpoint is lab.endpoints[1]
    assert lab.flow(Peer(lab), b"other").endpoint is lab.endpoints[1]


def test_a_second_datagram_that_learns_of_the_refusal_goes_to_the_next_endpoint(lab: Lab) -> None:
    server, client = Peer(lab), Peer(lab)
    lab.balance(lab.refusing(), server.port)
    flow = lab.flow(client, b"1")
    assert lab.flow(client, b"2") is flow  # before the event
    assert server.hears()[0] == b"2"
    assert (flow.datagrams_in, flow.bytes_in, lab.figures(FAILED)) == (2, 2, [0, 1, 0])


def test_of_several_datagrams_without_a_reply_the_last_goes_to_the_next_endpoint(lab: Lab) -> None:
    first, second, client = Peer(lab), Peer(lab), Peer(lab)
    lab.balance(first.port, second.port)
    lab.flow(client, b"1")
    first.hears()
    first.sock.close()
    lab.flow(client, b"2")
    assert second.hears()[0] == b"2"


def test_where_all_refuse_the_flow_is_over(lab: Lab) -> None:
    lab.balance(*(lab.refusing() for _ in range(3)))
    flow = lab.flow(1)
    lab.loop.until(lambda: over(flow))
    assert lab.figures(FAILED) == [1, 1, 1, 1]
    assert (lab.plane.flows, lab.reasons()) == (0, ["no endpoint"])


def test_of_many_dead_endpoints_not_all_are_tried_for_one_datagram(lab: Lab) -> None:
    port = lab.refusing()
    lab.balance(*[port] * (MAX_ATTEMPTS + 4))
    flow = lab.flow(1)
    lab.loop.until(lambda: over(flow))
    assert lab.count(lab.row, ATTEMPTS) == MAX_ATTEMPTS


@pytest.mark.parametrize(("size", "arrives"), [(KEPT_BYTES, True), (KEPT_BYTES + 1, False)])
def test_only_a_datagram_of_a_usual_size_is_kept_for_another_endpoint(
    lab: Lab, size: int, arrives: bool
) -> None:
    server = Peer(lab)
    lab.balance(lab.refusing(), server.port)
    flow = lab.flow(1, bytes(size))
    if arrives:
        assert server.hears()[0] == bytes(size)
        assert not over(flow)
    else:
        lab.loop.until(lambda: over(flow))
        assert server.waits()
        assert lab.reasons() == ["refused by endpoint"]


def test_an_endpoint_that_dies_ends_its_flow_and_the_next_datagram_goes_elsewhere(lab: Lab) -> None:
    first, second, client = Peer(lab), Peer(lab), Peer(lab)
    lab.balance(first.port, second.port)
    flow = lab.answered(client, first)
    first.sock.close()
    lab.flow(client, b"lost")
    lab.loop.until(lambda: over(flow))
    assert lab.reasons() == ["refused by endpoint"]
    assert second.waits()
    lab.answered(client, second)


def test_a_datagram_that_learns_that_the_endpoint_has_died_goes_to_another(lab: Lab) -> None:
    first, second, client = Peer(lab), Peer(lab), Peer(lab)
    lab.balance(first.port, second.port)
    flow = lab.answered(client, first)
    first.sock.close()
    lab.flow(client, b"lost")
    assert lab.flow(client, b"saved") is not flow  # before the event
    assert over(flow)
    assert second.hears()[0] == b"saved"
    assert lab.plane.flows == 1


# -- shortages -----------------------------------------------------------------------------------------------


def test_out_of_descriptors_an_idle_flow_makes_room_and_the_datagram_goes_later(lab: Lab) -> None:
    server = lab.server()
    old = lab.flow(1, b"old")
    assert server.hears()[0] == b"old"
    with no_descriptors():
        assert lab.says(2, b"new") is None
        assert over(old)
    assert server.hears()[0] == b"new"
    assert (lab.evicted(), lab.figures(FAILED)) == (1, [0, 0])
    assert lab.count(lab.row, DROPPED) == 0
    assert f"{os.strerror(errno.EMFILE)}: idle flows are ended to make room for those of {SERVICE}" in (
        lab.trouble()
    )


def test_a_datagram_that_meets_a_shortage_again_is_dropped_and_counted(lab: Lab) -> None:
    server = lab.server()
    with no_descriptors():
        assert lab.says(1) is None
        lab.loop.turn(3)
    assert lab.count(lab.row, DROPPED) == 1
    assert server.waits()
    assert lab.plane.flows == 0
    assert lab.trouble()[f"datagrams of {SERVICE} were dropped: {os.strerror(errno.EMFILE)}"] == 1
