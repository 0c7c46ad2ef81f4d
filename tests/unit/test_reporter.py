"""What a worker tells control, over a real channel; the test reads at the other end, when it wants to."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from proxyd.relay.engine import reporter as module
from proxyd.relay.engine.reporter import (
    MAX_FAILURES,
    MAX_RECORDS,
    MAX_TEXT,
    MAX_TEXTS,
    OTHER_TROUBLE,
    RECORDS_SECONDS,
    TROUBLE_SECONDS,
    Reporter,
)
from proxyd.relay.ipc.channel import Channel
from proxyd.relay.ipc.messages import (
    Acknowledged,
    Connection,
    Connections,
    Drained,
    Failure,
    Failures,
    Ready,
    Trouble,
)
from tests.support.manual_loop import ManualLoop

SERVICE = f"{'n' * 63}/{'s' * 63}:{'p' * 15}"  # the longest that there is
ENDPOINT = f"[{':'.join(['fd00'] * 8)}]:65535"


class Lab:
    """A reporter, and control's end of its channel."""

    def __init__(self, loop: ManualLoop) -> None:
        self.loop = loop
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.worker, self.control = Channel(ours), Channel(theirs)
        self.reporter = Reporter(loop, self.worker)

    def heard(self) -> list[Any]:
        """What has come since the last call."""
        messages = []
        while received := self.control.receive():
            messages.append(received[0])
        return messages

    def fill(self) -> int:
        """Leave no room for another message, as a control does that does not read. Returns how many there are."""
        count = 0
        while self.worker.send(Ready(0)):
            count += 1
        return count


@pytest.fixture
def lab() -> Iterator[Lab]:
    with ManualLoop() as loop:
        lab = Lab(loop)
        yield lab
        lab.reporter.stop()
        lab.worker.close()
        lab.control.close()


def connection(number: int, **fields: Any) -> Connection:
    usual = {
        "client": "192.0.2.1:40000", "frontend": "10.96.0.1:80", "service": "prod/web", "endpoint": "10.1.0.1:80",
        "attempts": 1, "bytes_in": number, "bytes_out": 0, "seconds": 1.0, "reason": "closed", "finished": 1.0,
    }  # fmt: skip
    return Connection(**{**usual, **fields})  # type: ignore[arg-type]


def test_an_answer_goes_at_once(lab: Lab) -> None:
    lab.reporter.answer(Ready(7))
    assert lab.heard() == [Ready(7)]
    lab.reporter.answer(Acknowledged(1))
    lab.reporter.answer(Acknowledged(2))
    assert lab.heard() == [Acknowledged(1), Acknowledged(2)]


def test_what_drained_in_one_turn_is_one_message_at_its_end(lab: Lab) -> None:
    for number in (3, 1, 2):
        lab.reporter.drained(number)
    assert lab.heard() == []
    lab.loop.turn()
    assert lab.heard() == [Drained([3, 1, 2])]
    lab.reporter.drained(4)
    lab.loop.turn()
    assert lab.heard() == [Drained([4])]


def test_all_listeners_at_once_are_several_messages(lab: Lab) -> None:
    for number in range(12_000):
        lab.reporter.drained(number)
    lab.loop.turn()
    messages = lab.heard()
    assert [number for message in messages for number in message.listeners] == list(range(12_000))
    assert len(messages) == 3


def test_records_are_gathered_for_a_moment(lab: Lab) -> None:
    lab.reporter.record(connection(1))
    lab.loop.advance(RECORDS_SECONDS * 0.9)
    lab.reporter.record(connection(2))
    assert lab.heard() == []
    lab.loop.advance(RECORDS_SECONDS * 0.1)
    assert lab.heard() == [Connections([connection(1), connection(2)])]
    lab.loop.advance(RECORDS_SECONDS * 2)
    assert lab.heard() == []
    lab.reporter.record(connection(3))
    lab.loop.advance(RECORDS_SECONDS)
    assert lab.heard() == [Connections([connection(3)])]


def test_many_records_are_bounded_and_what_did_not_fit_is_counted_once(lab: Lab) -> None:
    for number in range(MAX_RECORDS + 7):
        lab.reporter.record(connection(number))
    lab.loop.advance(RECORDS_SECONDS)
    messages = lab.heard()
    assert [one.bytes_in for message in messages for one in message.records] == list(range(MAX_RECORDS))
    assert [message.dropped for message in messages] == [7, 0, 0, 0, 0]
    lab.reporter.record(connection(1))
    lab.loop.advance(RECORDS_SECONDS)
    assert lab.heard() == [Connections([connection(1)], 0)], "there is room again"


def test_the_longest_records_fit(lab: Lab) -> None:
    big = 1 << 62
    for _ in range(MAX_RECORDS):
        lab.reporter.record(
            connection(
                big, client=ENDPOINT, frontend=ENDPOINT, endpoint=ENDPOINT, service=SERVICE, attempts=64,
                bytes_out=big, reason="r" * 100, protocol="SCTP", streams=(1 << 16, 1 << 16), messages=(big, big),
            )
        )  # fmt: skip
    lab.loop.advance(RECORDS_SECONDS)
    assert sum(len(message.records) for message in lab.heard()) == MAX_RECORDS


