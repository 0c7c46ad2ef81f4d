"""Events of real descriptors, dispatched by an event loop that the test turns."""

from __future__ import annotations

import itertools
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from proxyd.relay.engine import poller as module
from proxyd.relay.engine.poller import EDGES, IN, OUT, RDHUP, Handler, Poller, events_now
from tests.support.manual_loop import ManualLoop


class Lab(NamedTuple):
    """A poller, and what it reported."""

    loop: ManualLoop
    poller: Poller
    errors: list[tuple[Handler, Exception]]
    opened: list[socket.socket]

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """Two connected sockets; the first is for the poller."""
        ours, theirs = socket.socketpair()
        for one in (ours, theirs):
            one.setblocking(False)
        self.opened.extend((ours, theirs))
        return ours, theirs

    def watched(self, handler: Handler, events: int = IN) -> tuple[socket.socket, socket.socket]:
        """The same, the first is watched."""
        ours, theirs = self.pair()
        self.poller.add(ours.fileno(), handler, events)
        return ours, theirs


def running(*, alone: bool) -> Iterator[Lab]:
    with ManualLoop() as loop:
        errors: list[tuple[Handler, Exception]] = []
        poller = Poller(loop, lambda handler, error: errors.append((handler, error)), alone=alone)
        lab = Lab(loop, poller, errors, [])
        try:
            yield lab
        finally:
            for one in lab.opened:
                one.close()
            poller.shut()
        assert not errors


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Within control: nothing is lingered for."""
    yield from running(alone=False)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """In a process of its own. The clock stands still, so that no turn is ever over for its length."""
    for lab in running(alone=True):
        lab.loop.rule(monkeypatch, module)
        yield lab


# -- a batch --------------------------------------------------------------------------------------------------------------


def test_each_handler_gets_the_events_of_its_own_descriptor(lab: Lab) -> None:
    got: list[tuple[str, int]] = []
    _, one = lab.watched(lambda events: got.append(("one", events)), EDGES)
    _, two = lab.watched(lambda events: got.append(("two", events)), EDGES)
    lab.loop.turn()
    assert sorted(got) == [("one", OUT), ("two", OUT)]
    got.clear()
    one.send(b"x")
    lab.loop.turn(3)
    assert got == [("one", IN | OUT)], "an edge is reported once"
    got.clear()
    two.shutdown(socket.SHUT_WR)
    lab.loop.turn(3)
    assert got == [("two", IN | OUT | RDHUP)]


def test_a_number_used_again_does_not_get_the_event_of_the_socket_before(lab: Lab) -> None:
    """All sockets are ready at once. The first one's handler closes the others and opens as many."""
    called: list[str] = []
    old: list[socket.socket] = []
    new: list[socket.socket] = []
    handlers_of_new: list[Handler] = []

    def take_over(_events: int) -> None:
        if called:
            called.append("old")
            return
        called.append("first")
        for sock in old[1:]:
            lab.poller.close(sock)
        for _ in old[1:]:
            sock, _ = lab.watched(lambda _events: called.append("new"))
            new.append(sock)
            handlers_of_new.append(lab.poller.handlers[sock.fileno()])

    others: list[socket.socket] = []
    for _ in range(8):
        ours, theirs = lab.watched(take_over)
        old.append(ours)
        others.append(theirs)
    for sock in others:
        sock.send(b"x")
    numbers = {sock.fileno() for sock in old[1:]}
    lab.loop.turn()
    assert called == ["first"], "nobody else has an event of this batch"
    assert [sock.fileno() for sock in old[1:]] == [-1] * 7, "but at its end they are closed"
    assert not numbers & lab.poller.handlers.keys()
    lab.loop.turn()
    assert called == ["first", "old"], "the first was not read, and is ready still; the new ones are not"
    # Now the numbers are free: who gets one has its events, and no other's.
    ours, theirs = lab.watched(lambda _events: called.append("newest"))
    assert ours.fileno() in numbers
    lab.poller.modify(old[0].fileno(), 0)
    lab.loop.turn()
    theirs.send(b"x")
    lab.loop.turn()
    assert called == ["first", "old", "newest"]
    assert [lab.poller.handlers[sock.fileno()] for sock in new] == handlers_of_new


def test_a_socket_is_closed_at_the_end_of_the_batch_and_at_once_between_batches(lab: Lab) -> None:
    inside: list[int] = []

    def close(_events: int) -> None:
        lab.poller.close(ours)
        lab.poller.close(ours)  # as when both sides of a relay find out
        inside.append(ours.fileno())

    ours, theirs = lab.watched(close)
    number = ours.fileno()
    theirs.send(b"x")
    lab.loop.turn()
    assert inside == [number]
    assert ours.fileno() == -1
    ours, theirs = lab.watched(inside.append, EDGES)
    lab.loop.turn()  # a batch in which nothing is closed
    lab.poller.close(ours)
    assert ours.fileno() == -1
    assert not lab.poller.handlers


