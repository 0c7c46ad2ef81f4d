"""What the service manager is told, and when it is fed. The daemon's parts say what a test has them say."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from proxyd.api.meta import ObjectName
from proxyd.api.problems import Severity
from proxyd.api.service import Protocol, TrafficPolicy
from proxyd.control.config.settings import Settings
from proxyd.control.core import Core
from proxyd.control.feeds.facts import SourceFacts
from proxyd.control.lifecycle import Lifecycle
from proxyd.control.observe import watchdog as module
from proxyd.control.observe.systemd import Notifier
from proxyd.control.observe.watchdog import TICK_SECONDS, Watchdog
from proxyd.state.desired import DesiredState
from proxyd.state.snapshot import NodeView, Options, Snapshot
from proxyd.state.spec import (
    BalancerKey,
    HostState,
    ListenerKey,
    ListenerSpec,
    ListenerState,
    Role,
    ServicePortName,
    status_of,
)
from tests.support.manual_loop import ManualLoop
from tests.support.service_manager import Manager

WATCHDOG = 30.0  # seconds, as of the unit


def spec(number: int) -> ListenerSpec:
    name = ServicePortName("prod", f"web-{number}", "", Protocol.TCP)
    return ListenerSpec(
        key=ListenerKey(f"10.96.0.{number}", 80, Protocol.TCP),
        balancer=BalancerKey(name, TrafficPolicy.CLUSTER, 4),
        role=Role.CLUSTER_IP,
    )


class Workers:
    """A supervisor, or the workers of earlier programs, as far as a watchdog asks."""

    def __init__(self) -> None:
        self.wrong = ""
        self.fault: Exception | None = None
        self.probes = 0

    def probe(self) -> str:
        self.probes += 1
        if self.fault:
            raise self.fault
        return self.wrong


class Lab:
    """A watchdog between a daemon and a service manager."""

    def __init__(self, loop: ManualLoop, manager: Manager, watchdog_seconds: float = WATCHDOG) -> None:
        self.loop = loop
        self.manager = manager
        self.workers, self.old_workers = Workers(), Workers()
        self.lifecycle = loop.call(lambda: Lifecycle(lambda _: None, lambda: None))
        self.reconciler = SimpleNamespace(desired=DesiredState(), failures={})
        self.feed = SimpleNamespace(facts=(), manifest_problems=())
        parts: Any = {
            "lifecycle": self.lifecycle,
            "reconciler": self.reconciler,
            "supervisor": self.workers,
            "old_workers": self.old_workers,
            "publication": None,
            "access": None,
        }
        self.core = Core(settings=Settings(), options=Options(), node=NodeView(), **parts)
        self.core.feed = self.feed  # type: ignore[assignment]
        self.due = False
        self._heard = 0
        self.watchdog = loop.call(
            lambda: Watchdog(self.core, Notifier(manager.path, watchdog_seconds), lambda: self.due)
        )
        self.watchdog.start()

    def serve(self) -> None:
        """Everything is in force."""
        self.lifecycle.phase = "serving"
        self.watchdog.in_force()
        self.heard()

    def heard(self) -> list[dict[str, str]]:
        """What came to the manager since the last call."""
        messages = self.manager.read()
        new, self._heard = messages[self._heard :], len(messages)
        return new

    def advance(self, seconds: float) -> list[dict[str, str]]:
        """Let time pass, as long as the daemon's ticks. Returns what came."""
        for _ in range(round(seconds / TICK_SECONDS)):
            self.loop.advance(TICK_SECONDS)
        return self.heard()

    def feeds(self, seconds: float) -> list[float]:
        """When the manager is fed in this time."""
        end, when = self.loop.now + seconds, []
        while self.loop.now < end:
            if any("WATCHDOG" in message for message in self.advance(TICK_SECONDS)):
                when.append(self.loop.now)
        return when


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[ManualLoop]:
    with ManualLoop() as loop:
        loop.rule(monkeypatch, module)
        yield loop


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with Manager(tmp_path) as manager:
        yield manager


@pytest.fixture
def lab(loop: ManualLoop, manager: Manager) -> Iterator[Lab]:
    lab = Lab(loop, manager)
    yield lab
    lab.watchdog.close()


# What is reported


def test_ready_is_said_once_and_not_before_everything_is_in_force(lab: Lab) -> None:
    assert not [message for message in lab.advance(20) if "READY" in message]
    lab.watchdog.in_force()
    (message,) = lab.heard()
    assert message == {"READY": "1", "STATUS": "serving: 0 services, 0 listeners"}
    lab.watchdog.in_force()
    lab.watchdog.in_force()
    assert not [message for message in lab.advance(20) if "READY" in message]


