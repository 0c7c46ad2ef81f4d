"""What workers are told: parts that fit into messages, numbers, and rows of counters."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from proxyd.api.service import Protocol, TrafficPolicy
from proxyd.control.workers.publication import MAX_ENDPOINTS, Held, Publication, still_open
from proxyd.control.workers.slot_allocator import SPARE, SlotAllocator
from proxyd.relay.ipc.channel import Channel
from proxyd.relay.ipc.messages import MAX_DESCRIPTORS, Apply, BalancerConfig, ListenerConfig
from proxyd.relay.ipc.slots import MAX_SLOTS, OPENED, Slots
from proxyd.state.spec import (
    BalancerKey,
    BalancerSpec,
    Endpoint,
    ListenerKey,
    ListenerSpec,
    Role,
    ServicePortName,
)
from proxyd.state.wishes import MAX_SOURCE_RANGES


@pytest.fixture
def slots() -> Iterator[Slots]:
    slots = Slots.create()
    yield slots
    slots.close()


@pytest.fixture
def publication(slots: Slots) -> Iterator[Publication]:
    publication = Publication(slots, 2)
    yield publication
    publication.close_all()


def key(number: int = 0, *, family: int = 4, name: str = "service") -> BalancerKey:
    service_port = ServicePortName("namespace", f"{name}-{number}", "", Protocol.TCP)
    return BalancerKey(service_port, TrafficPolicy.CLUSTER, family)


def balancer(
    number: int = 0, *ports: int, family: int = 4, name: str = "service", affinity: int = 0
) -> BalancerSpec:
    """One whose endpoints have addresses as long as they can be."""
    ip = "255.255.255.255" if family == 4 else ":".join(["fd00"] * 8)
    return BalancerSpec(
        key=key(number, family=family, name=name),
        endpoints=tuple(Endpoint(ip, port) for port in ports),
        affinity_seconds=affinity,
    )


def listener(number: int, wanted: BalancerKey, *, ranges: tuple[str, ...] = ()) -> ListenerSpec:
    where = ListenerKey(f"127.96.{number >> 8}.{number & 255}", 80, Protocol.TCP)
    return ListenerSpec(key=where, balancer=wanted, role=Role.LOAD_BALANCER, source_ranges=ranges)


def delivered(publication: Publication, worker: int = 0) -> list[Apply]:
    """What comes to a worker through its channel of all that is in force."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    control, program = Channel(ours), Channel(theirs)
    messages = []
    try:
        publication.take_update()
        for message, listeners in publication.parts(publication.full(), worker):
            assert control.send(message, [held.socket.fileno() for held in listeners])
            received = program.receive()
            assert received is not None
            assert isinstance(received[0], Apply)
            assert len(received[1]) == len(listeners) == len(received[0].listeners)
            for fd, held, config in zip(received[1], listeners, received[0].listeners, strict=True):
                with socket.socket(fileno=fd) as sock:
                    assert sock.getsockname() == held.socket.getsockname()
                assert config.id == held.id
            messages.append(received[0])
    finally:
        control.close()
        program.close()
    assert [message.last for message in messages] == [False] * (len(messages) - 1) + [True]
    return messages


def balancers(messages: list[Apply]) -> dict[str, BalancerConfig]:
    return {config.name: config for message in messages for config in message.balancers}


def listeners(messages: list[Apply]) -> list[ListenerConfig]:
    return [config for message in messages for config in message.listeners]


# -- parts ----------------------------------------------------------------------------------------------------------------


def test_a_thousand_services_with_the_longest_names_fit(publication: Publication) -> None:
    for number in range(1000):
        publication.set_balancer(balancer(number, 80, family=6, name="n" * 120))
    assert len(balancers(delivered(publication))) == 1000


def test_many_services_are_few_messages(publication: Publication) -> None:
    for number in range(1000):
        publication.set_balancer(balancer(number, 80, 81))
    assert len(delivered(publication)) <= 4


@pytest.mark.parametrize(("family", "count"), [(4, MAX_ENDPOINTS), (6, 2300)])
def test_endpoints_beyond_what_fits_into_a_message_are_left_out(
    publication: Publication, family: int, count: int
) -> None:
    spec = balancer(0, *range(1, 5001), family=family, name="n" * 120)
    publication.set_balancer(spec)
    (config,) = balancers(delivered(publication)).values()
    assert [(ip, port) for ip, port, _ in config.endpoints] == list(spec.endpoints[:count])


