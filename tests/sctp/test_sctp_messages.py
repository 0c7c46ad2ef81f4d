"""What a message is stays as it was: boundaries, stream, order or the lack of it, identifier, content."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from tests.support.sctp_probe import Association, End, Message, Streams
from tests.support.sctplab import SctpLab, Server, pod_ip
from tests.support.waiting import wait_for

Join = Callable[..., tuple[Association, Association]]

KIB = 1024
# One byte; around what fits one packet of a path of 1,500 bytes; around powers of two; the largest that is relayed.
SIZES = (1, 2, 1451, 1452, 1453, 4096, 16_383, 65_535, 65_536, 131_073, 256 * KIB)
# Each value of each byte of an identifier, and some that mean something.
PPIDS = [
    bytes([value if place == at else 0 for place in range(4)]) for at in range(4) for value in range(256)
]
PPIDS += [
    b"\xff\xff\xff\xff",
    b"\x01\x02\x03\x04",
    b"\x80\x00\x00\x01",
    b"\x00\x00\x00\x2e",
    b"\x7f\xff\xff\xff",
]


def pairs(client: Association, server: Association) -> list[tuple[Association, Association]]:
    """Both directions, each as (who sends, who receives)."""
    return [(client, server), (server, client)]


def test_every_size_stream_and_order_arrives_as_it_was_sent(join: Join) -> None:
    content = random.Random(5).randbytes(SIZES[-1])
    for sender, receiver in pairs(*join(outgoing=17, incoming=17)):
        for number, size in enumerate(SIZES):
            for unordered in (False, True):
                message = Message(content[:size], number % 17, number.to_bytes(4, "big"), unordered)
                sender.send(message)
                assert receiver.receive() == message, f"{size} bytes, unordered={unordered}"


def test_every_payload_protocol_identifier_is_passed_on_byte_for_byte(join: Join) -> None:
    for sender, receiver in pairs(*join()):
        sent = [Message(b"x", number % 10, ppid, False) for number, ppid in enumerate(PPIDS)]
        # One stream after the other keeps its own order only, so they are told apart by their identifiers.
        sender.send(*sent)
        received = receiver.receive_all(len(sent))
        assert sorted(received) == sorted(sent)


@pytest.mark.parametrize(("outgoing", "incoming"), [(1, 1), (17, 33), (1024, 1024)])
def test_both_ends_have_as_many_streams_as_the_client_asked_for(
    join: Join, outgoing: int, incoming: int
) -> None:
    client, server = join(outgoing=outgoing, incoming=incoming)
    assert client.streams() == Streams(incoming=incoming, outgoing=outgoing)
    assert server.streams() == Streams(incoming=outgoing, outgoing=incoming)
    for (sender, receiver), count in zip(pairs(client, server), (outgoing, incoming), strict=True):
        sent = [Message(b"%d" % stream, stream) for stream in {0, count // 2, count - 1}]
        sender.send(*sent)
        assert sorted(receiver.receive_all(len(sent))) == sorted(sent)


def test_stream_that_the_endpoint_did_not_grant_aborts_the_association_when_used(sctp: SctpLab) -> None:
    # The endpoint admits 5 streams; a client that asks for 17 gets them from proxyd before that is known.
    with Server(sctp.lab.pods[0], pod_ip(1), incoming=5) as server:
        service = sctp.service(server)
        with service.connect(outgoing=17) as client, server.accept() as accepted:
            client.send(Message(b"granted", 4))
            assert accepted.receive() == Message(b"granted", 4)
            client.send(Message(b"not granted", 5))
            assert client.receive() is End.ABORT
            assert accepted.receive() is End.ABORT
        (record,) = service.wait_records(1)
        assert record["reason"] == "stream not granted"


def test_message_above_the_limit_aborts_both_ends_and_says_so(sctp: SctpLab, join: Join) -> None:
    client, server = join(buffer=1 << 21)
    client.send(Message(bytes(256 * KIB + 1)))
    assert client.receive() is End.ABORT
    assert server.receive() is End.ABORT
    wait_for(lambda: "--sctp-max-message" in sctp.proxyd.log(), "a word about it in the log")


class Flow:
    """Many messages over several streams, checked for order, content and that none is lost or doubled.

    Each begins with its number; what follows is a piece of a text that the number chooses. Of ten messages one is unordered.
    """

    def __init__(self, count: int, streams: int, largest: int) -> None:
        self.count = count
        self._streams = streams
        self._text = random.Random(7).randbytes(1 << 16)
        self._sizes = [random.Random(number).choice((0, 8, 30, 120, largest)) for number in range(997)]

    def message(self, number: int) -> Message:
        start = number * 31 % 4096
        size = self._sizes[number % 997]
        data = number.to_bytes(4, "big") + self._text[start : start + size]
        return Message(data, number % self._streams, data[:4], number % 10 == 9)

    def send(self, sender: Association) -> None:
        for number in range(self.count):
            sender.send(self.message(number))

    def check(self, receiver: Association) -> None:
        last = [-1] * self._streams
        seen = bytearray(self.count)
        for _ in range(self.count):
            message = receiver.receive()
            assert isinstance(message, Message), message
            number = int.from_bytes(message.data[:4], "big")
            assert message == self.message(number)
            assert not seen[number], f"message {number} came twice"
            seen[number] = 1
            if not message.unordered:
                assert number > last[message.stream], (
                    f"stream {message.stream}: {number} after {last[message.stream]}"
                )
                last[message.stream] = number


def both_ways(client: Association, server: Association, flow: Flow) -> None:
    """Send the flow both ways at once, and check what arrives."""
    failures: list[BaseException] = []

    def guarded(call: Callable[[Association], None], association: Association) -> None:
        try:
            call(association)
        except BaseException as error:  # noqa: BLE001 raised again below, in the test's thread
            failures.append(error)

    jobs = [(flow.send, client), (flow.check, server), (flow.send, server), (flow.check, client)]
    threads = [threading.Thread(target=guarded, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        raise failure


@pytest.mark.timeout(1500)
def test_hundred_thousand_messages_both_ways_keep_their_order_on_each_stream(join: Join) -> None:
    client, server = join(outgoing=17, incoming=17)
    both_ways(client, server, Flow(100_000, 17, 1400))