def test_trouble_is_counted_and_told_once_a_second(lab: Lab) -> None:
    lab.reporter.trouble("one")
    lab.reporter.trouble("two")
    lab.loop.advance(TROUBLE_SECONDS * 0.9)
    lab.reporter.trouble("one")
    assert lab.heard() == []
    lab.loop.advance(TROUBLE_SECONDS * 0.1)
    assert lab.heard() == [Trouble({"one": 2, "two": 1})]
    lab.reporter.trouble("one")
    lab.loop.advance(TROUBLE_SECONDS)
    assert lab.heard() == [Trouble({"one": 1})]


def test_trouble_that_is_not_due_waits_when_something_else_is_told(lab: Lab) -> None:
    lab.reporter.trouble("one")
    lab.reporter.failure("prod/web", "", "why")
    lab.reporter.answer(Acknowledged(1))
    lab.reporter.record(connection(1))
    lab.loop.advance(RECORDS_SECONDS)
    assert lab.heard() == [Acknowledged(1), Connections([connection(1)])]
    lab.loop.advance(TROUBLE_SECONDS)
    assert lab.heard() == [Failures([Failure("prod/web", "", "why", 1)]), Trouble({"one": 1})]
    lab.reporter.trouble("two")
    lab.reporter.answer(Acknowledged(2))
    assert lab.heard() == [Acknowledged(2)], "the last second is over, but not this one"


def test_trouble_of_too_many_kinds_is_one_kind_more(lab: Lab) -> None:
    long = "\N{FIRE}" * MAX_TEXT * 2  # the most bytes that a text can have
    for number in range(MAX_TEXTS + 5):
        lab.reporter.trouble(f"{number:03}{long}", f"kind {number:03}{long}")
    lab.reporter.trouble(f"000{long}", f"kind 000{long}")
    lab.loop.advance(TROUBLE_SECONDS)
    counts: dict[str, int] = {}
    kinds: dict[str, str] = {}
    for message in lab.heard():
        assert not counts.keys() & message.counts.keys()
        counts |= message.counts
        kinds |= message.kinds
    expected = {f"{number:03}{long}"[:MAX_TEXT]: 1 for number in range(MAX_TEXTS)}
    expected[f"000{long}"[:MAX_TEXT]] = 2
    assert counts == {**expected, OTHER_TROUBLE: 5}
    assert kinds == {text: f"kind {text}"[:MAX_TEXT] for text in expected}


def test_trouble_at_endpoints_of_a_service_is_of_one_kind(lab: Lab) -> None:
    lab.reporter.endpoint_trouble("prod/web", "10.1.0.1:80", "Connection refused")
    lab.reporter.endpoint_trouble("prod/web", "10.1.0.2:80", "Connection refused")
    lab.reporter.trouble("accepting paused")
    lab.loop.advance(TROUBLE_SECONDS)
    one, two = (f"endpoint 10.1.0.{number}:80 of prod/web: Connection refused" for number in (1, 2))
    kind = "prod/web: Connection refused"
    assert lab.heard() == [Trouble({one: 1, two: 1, "accepting paused": 1}, {one: kind, two: kind})]
    lab.reporter.trouble(one)
    lab.loop.advance(TROUBLE_SECONDS)
    assert lab.heard() == [Trouble({one: 1})]


def test_workers_and_control_of_which_one_knows_no_kinds_of_trouble_understand_each_other() -> None:
    class Old(msgspec.Struct, frozen=True, tag="trouble"):
        counts: dict[str, int]

    encode = msgspec.msgpack.encode
    assert msgspec.msgpack.decode(encode(Old({"one": 2})), type=Trouble) == Trouble({"one": 2})
    assert msgspec.msgpack.decode(encode(Trouble({"one": 2}, {"one": "kind"})), type=Old) == Old({"one": 2})


def test_failures_are_counted_by_service_endpoint_and_reason(lab: Lab) -> None:
    for _ in range(3):
        lab.reporter.failure("prod/web", "10.1.0.1:80", "Connection refused")
    lab.reporter.failure("prod/web", "10.1.0.2:80", "Connection refused")
    lab.reporter.failure("prod/web", "", "w" * 1000)
    lab.loop.advance(TROUBLE_SECONDS)
    assert lab.heard() == [
        Failures([
            Failure("prod/web", "10.1.0.1:80", "Connection refused", 3),
            Failure("prod/web", "10.1.0.2:80", "Connection refused", 1),
            Failure("prod/web", "", "w" * MAX_TEXT, 1),
        ])
    ]  # fmt: skip
    lab.loop.advance(TROUBLE_SECONDS)
    assert lab.heard() == []
    lab.reporter.failure("prod/web", "10.1.0.1:80", "Connection refused")
    lab.loop.advance(TROUBLE_SECONDS)
    assert lab.heard() == [Failures([Failure("prod/web", "10.1.0.1:80", "Connection refused", 1)])]