def test_the_status_says_what_is_served_and_what_is_not(lab: Lab) -> None:
    lab.serve()
    specs = [spec(number) for number in range(1, 4)]
    lab.core.snapshot = Snapshot(services=dict.fromkeys([ObjectName("prod", "web")]))  # type: ignore[arg-type]
    lab.reconciler.desired = DesiredState(
        host=HostState(listeners={one.key: one for one in specs}),
        unopened=(
            status_of(spec(4), ListenerState.FAILED),
            status_of(spec(5), ListenerState.CONFLICT),
            status_of(spec(6), ListenerState.NO_ENDPOINTS),
        ),
    )
    lab.reconciler.failures = {specs[0].key: None}
    lab.feed.manifest_problems = tuple(
        SimpleNamespace(severity=severity) for severity in (Severity.ERROR, Severity.ERROR, Severity.WARNING)
    )
    messages = lab.advance(20)
    assert [message["STATUS"] for message in messages if "STATUS" in message] == [
        "serving: 1 service, 2 listeners, 2 failed, 1 conflict, 2 errors in manifests"
    ]
    lab.workers.wrong = "1 of 2 workers do not answer"
    (message,) = lab.advance(TICK_SECONDS)
    assert message["STATUS"].endswith("in manifests, 1 of 2 workers do not answer")


def test_a_reload_is_reported_and_ends_when_it_is_in_force(lab: Lab) -> None:
    lab.serve()
    lab.watchdog.reloading()
    (message,) = lab.heard()
    assert message["RELOADING"] == "1"
    assert int(message["MONOTONIC_USEC"]) > 0
    lab.watchdog.in_force()  # of a change before it
    messages = lab.advance(20)
    assert not [message for message in messages if "STATUS" in message]  # it is "reloading" all the time
    lab.watchdog.reloaded()
    messages += lab.advance(20)
    assert not [message for message in messages if "READY" in message]
    lab.watchdog.in_force()
    assert [message.get("READY") for message in lab.heard()] == ["1"]
    lab.watchdog.in_force()
    assert lab.heard() == []


def test_of_two_reloads_at_once_the_last_one_ends_it(lab: Lab) -> None:
    lab.serve()
    lab.watchdog.reloading()
    lab.watchdog.reloading()
    lab.watchdog.reloaded()
    lab.watchdog.in_force()
    assert [message.get("RELOADING") for message in lab.heard()] == ["1", "1"]
    lab.watchdog.reloaded()
    lab.watchdog.in_force()
    assert [message.get("READY") for message in lab.heard()] == ["1"]


def test_a_start_that_waits_for_an_api_server_asks_for_more_time_as_long_as_it_waits(lab: Lab) -> None:
    lab.feed.facts = (
        SourceFacts(name="manifests /etc/proxyd", synced=True, last_event=1.0),
        SourceFacts(name="https://10.1.0.1:6443", synced=False, last_event=0.0),
    )
    for _ in range(100):
        asked = [message for message in lab.advance(TICK_SECONDS) if "EXTEND_TIMEOUT_USEC" in message]
        assert [message["EXTEND_TIMEOUT_USEC"] for message in asked] == ["60000000"]
    (said,) = {message["STATUS"] for message in lab.manager.read() if "STATUS" in message}
    assert said == "waiting for the first list of https://10.1.0.1:6443"
    lab.lifecycle.phase = "serving"  # workers may still start, which is not waited for without end
    assert not [message for message in lab.advance(20) if "EXTEND_TIMEOUT_USEC" in message]


@pytest.mark.parametrize(
    ("drain", "text"),
    [(25.0, "draining: connections may go on for 25 s"), (0.0, "stopping")],
)
def test_the_end_says_how_long_it_takes(lab: Lab, drain: float, text: str) -> None:
    lab.serve()
    lab.watchdog.stopping(drain)
    (message,) = lab.heard()
    assert message["STOPPING"] == "1"
    assert message["STATUS"] == text
    assert drain + 10 <= int(message["EXTEND_TIMEOUT_USEC"]) / 1e6 <= drain + 30
    lab.watchdog.in_force()
    assert not [message for message in lab.advance(20) if message.keys() - {"WATCHDOG"}]


def test_a_start_that_is_stopped_is_never_ready(lab: Lab) -> None:
    lab.watchdog.stopping(0.0)
    lab.watchdog.in_force()
    assert not [message for message in lab.advance(20) if "READY" in message]