def test_nothing_is_kept_of_a_socket_that_was_closed(lab: Lab) -> None:
    def close(_events: int) -> None:
        lab.poller.close(socks.pop())

    ours, theirs = socket.socketpair()
    socks = [ours]
    lab.poller.add(ours.fileno(), close)
    gone = weakref.ref(ours)
    del ours
    with theirs:
        lab.loop.turn()
    assert gone() is None


def test_a_socket_that_others_hold_too_is_heard_of_no_more(lab: Lab) -> None:
    """As a listener's, which control and every worker have: epoll forgets a descriptor with its last duplicate only."""
    called: list[int] = []
    ours, theirs = lab.watched(called.append)
    with ours.dup():
        lab.poller.close_shared(ours)
        lab.poller.close_shared(ours)  # it may be told twice
        theirs.send(b"x")
        lab.loop.turn(2)
    assert not called


def test_a_handler_can_be_replaced(lab: Lab) -> None:
    got: list[str] = []
    ours, theirs = lab.watched(lambda _events: got.append("before"))
    lab.poller.handlers[ours.fileno()] = lambda _events: got.append("after")
    theirs.send(b"x")
    lab.loop.turn()
    assert got == ["after"]


def test_a_descriptor_can_be_muted(lab: Lab) -> None:
    got: list[int] = []
    ours, theirs = lab.watched(got.append)
    theirs.send(b"x")
    lab.poller.modify(ours.fileno(), 0)
    lab.loop.turn(2)
    assert not got
    lab.poller.modify(ours.fileno(), IN)
    lab.loop.turn(2)
    assert got == [IN, IN]


def test_a_descriptor_that_cant_be_watched_leaves_no_handler(lab: Lab, tmp_path: object) -> None:
    regular = os.open(f"{tmp_path}/file", os.O_CREAT | os.O_RDONLY)
    try:
        with pytest.raises(PermissionError):  # epoll has no regular files
            lab.poller.add(regular, lambda _events: None)
    finally:
        os.close(regular)
    assert not lab.poller.handlers


def test_a_handler_learns_whether_its_event_is_the_only_one(lab: Lab) -> None:
    lone: list[bool] = []
    pairs = [lab.watched(lambda _events: lone.append(lab.poller.lone)) for _ in range(2)]
    pairs[0][1].send(b"x")
    lab.loop.turn()
    pairs[1][1].send(b"x")
    lab.loop.turn()
    assert lone == [True, False, False]


def test_what_is_for_the_end_of_the_batch_runs_there_once_and_before_sockets_are_closed(lab: Lab) -> None:
    order: list[object] = []

    def ready(_events: int) -> None:
        order.append("handler")
        lab.poller.at_end(lambda: order.append(("end", ours.fileno() >= 0)))
        lab.poller.close(ours)

    ours, theirs = lab.watched(ready)
    _, other = lab.watched(lambda _events: order.append("other"), EDGES)
    lab.loop.turn()
    order.clear()
    theirs.send(b"x")
    other.send(b"x")
    lab.loop.turn(2)
    assert order[-1] == ("end", True)
    assert sorted(order[:-1], key=str) == ["handler", "other"]
    order.clear()
    _, theirs = lab.watched(lambda _events: lab.poller.at_end(lambda: order.append("end")), EDGES)
    lab.loop.turn(2)
    assert order == ["end"], "also where nothing is closed"
    lab.poller.at_end(lambda: order.append("soon"))
    assert order == ["end"]
    lab.loop.turn(2)
    assert order == ["end", "soon"], "where there is no batch"


# -- errors ---------------------------------------------------------------------------------------------------------------


def test_an_error_in_one_handler_is_reported_and_all_others_run(lab: Lab) -> None:
    ran: list[str] = []

    def fails(_events: int) -> None:
        ran.append("fails")
        raise ValueError("of its own")

    def works(_events: int) -> None:
        ran.append("works")

    pairs = [lab.watched(handler) for handler in (fails, works, fails, works, works)]
    for _, theirs in pairs:
        theirs.send(b"x")
    lab.loop.turn()
    assert sorted(ran) == ["fails", "fails", "works", "works", "works"]
    assert [(handler, str(error)) for handler, error in lab.errors] == [(fails, "of its own")] * 2
    lab.errors.clear()


def test_an_error_does_not_keep_sockets_of_the_batch_open(lab: Lab) -> None:
    def fails(_events: int) -> None:
        lab.poller.close(ours)
        raise ValueError("after it was closed")

    ours, theirs = lab.watched(fails)
    theirs.send(b"x")
    lab.loop.turn()
    assert ours.fileno() == -1
    assert len(lab.errors) == 1
    lab.errors.clear()


