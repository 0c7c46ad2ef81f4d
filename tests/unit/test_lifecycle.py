"""How a daemon comes to its end: orders to stop, a second one, drain, an upgrade, a failure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from proxyd.control.lifecycle import Lifecycle
from tests.support.manual_loop import ManualLoop


class Daemon:
    """A lifecycle, and what it was told to do."""

    def __init__(self, loop: ManualLoop) -> None:
        self.loop = loop
        self.begun: list[float] = []  # the drain seconds of each beginning end
        self.killed = 0
        self.lifecycle = loop.call(lambda: Lifecycle(self.begun.append, self._kill))

    def _kill(self) -> None:
        self.killed += 1

    def make_way(self, after: float) -> None:
        self.loop.call(lambda: self.lifecycle.make_way(after))


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with ManualLoop() as loop:
        yield Daemon(loop)


def test_it_starts_and_nothing_ends_it(daemon: Daemon) -> None:
    it = daemon.lifecycle
    assert (it.phase, it.stopping, it.making_way, it.fatal) == ("starting", False, False, "")


@pytest.mark.parametrize("phase", ["starting", "serving"])
def test_an_order_to_stop_begins_the_end(daemon: Daemon, phase: str) -> None:
    it = daemon.lifecycle
    it.phase = phase  # type: ignore[assignment]
    it.stop_after(25.0)
    assert it.stopping
    assert it.stop.is_set()
    assert it.phase == "draining"
    assert it.drain_seconds == 25.0
    assert daemon.begun == [25.0]
    assert (daemon.killed, it.fatal) == (0, "")


def test_a_second_order_ends_the_relays_at_once_and_changes_nothing_else(daemon: Daemon) -> None:
    it = daemon.lifecycle
    it.stop_after(25.0)
    it.stop_after(60.0)
    assert daemon.killed == 1
    assert daemon.begun == [25.0]
    assert it.drain_seconds == 25.0
    it.stop_after(0.0)
    assert daemon.killed == 2


def test_the_phase_is_draining_and_the_seconds_are_known_when_the_end_is_reported() -> None:
    seen = []
    with ManualLoop() as loop:
        it = loop.call(
            lambda: Lifecycle(lambda seconds: seen.append((seconds, it.drain_seconds)), lambda: None)
        )
        it.stop_after(3.0)
    assert seen == [(3.0, 3.0)]


def test_drain_stops_once_and_says_how_long_relays_have(daemon: Daemon) -> None:
    it = daemon.lifecycle
    assert it.drain(40.0) == 40.0
    assert it.phase == "draining"
    assert it.drain(5.0) == 40.0
    assert daemon.begun == [40.0]
    assert daemon.killed == 0


def test_an_upgrade_ends_serving_after_the_answer_and_without_a_drain(daemon: Daemon) -> None:
    it = daemon.lifecycle
    it.phase = "serving"
    daemon.make_way(0.05)
    assert it.making_way
    daemon.loop.advance(0.04)
    assert not it.stopping
    daemon.loop.advance(0.02)
    assert it.stopping
    assert it.making_way
    assert it.phase == "serving"
    assert daemon.begun == []


@pytest.mark.parametrize("begun", [False, True], ids=["before its time", "when serving is over"])
@pytest.mark.parametrize("order", ["stop", "drain"])
def test_an_order_to_stop_wins_over_an_upgrade(daemon: Daemon, order: str, *, begun: bool) -> None:
    it = daemon.lifecycle
    it.phase = "serving"
    daemon.make_way(0.05)
    if begun:
        daemon.loop.advance(0.1)
    if order == "stop":
        it.stop_after(25.0)
    else:
        assert it.drain(25.0) == 25.0
    assert not it.making_way
    assert it.stopping
    assert it.phase == "draining"
    assert daemon.begun == [25.0]
    assert daemon.killed == 0
    daemon.loop.advance(0.1)
    it.stop_after(25.0)
    assert daemon.killed == 1


def test_without_a_next_program_the_daemon_drains_and_fails(daemon: Daemon) -> None:
    it = daemon.lifecycle
    daemon.make_way(0.0)
    daemon.loop.advance(0.1)
    it.no_successor(25.0)
    assert "could not be executed" in it.fatal
    assert it.drain_seconds == 25.0
    assert daemon.begun == [25.0]
    assert it.stopping


def test_giving_up_stops_at_once_and_says_why(daemon: Daemon) -> None:
    it = daemon.lifecycle
    it.give_up("the port is taken")
    assert it.fatal == "the port is taken"
    assert (it.stopping, it.phase, daemon.begun) == (True, "draining", [0.0])


def test_a_task_that_fails_ends_the_daemon_with_its_error(daemon: Daemon) -> None:
    daemon.lifecycle.failed(ValueError("no such thing"))
    assert daemon.lifecycle.stopping
    assert "ValueError('no such thing')" in daemon.lifecycle.fatal


def test_a_failure_in_the_end_is_said_and_ends_what_drains(daemon: Daemon) -> None:
    daemon.lifecycle.stop_after(25.0)
    daemon.lifecycle.give_up("the port is taken")
    assert daemon.lifecycle.fatal == "the port is taken"
    assert daemon.killed == 1
