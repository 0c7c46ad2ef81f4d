"""The reconcile loop: when it reconciles, by a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from proxyd.api.meta import ObjectMeta, ObjectName
from proxyd.api.service import Service, ServicePort, ServiceSpec
from proxyd.control import loop as module
from proxyd.control.config.settings import Settings
from proxyd.control.lifecycle import Lifecycle
from proxyd.control.loop import ReconcileLoop
from proxyd.control.observe.telemetry import Telemetry
from proxyd.control.runtime.logs import Summariser, get_logger
from proxyd.state.desired import DesiredState
from proxyd.state.snapshot import NodeView, Options, Snapshot, VipMode
from tests.support.manual_loop import ManualLoop

WEB = ObjectName("prod", "web")


def snapshot(ip: str) -> Snapshot:
    """One Service with this clusterIP."""
    spec = ServiceSpec(cluster_ip=ip, ports=(ServicePort(port=80),))
    return Snapshot(services={WEB: Service(metadata=ObjectMeta(namespace="prod", name="web"), spec=spec)})


class RecordingReconciler:
    """Takes note of what is to be done, and does `meanwhile` each time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.when: list[float] = []
        self.states: list[DesiredState] = []
        self.observed: list[float] = []
        self.retry: float | None = None
        self.meanwhile: Callable[[], None] = lambda: None
        self.address_free = False
        self._clock = clock

    def reconcile(self, desired: DesiredState, *_: object) -> None:
        self.when.append(self._clock())
        self.states.append(desired)
        self.meanwhile()

    def next_retry(self) -> float | None:
        return self.retry

    def observe(self, _suspects: object = frozenset()) -> dict[str, str]:
        self.observed.append(self._clock())
        return {}

    def drained(self, *_: object) -> bool:
        return self.address_free

    def worker_died(self, *_: object) -> bool:
        return self.address_free


class Lab:
    """A reconcile loop over a reconciler that records."""

    def __init__(self, loop: ManualLoop, logged: list[Any], **settings: float) -> None:
        self.loop = loop
        self.logged = logged
        self.reconciler = RecordingReconciler(loop.time)
        self.done: list[DesiredState] = []
        self.resynced = 0
        # What the loop and its telemetry ask of the other parts.
        self.core: Any = SimpleNamespace(
            settings=Settings(**{"sync_period": 30.0, "config_sync_period": 900.0, **settings}),
            options=Options(vip_mode=VipMode(route=False)),
            lifecycle=loop.call(lambda: Lifecycle(lambda _: None, lambda: None)),
            reconciler=self.reconciler,
            supervisor=SimpleNamespace(workers={0: None}, acknowledged=lambda: 0, publish=lambda _: None),
            publication=SimpleNamespace(generation=0),
            feed=SimpleNamespace(synced=True, keep_clear=lambda _: None),
            node=NodeView(name="n"),
            snapshot=Snapshot(),
            turns=0,
        )
        summariser = Summariser(get_logger("test"), clock=loop.time)
        self.telemetry = Telemetry(self.core, summariser)
        self.reconcile_loop = loop.call(
            lambda: ReconcileLoop(
                self.core,
                self.telemetry,
                summariser,
                held={},
                reconciled=self.done.append,
                resynced=self._resynced,
            )
        )

    def _resynced(self) -> None:
        self.resynced += 1

    def start(self) -> asyncio.Task[None]:
        self.task = self.loop.create_task(self.reconcile_loop.run())
        self.settle()
        return self.task

    def settle(self) -> None:
        """Let everything happen that needs no time."""
        self.loop.turn(10)

    def advance(self, seconds: float) -> None:
        """Let time pass in steps of 1/16 s: sums of them are exact."""
        for _ in range(int(seconds * 16)):
            self.loop.now += 1 / 16
            self.settle()

    def change(self, ip: str) -> None:
        self.reconcile_loop.snapshot_changed(snapshot(ip))

    @property
    def count(self) -> int:
        """How many reconciles there were."""
        return len(self.reconciler.when)

    def ips(self) -> list[list[str]]:
        """The addresses that each reconcile was to open."""
        return [sorted(status.key.ip for status in state.unopened) for state in self.reconciler.states]

    def close(self) -> None:
        self.core.lifecycle.stop.set()
        self.settle()
        assert self.task.done()
        self.task.result()
        self.reconcile_loop.close()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Lab]]:
    with ManualLoop() as loop, capture_logs() as logged:
        loop.rule(monkeypatch, module)
        made = []

        def make(**settings: float) -> Lab:
            made.append(Lab(loop, logged, **settings))
            return made[-1]

        yield make
        for lab in made:
            lab.close()


@pytest.fixture
def lab(make: Callable[..., Lab]) -> Lab:
    return make()


# When


def test_nothing_is_done_before_every_source_has_delivered(lab: Lab) -> None:
    lab.core.feed.synced = False
    lab.start()
    lab.change("10.96.0.1")
    lab.advance(100)
    assert lab.count == 0
    assert lab.core.lifecycle.phase == "starting"
    assert not lab.reconcile_loop.settled
    lab.core.feed.synced = True
    lab.settle()
    assert lab.count == 0  # nobody has said so
    lab.change("10.96.0.2")
    lab.settle()
    assert lab.ips() == [["10.96.0.2"]]
    assert lab.core.lifecycle.phase == "serving"
    assert lab.reconcile_loop.settled


def test_a_stop_while_sources_are_waited_for_ends_it_without_a_reconcile(lab: Lab) -> None:
    lab.core.feed.synced = False
    task = lab.start()
    lab.core.lifecycle.stop.set()
    lab.settle()
    assert task.done()
    assert lab.count == 0
    assert lab.core.lifecycle.phase == "starting"