def test_an_error_in_a_further_turn_is_reported_and_others_have_theirs(lab: Lab) -> None:
    ran: list[str] = []

    def fails(_events: int) -> None:
        raise KeyError("again")

    def fails_too(_events: int) -> None:
        raise KeyError("again")

    for handler in (fails, lambda _events: ran.append("a"), fails_too, lambda _events: ran.append("b")):
        lab.poller.again(handler)
    lab.loop.turn()
    assert ran == ["a", "b"]
    assert [handler for handler, _ in lab.errors] == [fails, fails_too]
    lab.errors.clear()


# -- again ----------------------------------------------------------------------------------------------------------------


def test_who_asks_again_and_again_lets_everybody_else_have_a_turn(lab: Lab) -> None:
    order: list[str] = []

    def greedy(events: int) -> None:
        assert not order or events == IN | OUT
        order.append("greedy")
        lab.poller.again(greedy)

    _, one = lab.watched(greedy, select.EPOLLIN | select.EPOLLET)
    others = [lab.watched(lambda _events, name=name: order.append(name)) for name in ("a", "b")]
    one.send(b"x")
    lab.loop.turn()
    assert order == ["greedy"], "not twice in one turn"
    for _, theirs in others:
        theirs.send(b"x")
    timer: list[bool] = []
    lab.loop.call_later(0.0, timer.append, True)
    lab.loop.turn(3)
    assert timer
    assert [sorted(order[first : first + 3]) for first in range(1, 10, 3)] == [["a", "b", "greedy"]] * 3


def test_who_gets_edges_while_it_waits_for_its_turn_has_one_turn_all_the_same(lab: Lab) -> None:
    """Under constant traffic each batch finds an edge, and each time there is more to do than a turn allows."""

    class Busy:
        calls = 0

        def ready(self, _events: int) -> None:
            self.calls += 1
            theirs.send(b"x")
            lab.poller.again(self.ready)  # a new bound method each time, as the sides of a relay ask

    busy = Busy()
    _, theirs = lab.watched(busy.ready, select.EPOLLIN | select.EPOLLET)
    theirs.send(b"x")
    calls = []
    for _ in range(10):
        lab.loop.turn()
        calls.append(busy.calls)
    grown = [after - before for before, after in itertools.pairwise(calls)]
    assert max(grown) <= 2, f"one for the edge and one for its turn: {grown}"


def test_a_socket_closed_in_a_further_turn_is_closed_at_its_end(lab: Lab) -> None:
    seen: list[int] = []
    ours, _ = lab.pair()

    def close(_events: int) -> None:
        lab.poller.close(ours)
        seen.append(ours.fileno())

    lab.poller.again(close)
    lab.poller.again(lambda _events: seen.append(ours.fileno()))
    number = ours.fileno()
    lab.loop.turn()
    assert seen == [number, number]
    assert ours.fileno() == -1


# -- lingering ------------------------------------------------------------------------------------------------------------


def a_batch(lab: Lab) -> None:
    """Only soon after one the next is waited for."""
    ours, theirs = lab.watched(lambda _events: lab.poller.modify(ours.fileno(), 0))
    theirs.send(b"x")
    lab.loop.turn()


def chain(lab: Lab, length: int, last: Handler = lambda _events: None) -> list[int]:
    """Sockets, each of which is written to when the one before is ready; the first is ready. Returns who was when."""
    reached: list[int] = []
    sends: list[socket.socket] = []

    def link(number: int) -> Handler:
        def ready(events: int) -> None:
            reached.append(number)
            if number + 1 < length:
                sends[number + 1].send(b"x")
            else:
                last(events)

        return ready

    for number in range(length):
        _, theirs = lab.watched(link(number), IN | select.EPOLLET)
        sends.append(theirs)
    sends[0].send(b"x")
    return reached


def test_events_that_come_in_a_row_are_dispatched_in_one_turn(alone: Lab) -> None:
    a_batch(alone)
    reached = chain(alone, 5)
    alone.loop.turn()
    assert reached == [0, 1, 2, 3, 4]


def test_within_control_the_loop_has_its_turn_after_each_batch(lab: Lab) -> None:
    reached = chain(lab, 3)
    for turns in (1, 2, 3):
        lab.loop.turn()
        assert len(reached) == turns


def test_after_a_quiet_time_nothing_is_waited_for(alone: Lab) -> None:
    a_batch(alone)
    reached = chain(alone, 5)
    alone.loop.now += module._LINGER_SECONDS * 2
    alone.loop.turn()
    assert reached == [0]
    alone.loop.turn()  # but that was a moment ago
    assert reached == [0, 1, 2, 3, 4]


