"""The timers of a worker, and what becomes of an error in one relay, by a clock that the test moves."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import socket
from collections.abc import Iterator

import pytest

from proxyd.relay.engine.plane import (
    DIAL_SCAN_SECONDS,
    PAUSE_SECONDS,
    PENDING_LIMIT,
    READ_BYTES,
    TICK_SECONDS,
    TIGHT_READ_BYTES,
    Plane,
)
from proxyd.relay.engine.poller import IN
from proxyd.relay.engine.reporter import TROUBLE_SECONDS, Reporter
from proxyd.relay.ipc.channel import Channel
from proxyd.relay.ipc.messages import Trouble
from proxyd.relay.ipc.options import Options
from proxyd.relay.ipc.slots import Slots
from tests.support.manual_loop import ManualLoop


class Relay:
    """Keeps what it is told, and fails where it is to."""

    def __init__(self, plane: Plane, *, fails: bool = False) -> None:
        self.plane = plane
        self.fails = fails
        self.due: list[float] = []
        self.ticks: list[float] = []
        self.crashes = 0

    def dial_due(self, now: float) -> None:
        del self.plane.dialling[self]
        self.due.append(now)
        self.fail()

    def tick(self, now: float) -> None:
        self.ticks.append(now)
        self.fail()

    def ready(self, _events: int) -> None:
        self.fail()

    def crash(self) -> None:
        self.crashes += 1
        self.plane.closed(self)
        self.fail()

    def fail(self) -> None:
        if self.fails:
            raise ValueError("of its own")


class Lab:
    def __init__(self, resources: contextlib.ExitStack, **options: int) -> None:
        self.loop = loop = resources.enter_context(ManualLoop())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control, channel = Channel(ours), Channel(theirs)
        slots = Slots.create()
        self.reporter = Reporter(loop, channel)
        self.plane = Plane(loop, self.reporter, slots, 0, Options(**options), now=loop.time)
        for undo in (slots.close, self.control.close, channel.close, self.reporter.stop, self.shut):
            resources.callback(undo)
        self._shut = False

    def relay(self, *, fails: bool = False) -> Relay:
        relay = Relay(self.plane, fails=fails)
        self.plane.opened(relay)
        return relay

    def shut(self) -> None:
        if not self._shut:
            self._shut = True
            self.plane.shut()

    def trouble(self) -> dict[str, int]:
        """What was reported, with how often."""
        self.loop.advance(TROUBLE_SECONDS)
        found: dict[str, int] = {}
        while received := self.control.receive():
            if isinstance(received[0], Trouble):
                found |= received[0].counts
        return found

    def idle(self) -> bool:
        """Whether no timer runs."""
        return not any(not handle.cancelled() for handle in self.loop._scheduled)


@pytest.fixture
def resources() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as resources:
        yield resources


@pytest.fixture
def lab(resources: contextlib.ExitStack) -> Lab:
    return Lab(resources)


def test_relays_tick_once_a_second_while_there_are_any(lab: Lab) -> None:
    assert lab.idle()
    first = lab.relay()
    begun = lab.loop.now
    lab.loop.advance(TICK_SECONDS / 2)
    second = lab.relay()
    for _ in range(2):
        lab.loop.advance(TICK_SECONDS / 2)
        lab.loop.advance(TICK_SECONDS / 2)
    assert first.ticks == second.ticks == [begun + TICK_SECONDS, begun + 2 * TICK_SECONDS]
    lab.plane.closed(first)
    lab.plane.closed(second)
    lab.loop.advance(TICK_SECONDS)
    assert len(first.ticks) == 2
    assert lab.idle(), "without relays there is nothing to do"
    third = lab.relay()
    lab.loop.advance(TICK_SECONDS)
    assert len(third.ticks) == 1


def test_a_dial_is_given_up_at_about_its_time(lab: Lab) -> None:
    slow, slower, answered = lab.relay(), lab.relay(), lab.relay()
    lab.plane.dial_until(slow, lab.loop.now + 0.25)
    lab.plane.dial_until(slower, lab.loop.now + 0.5)
    lab.plane.dial_until(answered, lab.loop.now + 0.25)
    del lab.plane.dialling[answered]
    begun = lab.loop.now
    for _ in range(30):
        lab.loop.advance(DIAL_SCAN_SECONDS)
    assert slow.due == pytest.approx([begun + 0.25], abs=DIAL_SCAN_SECONDS)
    assert slower.due == pytest.approx([begun + 0.5], abs=DIAL_SCAN_SECONDS)
    assert slow.due[0] >= begun + 0.25
    assert not answered.due
    for relay in (slow, slower, answered):
        lab.plane.closed(relay)
    lab.loop.advance(TICK_SECONDS)
    assert lab.idle(), "nobody dials"


def test_a_relay_may_dial_again_when_its_time_is_over(lab: Lab) -> None:
    class Stubborn(Relay):
        def dial_due(self, now: float) -> None:
            super().dial_due(now)
            self.plane.dial_until(self, now + 0.25)

    relay = Stubborn(lab.plane)
    lab.plane.opened(relay)
    lab.plane.dial_until(relay, lab.loop.now + 0.25)
    for _ in range(80):
        lab.loop.advance(DIAL_SCAN_SECONDS)
    assert 6 <= len(relay.due) <= 8


@pytest.mark.parametrize("timer", ["tick", "scan"])
def test_an_error_in_one_relay_is_reported_and_ends_that_one_alone(lab: Lab, timer: str) -> None:
    relays = [lab.relay(fails=number == 1) for number in range(3)]
    for relay in relays:
        if timer == "scan":
            lab.plane.dial_until(relay, lab.loop.now)
    lab.loop.advance(DIAL_SCAN_SECONDS if timer == "scan" else TICK_SECONDS)
    assert [len(relay.due if timer == "scan" else relay.ticks) for relay in relays] == [1, 1, 1]
    assert [relay.crashes for relay in relays] == [0, 1, 0]
    texts = lab.trouble()
    assert any(
        text.startswith("internal error at test_plane.py:") and text.endswith("ValueError: of its own")
        for text in texts
    )
    assert "internal error while ending a relay: ValueError: of its own" in texts
    assert relays[1] not in lab.plane.relays
    for relay in relays:
        lab.plane.closed(relay)


def test_an_error_in_a_handler_ends_the_relay_that_it_belongs_to(lab: Lab) -> None:
    relay = lab.relay(fails=True)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        lab.plane.poller.add(ours.fileno(), relay.ready, IN)
        theirs.send(b"x")
        lab.loop.turn()
        assert relay.crashes == 1
        lab.plane.poller.handlers[ours.fileno()] = lambda _events: relay.fail()  # nobody's
        lab.loop.turn()
        assert relay.crashes == 1
    assert sorted(lab.trouble().values()) == [1, 2], "of the handlers, and of its crash"


def test_the_last_relay_is_told_of(lab: Lab) -> None:
    emptied: list[bool] = []
    first, second = lab.relay(), lab.relay()
    lab.plane.on_empty = lambda: emptied.append(True)
    lab.plane.closed(first)
    assert not emptied
    lab.plane.closed(second)
    assert emptied == [True]


def test_a_pause_is_over_after_a_moment_and_begins_anew_with_the_next_trouble(lab: Lab) -> None:
    class Listener:
        resumed = 0

        def resume(self) -> None:
            self.resumed += 1

    first, second = Listener(), Listener()
    lab.plane.pause("one")
    lab.plane.rest(first)
    lab.loop.advance(PAUSE_SECONDS * 0.9)
    lab.plane.pause("two")
    lab.plane.rest(second)
    assert (first.resumed, lab.plane.accepting_paused) == (0, True)
    lab.loop.advance(PAUSE_SECONDS * 0.1)
    assert (first.resumed, second.resumed, lab.plane.accepting_paused) == (1, 1, False)
    lab.plane.pause("one")
    lab.loop.advance(PAUSE_SECONDS * 0.95)
    assert lab.plane.accepting_paused, "for its whole time"
    lab.loop.advance(PAUSE_SECONDS * 0.05)
    assert (first.resumed, lab.plane.accepting_paused) == (1, False)
    assert lab.trouble() == {"one": 2, "two": 1}


def test_there_is_room_for_relays_and_flows_up_to_the_limit(resources: contextlib.ExitStack) -> None:
    lab = Lab(resources, max_relays=10)
    plane = lab.plane
    assert plane.share() == 9
    relays = [lab.relay() for _ in range(8)]
    assert plane.may_accept()
    plane.flows = 4  # of one descriptor each, half of a relay's
    assert not plane.may_accept()
    assert plane.accepting_paused
    plane.flows = 3
    assert plane.may_accept()
    for relay in relays:
        plane.closed(relay)


def test_the_limit_is_what_descriptors_allow_beside_those_that_are_open(lab: Lab) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()  # nothing of an earlier test is closed meanwhile
    lab.plane.measure_descriptors()
    before = lab.plane.max_relays
    assert 0 < before < soft // 2
    opened = [os.dup(0) for _ in range(20)]
    lab.plane.measure_descriptors()
    assert lab.plane.max_relays == before - 10
    for fd in opened:
        os.close(fd)
    relay = lab.relay()  # which has none in truth: its two are not counted against it
    lab.plane.measure_descriptors()
    assert lab.plane.max_relays == before + 1
    lab.plane.closed(relay)


def test_reads_are_tight_while_much_is_kept_and_not_again_before_half_of_it_is_gone(lab: Lab) -> None:
    plane = lab.plane
    assert len(plane.view) == READ_BYTES
    plane.keep(PENDING_LIMIT)
    assert len(plane.view) == READ_BYTES
    plane.keep(1)
    assert len(plane.view) == TIGHT_READ_BYTES
    assert plane.take_pipe() is None, "a pipe would keep far more"
    plane.keep(-PENDING_LIMIT // 2)
    assert len(plane.view) == TIGHT_READ_BYTES
    plane.keep(-2)
    assert len(plane.view) == READ_BYTES


def test_at_the_end_every_timer_stops(resources: contextlib.ExitStack) -> None:
    class Extension:
        shut_down = False

        def shut(self) -> None:
            self.shut_down = True

        def __iter__(self) -> Iterator[object]:
            return iter(())

    lab = Lab(resources)
    extension = lab.plane.extensions["X"] = Extension()
    relay = lab.relay()
    lab.plane.dial_until(relay, lab.loop.now)
    lab.plane.pause("one")
    lab.shut()
    lab.loop.advance(10 * TICK_SECONDS)
    assert not relay.due
    assert not relay.ticks
    assert lab.plane.accepting_paused
    assert extension.shut_down