def test_failures_of_too_many_kinds_are_counted_as_dropped(lab: Lab) -> None:
    for number in range(MAX_FAILURES + 5):
        lab.reporter.failure(SERVICE, ENDPOINT, f"{number:03}" + "w" * MAX_TEXT)
    lab.reporter.failure(SERVICE, ENDPOINT, "000" + "w" * MAX_TEXT)  # one that there is
    lab.loop.advance(TROUBLE_SECONDS)
    (message,) = lab.heard()
    assert [one.count for one in message.records] == [2] + [1] * (MAX_FAILURES - 1)
    assert message.dropped == 5
    lab.reporter.failure(SERVICE, ENDPOINT, "new")
    lab.loop.advance(TROUBLE_SECONDS)
    assert lab.heard() == [Failures([Failure(SERVICE, ENDPOINT, "new", 1)], 0)]


def test_what_waited_for_control_comes_complete_and_the_most_important_first(lab: Lab) -> None:
    waiting = lab.fill()
    lab.reporter.trouble("trouble")
    lab.reporter.failure("prod/web", "", "why")
    for number in range(MAX_RECORDS + 3):
        lab.reporter.record(connection(number))
    lab.reporter.drained(5)
    lab.reporter.answer(Acknowledged(1))
    lab.reporter.answer(Acknowledged(2))
    lab.loop.advance(TROUBLE_SECONDS)
    lab.reporter.record(connection(-1))
    lab.reporter.drained(6)
    lab.loop.advance(TROUBLE_SECONDS)
    heard = lab.heard()
    assert heard == [Ready(0)] * waiting, "nothing pushed its way in"
    lab.loop.turn(2)
    heard = lab.heard()
    assert heard[:3] == [Acknowledged(1), Acknowledged(2), Drained([5, 6])]
    assert [type(message) for message in heard[3:]] == [Connections] * 5 + [Failures, Trouble]
    records = [one for message in heard[3:8] for one in message.records]
    assert [one.bytes_in for one in records] == list(range(MAX_RECORDS))
    assert sum(message.dropped for message in heard[3:8]) == 4
    assert heard[-1] == Trouble({"trouble": 1})
    lab.loop.turn(3)
    assert lab.heard() == []


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (lambda reporter: reporter.answer(Acknowledged(1)), Acknowledged(1)),
        (lambda reporter: reporter.drained(1), Drained([1])),
        (lambda reporter: reporter.record(connection(1)), Connections([connection(1)])),
        (
            lambda reporter: reporter.failure("prod/web", "", "why"),
            Failures([Failure("prod/web", "", "why", 1)]),
        ),
        (lambda reporter: reporter.trouble("trouble"), Trouble({"trouble": 1})),
    ],
    ids=["answer", "drained", "record", "failure", "trouble"],
)
def test_nothing_is_lost_while_control_does_not_read(
    lab: Lab, report: Callable[[Reporter], None], expected: object
) -> None:
    lab.fill()
    report(lab.reporter)
    lab.loop.advance(TROUBLE_SECONDS)
    lab.heard()
    lab.loop.turn()
    assert lab.heard() == [expected]


def test_once_control_has_read_the_loop_is_left_alone(lab: Lab) -> None:
    """A writer that stays would wake it for ever."""
    lab.fill()
    lab.reporter.answer(Acknowledged(1))
    lab.heard()
    lab.loop.turn()
    assert lab.heard() == [Acknowledged(1)]
    assert not lab.loop.remove_writer(lab.worker.fileno())


def test_answers_that_nobody_reads_are_bounded(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_ANSWERS", 10)
    lab.reporter = Reporter(lab.loop, lab.worker)
    waiting = lab.fill()
    for number in range(25):
        lab.reporter.answer(Acknowledged(number))
    assert len(lab.heard()) == waiting
    lab.loop.turn()
    assert lab.heard() == [Acknowledged(number) for number in range(15, 25)], "the newest count"


def test_before_the_end_everything_is_told(lab: Lab) -> None:
    lab.reporter.drained(1)
    lab.reporter.record(connection(1))
    lab.reporter.failure("prod/web", "", "why")
    lab.reporter.trouble("trouble")
    lab.reporter.flush()
    assert lab.heard() == [
        Drained([1]),
        Connections([connection(1)]),
        Failures([Failure("prod/web", "", "why", 1)]),
        Trouble({"trouble": 1}),
    ]


def test_after_the_end_nothing_is_told_and_the_loop_is_left_alone(lab: Lab) -> None:
    waiting = lab.fill()
    lab.reporter.record(connection(1))
    lab.reporter.answer(Acknowledged(1))
    lab.reporter.stop()
    assert not lab.loop.remove_writer(lab.worker.fileno())
    assert len(lab.heard()) == waiting
    lab.reporter.trouble("trouble")
    lab.loop.advance(TROUBLE_SECONDS)
    lab.reporter.flush()
    assert lab.heard() == []


def test_when_control_is_gone_nothing_is_raised(lab: Lab) -> None:
    lab.control.close()
    lab.reporter.answer(Acknowledged(1))
    lab.reporter.record(connection(1))
    lab.reporter.trouble("trouble")
    lab.loop.advance(TROUBLE_SECONDS)
    lab.reporter.flush()