@pytest.mark.parametrize("state", ["READY", "STOPPING"])
def test_a_manager_that_is_away_is_told_when_it_is_back(loop: ManualLoop, tmp_path: Path, state: str) -> None:
    folder = tmp_path / "later"
    folder.mkdir()
    with Manager(folder) as gone:
        lab = Lab(loop, gone, 0.0)
    Path(gone.path).unlink()
    if state == "READY":
        lab.watchdog.in_force()
    else:
        lab.watchdog.stopping(25.0)
    loop.advance(TICK_SECONDS)
    with Manager(folder) as back:
        loop.advance(TICK_SECONDS)
        assert back.read()[0][state] == "1"
    lab.watchdog.close()


# When it is fed


def test_it_is_fed_as_often_as_it_wants_while_all_is_well(lab: Lab) -> None:
    began = lab.loop.now
    lab.serve()
    when = [began, *lab.feeds(300)]
    gaps = [later - earlier for earlier, later in pairwise(when)]
    assert max(gaps) <= WATCHDOG / 2
    assert began + 300 - when[-1] <= WATCHDOG / 2
    assert len(when) < 40  # not at every tick
    assert lab.workers.probes == lab.old_workers.probes == 300 / TICK_SECONDS


def test_a_short_watchdog_is_fed_in_time(loop: ManualLoop, manager: Manager) -> None:
    lab = Lab(loop, manager, 2.0)
    lab.serve()
    for _ in range(20):
        before = manager.fed()
        for _ in range(4):
            loop.advance(0.25)
        assert manager.fed() > before
    lab.watchdog.close()


def test_a_manager_that_does_not_watch_is_not_fed_but_workers_are_probed(
    loop: ManualLoop, manager: Manager
) -> None:
    lab = Lab(loop, manager, 0.0)
    lab.serve()
    assert lab.feeds(60) == []
    assert lab.workers.probes == 30
    lab.watchdog.close()


def test_it_is_not_fed_while_the_loop_does_not_turn(lab: Lab) -> None:
    lab.serve()
    lab.feeds(30)
    lab.loop.now += 100  # no callback runs in this time
    assert lab.heard() == []
    assert lab.feeds(TICK_SECONDS)


def test_a_silent_worker_starves_it_until_it_answers(lab: Lab) -> None:
    lab.serve()
    lab.workers.wrong = "1 of 2 workers do not answer"
    with capture_logs() as logged:
        assert lab.feeds(100) == []
    assert [(line["event"], line["why"]) for line in logged] == [("not healthy", lab.workers.wrong)]
    assert lab.watchdog.wrong == lab.workers.wrong
    lab.workers.wrong = ""
    assert lab.feeds(TICK_SECONDS)
    assert lab.watchdog.wrong == ""


def test_a_reconcile_that_is_due_and_does_not_happen_starves_it(lab: Lab) -> None:
    lab.serve()
    lab.due = True
    fed = lab.feeds(WATCHDOG)
    assert fed
    assert fed[-1] <= lab.loop.now - 14
    assert lab.feeds(60) == []
    assert lab.watchdog.wrong == "the reconcile loop does not run"
    lab.due = False
    assert lab.feeds(TICK_SECONDS)


def test_reconciles_that_happen_are_enough_even_if_there_is_always_one_due(lab: Lab) -> None:
    lab.serve()
    lab.due = True
    for _ in range(10):
        lab.core.turns += 1
        lab.advance(5 * TICK_SECONDS)
        assert lab.watchdog.wrong == ""
    lab.due = False
    lab.advance(100)
    assert lab.watchdog.wrong == ""  # nothing is due


def test_a_check_that_fails_starves_it_and_is_tried_again(lab: Lab) -> None:
    lab.serve()
    lab.old_workers.fault = OSError("a fault")
    with capture_logs() as logged:
        assert lab.feeds(60) == []
    assert "a fault" in lab.watchdog.wrong
    assert [line["log_level"] for line in logged] == ["error"]
    lab.old_workers.fault = None
    assert lab.feeds(TICK_SECONDS)


def test_before_it_is_ready_and_in_its_end_it_is_fed_whatever_workers_do(lab: Lab) -> None:
    lab.workers.wrong = "2 of 2 workers do not run"
    assert lab.feeds(60)
    lab.serve()
    assert lab.feeds(60) == []
    lab.watchdog.stopping(25.0)
    probes = lab.workers.probes
    assert lab.feeds(60)
    assert lab.workers.probes == probes  # workers that end need not answer


def test_after_its_close_nothing_is_said(lab: Lab) -> None:
    lab.serve()
    lab.watchdog.close()
    lab.watchdog.in_force()
    assert lab.feeds(60) == []
    assert lab.workers.probes == 0