def test_further_addresses_of_sctp_endpoints_fit_too(publication: Publication) -> None:
    ips = [f"fd00:1234:1234:1234:1234:1234:1234:{number:04x}" for number in range(2000)]
    spec = BalancerSpec(
        key=key(family=6),
        endpoints=tuple(Endpoint(ip, 3868) for ip in ips),
        further=dict.fromkeys(ips, ("fd00:abcd:abcd:abcd:abcd:abcd:abcd:abcd",) * 3),
    )
    publication.set_balancer(spec)
    (config,) = balancers(delivered(publication)).values()
    assert config.endpoints
    assert config.further.keys() == {ip for ip, _, _ in config.endpoints}


def test_no_more_descriptors_than_a_message_may_have(publication: Publication) -> None:
    publication.set_balancer(balancer(0, 80))
    for number in range(2 * MAX_DESCRIPTORS + 1):
        publication.open(listener(number, key()), socket.socket())
    messages = delivered(publication)
    assert [len(message.listeners) for message in messages if message.listeners] == [200, 200, 1]
    assert len({config.id for config in listeners(messages)}) == 401


def test_listeners_with_as_many_source_ranges_as_they_may_have_fit(publication: Publication) -> None:
    """Each address and port of a Service has them all."""
    one = "fd00:1234:1234:1234:1234:1234:1234:1234/128"
    ranges = (one,) * (MAX_SOURCE_RANGES // (len(one) + 3))
    publication.set_balancer(balancer(0, 80))
    for number in range(5):
        publication.open(listener(number, key(), ranges=ranges), socket.socket())
    assert [config.source_ranges for config in listeners(delivered(publication))] == [list(ranges)] * 5


def test_a_listener_that_was_closed_meanwhile_is_not_sent(publication: Publication) -> None:
    """Updates wait while a worker does not read."""
    publication.set_balancer(balancer(0, 80))
    for number in range(3):
        publication.open(listener(number, key()), socket.socket())
    waiting = list(publication.parts(publication.take_update(), 0))
    publication.close(listener(1, key()).key, None)
    ((message, held),) = [part for part in waiting if part[0].listeners]
    kept, descriptors = still_open(message, held)
    assert [config.address for config in kept.listeners] == ["127.96.0.0:80", "127.96.0.2:80"]
    assert descriptors == [held[0].socket.fileno(), held[2].socket.fileno()]


# -- who has it -----------------------------------------------------------------------------------------------------------


def test_a_listener_whose_clients_are_remembered_is_in_one_worker(publication: Publication) -> None:
    publication.set_balancer(balancer(0, 80, affinity=10))
    publication.set_balancer(balancer(1, 80))
    publication.open(listener(0, key(0)), socket.socket())
    publication.open(listener(1, key(1)), socket.socket())
    publication.take_update()
    addresses = [
        [config.address for config in listeners(delivered(publication, worker))] for worker in (0, 1)
    ]
    shared, remembers = "127.96.0.1:80", "127.96.0.0:80"
    assert sorted(addresses, key=len) == [[shared], [remembers, shared]]


def test_when_affinity_comes_the_others_give_the_listener_up_and_the_socket_stays(
    publication: Publication,
) -> None:
    publication.set_balancer(balancer(0, 80))
    sock = socket.socket()
    publication.open(listener(0, key()), sock)
    publication.take_update()
    before = publication.held[listener(0, key()).key]
    publication.set_balancer(balancer(0, 80, affinity=10))
    after = publication.held[listener(0, key()).key]
    assert after.socket is sock
    assert (before.owner, after.owner) != (None, None)
    assert after.id != before.id
    update = publication.take_update()
    for worker in (0, 1):
        (told,) = [message for message, _ in publication.parts(update, worker) if message.close]
        assert [one.id for one in told.close] == [before.id]
        assert told.close[0].drain is None, "relays stay"
    (retired,) = publication.take_retired()
    assert (retired.id, retired.owner, retired.drains) == (before.id, None, False)


def test_what_no_worker_has_heard_of_is_not_closed_with_them(publication: Publication) -> None:
    publication.set_balancer(balancer(0, 80))
    publication.open(listener(0, key()), socket.socket())
    publication.close(listener(0, key()).key, None)
    update = publication.take_update()
    assert not update.listeners
    assert not update.close
    assert not publication.take_retired()


# -- numbers and rows -----------------------------------------------------------------------------------------------------


def test_balancers_without_a_row_of_their_own_are_told_apart(slots: Slots) -> None:
    """Rows are for 131,071 balancers and endpoints; whoever comes later has the spare one, and its own endpoints."""
    publication = Publication(slots, 1)
    publication._rows = SlotAllocator(slots, rows=3)
    for number in range(4):
        publication.set_balancer(balancer(number, 80 + number))
    configs = balancers(delivered(publication))
    assert len({config.id for config in configs.values()}) == 4
    assert [config.endpoints[0][1] for config in configs.values()] == [80, 81, 82, 83]
    # A worker counts what has no row in the spare one.
    rowless = [config.id for config in configs.values() if config.id >= MAX_SLOTS]
    assert len(rowless) == 3
    assert [config.endpoints[0][2] for config in configs.values() if config.id in rowless] == [SPARE] * 3


def test_a_balancer_keeps_its_number_for_its_life(slots: Slots) -> None:
    """Listeners name it in a worker, also when a row is free meanwhile."""
    publication = Publication(slots, 1)
    publication._rows = SlotAllocator(slots, rows=3)
    publication.set_balancer(balancer(0, 80))
    publication.set_balancer(balancer(1, 80))
    before = balancers(delivered(publication))["namespace/service-1"].id
    publication.drop_balancer(key(0))
    publication.forget(key(0))
    publication.set_balancer(balancer(1, 80, 81))
    config = balancers(delivered(publication))["namespace/service-1"]
    assert config.id == before
    assert sorted(row for _, _, row in config.endpoints) == [1, 2], "but its endpoints take what is free"


def test_rows_come_back_and_begin_at_zero(slots: Slots) -> None:
    publication = Publication(slots, 1)
    publication._rows = SlotAllocator(slots, rows=4)
    publication.set_balancer(balancer(0, 80))
    row = balancers(delivered(publication))["namespace/service-0"].endpoints[0][2]
    slots.view[slots.row(0, row) + OPENED] = 7
    assert publication.row((key(0), balancer(0, 80).endpoints[0]))[OPENED] == 7
    publication.set_balancer(balancer(0, 81))
    publication.set_balancer(balancer(0, 82))  # all rows were used once
    config = balancers(delivered(publication))["namespace/service-0"]
    assert config.endpoints[0][1:] == (82, row)
    assert publication.row((key(0), balancer(0, 82).endpoints[0])) == [0] * 16
    publication.drop_balancer(key(0))
    publication.forget(key(0))
    assert not publication._rows._owned
    assert sorted(publication._rows._freed) == [1, 2, 3]


def test_a_balancer_that_comes_back_goes_on_counting(publication: Publication, slots: Slots) -> None:
    """As when a Service has no endpoints for a while."""
    publication.set_balancer(balancer(0, 80))
    number = balancers(delivered(publication))["namespace/service-0"].id
    slots.view[slots.row(1, number) + OPENED] = 7
    publication.drop_balancer(key())
    assert publication.balancer_keys(key().service_port) == {key()}
    assert publication.row(key())[OPENED] == 7
    publication.set_balancer(balancer(0, 80))
    assert balancers(delivered(publication))["namespace/service-0"].id == number
    assert publication.row(key())[OPENED] == 7
    publication.drop_balancer(key())
    publication.forget(key())
    assert publication.balancer_keys(key().service_port) == frozenset()
    assert publication.row(key()) == [0] * 16


def test_listeners_never_get_the_number_of_another(publication: Publication) -> None:
    publication.set_balancer(balancer(0, 80))
    numbers: list[int] = []
    for _ in range(5):
        publication.open(listener(0, key()), socket.socket())
        held: Held = publication.held[listener(0, key()).key]
        numbers.append(held.id)
        publication.change(listener(0, key(), ranges=("10.0.0.0/8",)), None)
        numbers.append(publication.held[listener(0, key()).key].id)
        publication.close(listener(0, key()).key, None)
    assert len(set(numbers)) == 10