def test_each_change_is_carried_out_at_once_and_changes_that_come_together_in_one(lab: Lab) -> None:
    lab.start()
    assert lab.ips() == [[]]
    lab.change("10.96.0.1")
    assert lab.reconcile_loop.is_due()
    assert not lab.reconcile_loop.settled
    lab.settle()
    lab.change("10.96.0.2")
    lab.change("10.96.0.3")
    lab.settle()
    assert lab.ips() == [[], ["10.96.0.1"], ["10.96.0.3"]]
    assert not lab.reconcile_loop.is_due()
    assert lab.done == lab.reconciler.states
    lab.advance(29)
    assert lab.count == 3
    assert lab.core.turns == 3


def test_a_change_during_a_reconcile_leads_to_one_more(lab: Lab) -> None:
    lab.start()

    def change_twice() -> None:
        lab.reconciler.meanwhile = lambda: None
        lab.change("10.96.0.2")
        lab.change("10.96.0.3")

    lab.reconciler.meanwhile = change_twice
    lab.change("10.96.0.1")
    lab.settle()
    assert lab.ips() == [[], ["10.96.0.1"], ["10.96.0.3"]]
    assert not lab.reconcile_loop.is_due()


def test_a_failed_listener_is_tried_again_when_it_is_time(lab: Lab) -> None:
    began = lab.loop.now
    lab.reconciler.retry = began + 3.25
    lab.start()
    lab.reconciler.meanwhile = lambda: setattr(lab.reconciler, "retry", None)
    lab.advance(10)
    assert lab.reconciler.when == [began, began + 3.25]


@pytest.mark.parametrize("free", [False, True])
def test_an_address_that_may_be_free_is_a_reason_to_look(lab: Lab, *, free: bool) -> None:
    lab.start()
    lab.reconciler.address_free = free
    lab.reconcile_loop.drained(0, [1])
    lab.settle()
    assert lab.count == 1 + free
    lab.reconcile_loop.worker_died(0)
    lab.settle()
    assert lab.count == 1 + 2 * free


def test_other_settings_are_a_reason_to_look(lab: Lab) -> None:
    lab.start()
    lab.reconcile_loop.settings_changed()
    lab.settle()
    assert lab.count == 2


# What fails


def test_a_reconcile_that_raises_is_said_once_and_tried_again_after_a_second(lab: Lab) -> None:
    lab.start()
    began = lab.loop.now

    def fail() -> None:
        raise RuntimeError("a fault")

    lab.reconciler.meanwhile = fail
    lab.change("10.96.0.1")
    lab.settle()
    assert lab.count == 2
    assert not lab.reconcile_loop.settled
    assert len(lab.done) == 1
    lab.advance(5.5)
    assert lab.reconciler.when[1:] == [began + seconds for seconds in range(6)]
    (line,) = [line for line in lab.logged if line["log_level"] == "error"]
    assert line["event"].startswith("reconcile failed")
    assert "a fault" in line["error"]

    lab.reconciler.meanwhile = lambda: None
    lab.advance(1)
    assert lab.reconcile_loop.settled
    assert lab.ips()[-1] == ["10.96.0.1"]
    count = lab.count
    lab.advance(10)
    assert lab.count == count


# Periods


def test_the_node_is_looked_at_every_sync_period(make: Callable[..., Lab]) -> None:
    lab = make(sync_period=30.0)
    began = lab.loop.now
    lab.start()
    lab.advance(20)
    lab.change("10.96.0.1")  # does not put the look off
    lab.settle()
    lab.advance(75)
    assert lab.reconciler.observed == [began + 30, began + 60, began + 90]
    assert lab.resynced == 3
    # Each look is followed by a reconcile.
    assert lab.reconciler.when == [began + seconds for seconds in (0, 20, 30, 60, 90)]


def test_everything_is_planned_anew_every_config_sync_period(make: Callable[..., Lab]) -> None:
    lab = make(sync_period=1000.0, config_sync_period=20.0)
    lab.change("10.96.0.1")
    lab.start()
    lab.reconcile_loop.look_again()
    lab.settle()
    first, second = lab.reconciler.states
    assert first is second  # as nothing has changed
    lab.advance(20.5)
    third = lab.reconciler.states[2]
    assert third == first
    assert third is not first
    lab.advance(10)
    assert lab.count == 3
    lab.advance(10.5)
    assert lab.count == 4
    assert lab.reconciler.observed == []


def test_changes_are_carried_out_at_most_every_min_sync_period(make: Callable[..., Lab]) -> None:
    lab = make(min_sync_period=2.0)
    began = lab.loop.now
    lab.start()
    for number in range(1, 11):
        lab.change(f"10.96.0.{number}")
        lab.advance(0.5)
    assert lab.reconciler.when == [began, began + 2, began + 4]
    assert lab.ips() == [[], ["10.96.0.4"], ["10.96.0.8"]]
    lab.advance(2)
    assert lab.ips()[-1] == ["10.96.0.10"]
    lab.advance(5)
    lab.change("10.96.0.11")
    lab.settle()
    assert lab.ips()[-1] == ["10.96.0.11"]  # after a pause at once


def test_a_stop_does_not_wait_for_the_min_sync_period(make: Callable[..., Lab]) -> None:
    lab = make(min_sync_period=60.0)
    task = lab.start()
    lab.change("10.96.0.1")
    lab.settle()
    lab.core.lifecycle.stop.set()
    lab.settle()
    assert task.done()
    assert lab.count == 1
