"""How associations end: whoever ends it, however, at whatever moment, the other end learns the same as without proxyd."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support import sctp_probe
from tests.support.daemon import resident_kib
from tests.support.sctp_probe import Association, End, Message, Server
from tests.support.sctplab import SctpLab, pod_ip
from tests.support.waiting import wait_for

Join = Callable[..., tuple[Association, Association]]

KIB = 1024
ENDS: dict[End, Callable[[Association], None]] = {
    End.SHUTDOWN: Association.shut_down,
    End.ABORT: Association.abort,
}

who = pytest.mark.parametrize("who", ["client", "server"])
how = pytest.mark.parametrize("how", list(ENDS), ids=["shutdown", "abort"])


def roles(pair: tuple[Association, Association], who: str) -> tuple[Association, Association]:
    """Who ends it, and the other."""
    client, server = pair
    return (client, server) if who == "client" else (server, client)


@who
@how
def test_end_of_an_idle_association(join: Join, via: str, who: str, how: End) -> None:
    actor, other = roles(join(via), who)
    actor.send(Message(b"before"))
    assert other.receive() == Message(b"before")
    ENDS[how](actor)
    assert other.receive() is how
    if how is End.SHUTDOWN:
        assert actor.receive() is End.SHUTDOWN


@who
@how
def test_end_behind_messages_that_nobody_has_read(join: Join, via: str, who: str, how: End) -> None:
    actor, other = roles(join(via), who)
    sent = [Message(number.to_bytes(4, "big") * 2048, number % 10) for number in range(100)]
    actor.send(*sent)
    ENDS[how](actor)
    received, end = other.rest()
    assert end is how
    if how is End.SHUTDOWN:
        assert sorted(received) == sorted(sent)
        assert actor.rest() == ([], End.SHUTDOWN)
    else:
        assert set(received) <= set(sent)


@who
@how
def test_end_in_the_middle_of_a_message(join: Join, via: str, who: str, how: End) -> None:
    # The other side takes 32 KiB, then its window is closed: the rest of the message waits.
    actor, other = roles(_narrow(join, via, who), who)
    message = Message(os.urandom(256 * KIB), 3)
    actor.send(message)
    assert select.select([other.socket], [], [], sctp_probe.TIMEOUT)[0]
    ENDS[how](actor)
    received, end = other.rest()
    assert end is how
    assert received == ([message] if how is End.SHUTDOWN else [])


def _narrow(join: Join, via: str, who: str) -> tuple[Association, Association]:
    """A client and a server, of which the one that does not act has small buffers."""
    if who == "client":
        return join(via, server_buffer=16 * KIB)
    return join(via, buffer=16 * KIB)


@how
def test_end_before_the_server_accepts(sctp: SctpLab, via: str, how: End) -> None:
    sent = [Message(b"%d" % number, number) for number in range(3)]
    with Server(sctp.lab.pods[0], pod_ip(1)) as server:
        service = sctp.service(server) if via == "proxyd" else None
        with (
            service.connect()
            if service
            else sctp_probe.connect(sctp.lab.client, server.ip, server.port) as client
        ):
            client.send(*sent)
            if service:
                wait_for(
                    lambda: [one["bytesIn"] for one in service.connections()] == [3], "the messages sent on"
                )
            ENDS[how](client)
            if service and how is End.ABORT:
                service.wait_ended()
            with server.accept() as accepted:
                received, end = accepted.rest()
        if how is End.SHUTDOWN:
            assert end is End.SHUTDOWN
            assert sorted(received) == sorted(sent)
        else:
            # The kernel keeps what came, and forgets how it ended: that is not told apart here.
            assert set(received) <= set(sent)
        if service:
            service.remove()


@contextlib.contextmanager
def stopped_worker(sctp: SctpLab) -> Iterator[None]:
    """A worker that does nothing for a while; the kernel sets associations up for it."""
    worker = sctp.worker()
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # where that took long, it was replaced
            os.kill(worker, signal.SIGCONT)


@how
def test_end_before_proxyd_accepts(sctp: SctpLab, how: End) -> None:
    sent = [Message(b"%d" % number, number) for number in range(3)]
    with Server(sctp.lab.pods[0], pod_ip(1)) as server:
        service = sctp.service(server)
        with stopped_worker(sctp):
            client = service.connect()
            client.send(*sent)
            ENDS[how](client)
            if how is End.SHUTDOWN:
                assert client.rest() == ([], End.SHUTDOWN)
        if how is End.SHUTDOWN:
            with server.accept() as accepted:
                received, end = accepted.rest()
            assert end is End.SHUTDOWN
            assert sorted(received) == sorted(sent)
        client.close()
        service.wait_ended()
        # What came too early does no harm to what comes later.
        with service.connect() as second:
            second.send(Message(b"second"))
            assert b"second" in _first_data(server)


def _first_data(server: Server) -> Iterator[bytes]:
    """The first message of each association that is accepted, where there is one."""
    while True:
        with server.accept() as accepted:
            message = accepted.receive()
            if isinstance(message, Message):
                yield message.data


@how
def test_end_while_proxyd_connects_to_an_endpoint_that_is_silent(sctp: SctpLab, how: End) -> None:
    service = sctp.service(("10.244.0.200", 4000))  # nobody has this address
    with service.connect() as client:
        client.send(Message(b"lost"))
        wait_for(service.connections, "the association")
        ENDS[how](client)
        service.wait_ended()


def test_close_with_unread_messages_is_an_abort_for_the_other_side(join: Join, via: str) -> None:
    client, server = join(via)
    client.send(Message(b"one"), Message(b"two"))
    assert server.receive() == Message(b"one")
    assert select.select([server.socket], [], [], sctp_probe.TIMEOUT)[0]
    server.close()
    assert client.receive() is End.ABORT


def test_removed_endpoint_keeps_its_associations_and_a_removed_service_lets_them_end(sctp: SctpLab) -> None:
    with Server(sctp.lab.pods[0], pod_ip(1)) as first, Server(sctp.lab.pods[1], "10.244.0.12") as second:
        service = sctp.service(first)
        with service.connect() as client, first.accept() as accepted:
            service.write(second)
            wait_for(lambda: _reaches(service.connect, second), "the new endpoint")
            client.send(Message(b"still"))
            assert accepted.receive() == Message(b"still")
            service.remove()
            wait_for(lambda: not service.listeners(), "the listener closed")
            # By the kernel, or by the guard of the VIP.
            with pytest.raises(OSError, match=r"refused|not available"):
                service.connect()
            accepted.send(Message(b"and again"))
            assert client.receive() == Message(b"and again")
            client.shut_down()
            assert accepted.receive() is End.SHUTDOWN
            assert client.receive() is End.SHUTDOWN
        service.wait_ended()


def _reaches(connect: Callable[[], Association], server: Server) -> bool:
    with connect():
        return server.waiting(0.5)


def test_slow_receiver_stops_its_sender_and_nobody_else(sctp: SctpLab) -> None:
    sent = [Message(number.to_bytes(4, "big") * (16 * KIB), number % 10) for number in range(512)]  # 32 MiB
    total = sum(len(message.data) for message in sent)
    worker = sctp.worker()
    with Server(sctp.lab.pods[0], pod_ip(1)) as server:
        service = sctp.service(server)
        with service.connect() as client, server.accept() as slow:
            before = resident_kib(worker)
            sender = threading.Thread(target=client.send, args=sent)
            client.socket.settimeout(200)
            sender.start()
            moved = -1
            while moved != (moved := service.connections()[0]["bytesIn"]) or not moved:
                threading.Event().wait(1)
            assert moved < total
            assert sender.is_alive()
            assert resident_kib(worker) - before < 8 * KIB
            with service.connect() as quick, server.accept() as other:
                quick.send(Message(b"quick"))
                assert other.receive() == Message(b"quick")
            received = slow.receive_all(len(sent))
            sender.join()
            assert sorted(received) == sent