def test_the_loop_has_its_turn_in_time_whatever_comes(alone: Lab) -> None:
    def time_flies(_events: int) -> None:
        reached.append(True)
        alone.loop.now += module._TURN_SECONDS / 3
        theirs.send(b"x")

    a_batch(alone)
    reached: list[bool] = []
    _, theirs = alone.watched(time_flies, IN | select.EPOLLET)
    theirs.send(b"x")
    alone.loop.turn()
    assert 3 <= len(reached) <= 4
    alone.loop.turn()
    assert 6 <= len(reached) <= 8


def test_who_asked_for_another_turn_does_not_wait_for_the_events_of_others(alone: Lab) -> None:
    order: list[str] = []

    def asks(_events: int) -> None:
        order.append("asks")
        alone.poller.again(lambda _events: order.append("again"))
        theirs.send(b"x")

    a_batch(alone)
    _, first = alone.watched(asks, IN | select.EPOLLET)
    _, theirs = alone.watched(lambda _events: order.append("other"), IN | select.EPOLLET)
    first.send(b"x")
    alone.loop.turn()
    assert order == ["asks"]
    alone.loop.turn()
    assert sorted(order[1:]) == ["again", "other"]


def test_whose_other_turn_is_due_anyway_is_not_kept_waiting(alone: Lab) -> None:
    a_batch(alone)
    order: list[str] = []
    alone.loop.call_soon(alone.poller.again, lambda _events: order.append(f"again, {len(reached)} reached"))
    reached = chain(alone, 5)
    alone.loop.turn()
    assert reached == [0]
    alone.loop.turn()
    assert order == ["again, 1 reached"]


def test_what_comes_a_moment_later_is_waited_for(alone: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def ready(_events: int) -> None:
        order.append("ready")
        if len(order) == 1:
            later.start()
        else:
            alone.poller.again(lambda _events: None)  # enough

    def write_later() -> None:
        time.sleep(0.02)
        order.append("written")
        theirs.send(b"x")

    a_batch(alone)
    monkeypatch.setattr(module, "_LINGER_SECONDS", 30.0)
    order: list[str] = []
    later = threading.Thread(target=write_later)
    _, theirs = alone.watched(ready, IN | select.EPOLLET)
    theirs.send(b"x")
    alone.loop.turn()
    assert order == ["ready", "written", "ready"]
    later.join()


def test_what_is_to_be_given_way_to_ends_the_wait(alone: Lab) -> None:
    """As control's messages, which the loop reads: they are not read here, and are seen by the loop at once."""
    heard: list[bytes] = []
    ours, theirs = alone.pair()
    alone.loop.add_reader(ours.fileno(), lambda: heard.append(ours.recv(10)))
    alone.poller.give_way_to(ours.fileno())
    a_batch(alone)
    reached = chain(alone, 3, lambda _events: theirs.send(b"news"))
    further, further_theirs = alone.pair()
    alone.poller.add(further.fileno(), lambda _events: further_theirs.send(b"x"), IN)  # never quiet
    further_theirs.send(b"x")
    alone.loop.turn()
    assert reached == [0, 1, 2]
    alone.poller.modify(further.fileno(), 0)
    alone.loop.turn()
    assert heard == [b"news"]
    alone.loop.remove_reader(ours.fileno())


def test_within_control_there_is_nothing_to_give_way_to(lab: Lab) -> None:
    ours, theirs = lab.pair()
    lab.poller.give_way_to(ours.fileno())
    theirs.send(b"x")
    lab.loop.turn(2)
    assert lab.poller.turns == 0
    lab.watched(lambda _events: None, EDGES)
    lab.loop.turn(2)
    assert lab.poller.turns == 1


# -- the end --------------------------------------------------------------------------------------------------------------


def test_after_the_end_nothing_is_dispatched() -> None:
    called: list[int] = []
    with ManualLoop() as loop, socket.socket() as sock:
        poller = Poller(loop, lambda *_: called.append(-1))
        watched = poller._epoll.fileno()
        poller.add(sock.fileno(), called.append)
        poller.again(called.append)
        poller.shut()
        loop.turn(3)
        assert not loop.remove_reader(watched), "who gets its number may have the loop watch it"
    assert not called


def test_events_of_this_moment() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert events_now(ours.fileno()) == OUT
        theirs.send(b"x")
        assert events_now(ours.fileno()) == IN | OUT
        theirs.close()
        assert events_now(ours.fileno()) & (IN | RDHUP) == IN | RDHUP
    with socket.socket() as unconnected:
        unconnected.setblocking(False)
        listening = socket.create_server(("127.0.0.1", 0), backlog=1)
        with listening:
            unconnected.connect_ex(listening.getsockname())
            select.select([], [unconnected], [], 10)
            assert events_now(unconnected.fileno()) == OUT
