"""The reconciler on real sockets of loopback addresses; retries go by a clock that the test moves."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from proxyd.api.service import Protocol, TrafficPolicy
from proxyd.control.reconcile import reconciler as module
from proxyd.control.reconcile.reconciler import Reconciler
from proxyd.control.workers.publication import Publication, Update
from proxyd.relay.ipc.messages import CloseListener
from proxyd.relay.ipc.slots import Slots
from proxyd.state.desired import DesiredState
from proxyd.state.spec import (
    BalancerKey,
    BalancerSpec,
    Endpoint,
    HostState,
    ListenerKey,
    ListenerSpec,
    ListenerState,
    Role,
    ServicePortName,
    status_of,
)

DRAIN = 7.5
# Addresses of this run alone: another run on this machine has another process number.
NET = f"127.{64 + (os.getpid() >> 16) % 64}.{os.getpid() >> 8 & 255}"
FIRST, SECOND, THIRD = (f"{NET}.{number}" for number in (1, 2, 3))
PORT = 12_000 + os.getpid() % 8000  # below those that the kernel chooses


def listener(ip: str, service: str = "web", **fields: object) -> ListenerSpec:
    name = ServicePortName("prod", service, "", Protocol.TCP)
    balancer = BalancerKey(name, TrafficPolicy.CLUSTER, 4)
    key = ListenerKey(ip, PORT, Protocol.TCP)
    return ListenerSpec(key=key, balancer=balancer, role=Role.CLUSTER_IP, **fields)  # type: ignore[arg-type]


def desired(
    *specs: ListenerSpec, without_endpoints: Collection[ListenerSpec] = (), vips: Iterable[str] = ()
) -> DesiredState:
    balancers = [BalancerSpec(key=spec.balancer, endpoints=(Endpoint("127.0.0.1", 1),)) for spec in specs]
    return DesiredState(
        host=HostState(
            balancers={balancer.key: balancer for balancer in balancers},
            listeners={spec.key: spec for spec in specs},
            vips=frozenset(vips),
        ),
        unopened=tuple(status_of(spec, ListenerState.NO_ENDPOINTS) for spec in without_endpoints),
    )


class LoopbackRoutes:
    """Routes for addresses that are local without any: it takes root to make real ones."""

    def __init__(self) -> None:
        self.routed: set[str] = set()

    def present(self) -> frozenset[str]:
        return frozenset(self.routed)

    def add(self, ips: Iterable[str]) -> dict[str, str]:
        self.routed |= set(ips)
        return {}

    def remove(self, ips: Iterable[str]) -> dict[str, str]:
        self.routed -= set(ips)
        return {}


@dataclass
class Lab:
    """A reconciler, and what it publishes and says."""

    publication: Publication
    logged: list[dict[str, object]]
    routes: LoopbackRoutes = field(default_factory=LoopbackRoutes)
    now: float = 1000.0
    notes: list[str] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    reconciler: Reconciler = field(init=False)

    def __post_init__(self) -> None:
        self.reconciler = Reconciler(
            self.publication,
            routes=self.routes,  # type: ignore[arg-type]  # see there
            rules=None,
            guard=None,
            drain_seconds=DRAIN,
            note=lambda service, what: self.notes.append(f"{service} {what}"),
        )

    def reconcile(self, state: DesiredState, workers: Iterable[int] = (0, 1)) -> list[str]:
        """Returns the history lines of it."""
        before = len(self.notes)
        self.reconciler.reconcile(state, workers, self.updates.append)
        return self.notes[before:]

    def number(self, spec: ListenerSpec) -> int:
        """The listener's number in the workers."""
        return self.publication.held[spec.key].id

    def closed(self) -> list[CloseListener]:
        """What the last update closes."""
        return [one for one, _ in self.updates[-1].close]

    def states(self) -> dict[str, tuple[str, str]]:
        """State and detail, by IP address."""
        return {status.key.ip: (str(status.state), status.detail) for status in self.reconciler.statuses()}

    def events(self) -> list[str]:
        """The log's lines since the last call."""
        events = [str(line["event"]) for line in self.logged]
        self.logged.clear()
        return events


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    slots = Slots.create()
    publication = Publication(slots, 2)
    with capture_logs() as logged:
        lab = Lab(publication, logged)  # type: ignore[arg-type]
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: lab.now))
        yield lab
    publication.close_all()
    slots.close()


def hold(ip: str) -> socket.socket:
    """Somebody else's listener."""
    return socket.create_server((ip, PORT))


def is_open(ip: str) -> bool:
    """Whether clients reach a listener."""
    try:
        socket.create_connection((ip, PORT), 10).close()
    except ConnectionRefusedError:
        return False
    return True


# Listeners that fail


def test_a_listener_that_fails_is_tried_again_after_a_growing_pause_and_opened_when_it_can_be(
    lab: Lab,
) -> None:
    state = desired(listener(FIRST))
    assert lab.reconciler.next_retry() is None
    with hold(FIRST):
        pauses = []
        for _ in range(9):
            lab.reconcile(state)
            retry = lab.reconciler.next_retry()
            assert retry is not None
            pauses.append(retry - lab.now)
            lab.now = retry
        assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5])
        (failure,) = lab.reconciler.failures.values()
        assert failure.taken
    lab.reconcile(state)
    assert is_open(FIRST)
    assert lab.reconciler.next_retry() is None
    assert lab.states() == {FIRST: ("Serving", "")}


def test_it_is_not_tried_before_its_time(lab: Lab) -> None:
    state = desired(listener(FIRST))
    with hold(FIRST):
        lab.reconcile(state)
    retry = lab.reconciler.next_retry()
    assert retry is not None
    lab.now = retry - 0.01
    lab.reconcile(state)
    assert not is_open(FIRST)
    lab.now = retry
    lab.reconcile(state)
    assert is_open(FIRST)


def test_a_listener_that_is_wanted_otherwise_is_tried_at_once(lab: Lab) -> None:
    with hold(FIRST):
        for _ in range(4):
            lab.reconcile(desired(listener(FIRST)))
            lab.now += 5
        lab.reconcile(desired(listener(FIRST)))
    lab.reconcile(desired(listener(FIRST, "other")))
    assert is_open(FIRST)


def test_a_failing_listener_touches_no_other(lab: Lab) -> None:
    specs = [listener(ip) for ip in (FIRST, SECOND, THIRD)]
    with hold(SECOND):
        lab.reconcile(desired(*specs))
        assert is_open(FIRST)
        assert is_open(THIRD)
        assert set(lab.reconciler.observed.listeners) == {specs[0].key, specs[2].key}
        states = lab.states()
        assert states[FIRST] == states[THIRD] == ("Serving", "")
        state, detail = states[SECOND]
        assert state == "Failed"
        assert detail.startswith("in use by ")
        numbers = [lab.number(specs[0]), lab.number(specs[2])]
        updates = len(lab.updates)
        lab.now += 1
        lab.reconcile(desired(*specs))
        assert len(lab.updates) == updates  # nothing that workers must know
    lab.now += 1
    lab.reconcile(desired(*specs))
    assert is_open(SECOND)
    assert [lab.number(specs[0]), lab.number(specs[2])] == numbers
    assert list(lab.updates[-1].listeners) == [lab.number(specs[1])]


def test_a_failure_ends_with_the_wish_for_the_listener(lab: Lab) -> None:
    with hold(FIRST):
        lab.reconcile(desired(listener(FIRST)))
        lab.reconcile(desired())
    assert lab.reconciler.failures == {}
    assert lab.reconciler.next_retry() is None
    assert lab.states() == {}


def test_a_failure_and_its_end_are_said_once_each(lab: Lab) -> None:
    key = listener(FIRST).key
    with hold(FIRST):
        (note,) = lab.reconcile(desired(listener(FIRST)))
        assert note.startswith(f"prod/web Failed {key}: in use by ")
        assert lab.events() == ["listener failed"]
        for _ in range(3):
            lab.now += 10
            assert lab.reconcile(desired(listener(FIRST))) == []
        assert lab.events() == []
    lab.now += 10
    assert lab.reconcile(desired(listener(FIRST))) == [f"prod/web Opened {key}"]
    assert lab.events() == ["listener opened after failures"]


def test_of_many_that_fail_a_few_are_logged_and_all_have_their_history(lab: Lab) -> None:
    specs = [listener(f"{NET}.{number}", f"web-{number}") for number in range(1, 61)]
    blocking = [hold(spec.key.ip) for spec in specs]
    notes = lab.reconcile(desired(*specs))
    assert len(notes) == len({note.split()[0] for note in notes}) == 60
    assert lab.events() == ["listener failed"] * 21
    for sock in blocking:
        sock.close()
    lab.now += 10
    lab.reconcile(desired(*specs))
    assert lab.events() == ["listener opened after failures"] * 21


# Listeners that close


def test_a_service_that_is_removed_has_its_relays_drained(lab: Lab) -> None:
    spec = listener(FIRST)
    lab.reconcile(desired(spec))
    number = lab.number(spec)
    assert lab.reconcile(desired()) == [f"prod/web Closed {spec.key}"]
    assert not is_open(FIRST)
    assert lab.closed() == [CloseListener(number, DRAIN)]
    assert lab.updates[-1].drop_balancers
    assert lab.reconciler.relayed() == {number: ((spec.key,), frozenset({0, 1}))}
    lab.reconciler.set_drain(1.0)
    lab.reconcile(desired(spec))
    number = lab.number(spec)
    lab.reconcile(desired())
    assert lab.closed() == [CloseListener(number, 1.0)]


def test_a_service_whose_endpoints_go_keeps_its_relays_and_its_listener_closes(lab: Lab) -> None:
    spec = listener(FIRST)
    lab.reconcile(desired(spec))
    number = lab.number(spec)
    lab.reconcile(desired(without_endpoints=[spec]))
    assert not is_open(FIRST)
    assert lab.closed() == [CloseListener(number, None)]
    assert lab.states() == {FIRST: ("NoEndpoints", "")}

    lab.reconcile(desired(spec))
    assert is_open(FIRST)
    assert lab.updates[-1].close == []

    lab.reconcile(desired())  # now the Service goes, and with it all that it had
    second = max(each.id for each in lab.closed())
    assert sorted(lab.closed(), key=lambda one: one.id) == [
        CloseListener(number, DRAIN),
        CloseListener(second, DRAIN),
    ]
    lab.reconcile(desired())
    assert len([one for update in lab.updates for one, _ in update.close]) == 3  # each is said once


def test_an_address_stays_until_the_last_worker_has_no_relays_of_it(lab: Lab) -> None:
    spec = listener(FIRST)
    lab.reconcile(desired(spec, vips=[FIRST]))
    assert lab.routes.routed == {FIRST}
    number = lab.number(spec)
    lab.reconcile(desired())
    assert lab.routes.routed == {FIRST}
    assert lab.reconciler.drained(0, [number]) is False
    assert lab.reconciler.drained(0, [number, 999]) is False
    lab.reconcile(desired())
    assert lab.routes.routed == {FIRST}
    assert lab.reconciler.drained(1, [number]) is True
    assert lab.reconciler.relayed() == {}
    lab.reconcile(desired())
    assert lab.routes.routed == set()


def test_relays_die_with_their_worker(lab: Lab) -> None:
    spec = listener(FIRST)
    lab.reconcile(desired(spec, vips=[FIRST]), workers=[0])  # worker 1 has died
    lab.reconcile(desired(), workers=[0])
    assert lab.routes.routed == {FIRST}
    assert lab.reconciler.worker_died(7) is False
    assert lab.reconciler.worker_died(0) is True
    lab.reconcile(desired())
    assert lab.routes.routed == set()


def test_without_a_worker_there_are_no_relays_to_wait_for(lab: Lab) -> None:
    lab.reconcile(desired(listener(FIRST), vips=[FIRST]), workers=[])
    lab.reconcile(desired(), workers=[])
    assert lab.reconciler.relayed() == {}
    assert lab.routes.routed == set()


def test_an_address_of_the_node_itself_holds_nothing_up(lab: Lab) -> None:
    spec = listener(FIRST)
    lab.reconcile(desired(spec))
    number = lab.number(spec)
    lab.reconcile(desired())
    assert not any(lab.reconciler.drained(worker, [number]) for worker in (0, 1))
    assert lab.reconciler.relayed() == {}


def test_an_address_that_is_wanted_again_while_it_drains_stays(lab: Lab) -> None:
    spec = listener(FIRST)
    lab.reconcile(desired(spec, vips=[FIRST]))
    number = lab.number(spec)
    lab.reconcile(desired())
    lab.reconcile(desired(spec, vips=[FIRST]))
    for worker in (0, 1):
        lab.reconciler.drained(worker, [number])
    lab.reconcile(desired(spec, vips=[FIRST]))
    assert lab.routes.routed == {FIRST}
    assert is_open(FIRST)


# Other changes


def test_another_spec_of_the_same_service_keeps_socket_and_relays(lab: Lab) -> None:
    spec = listener(FIRST)
    lab.reconcile(desired(spec))
    before, number = lab.publication.held[spec.key].socket, lab.number(spec)
    waiting = socket.create_connection((FIRST, PORT), 10)
    assert lab.reconcile(desired(listener(FIRST, source_ranges=("10.0.0.0/8",)))) == []
    assert lab.publication.held[spec.key].socket is before
    assert lab.number(spec) != number
    assert lab.closed() == [CloseListener(number, None)]
    accepted, _ = before.accept()  # the client that has waited
    assert accepted.getpeername() == waiting.getsockname()
    accepted.close()
    waiting.close()


def test_an_address_that_goes_to_another_service_keeps_its_socket_and_drains(lab: Lab) -> None:
    spec = listener(FIRST)
    lab.reconcile(desired(spec))
    before, number = lab.publication.held[spec.key].socket, lab.number(spec)
    lab.reconcile(desired(listener(FIRST, "other")))
    assert lab.publication.held[spec.key].socket is before
    assert lab.closed() == [CloseListener(number, DRAIN)]


def test_what_is_as_wanted_is_left_alone(lab: Lab) -> None:
    lab.reconcile(desired(listener(FIRST), listener(SECOND, "other")))
    updates = len(lab.updates)
    lab.reconcile(desired(listener(FIRST), listener(SECOND, "other")))
    assert len(lab.updates) == updates


def test_an_address_that_somebody_removed_is_made_again_after_a_look(lab: Lab) -> None:
    state = desired(listener(FIRST), vips=[FIRST])
    lab.reconcile(state)
    lab.routes.routed.clear()
    lab.reconcile(state)
    assert lab.routes.routed == set()
    lab.reconciler.observe()
    lab.reconcile(state)
    assert lab.routes.routed == {FIRST}


def test_at_the_end_listeners_close_first_and_addresses_go_after_the_relays(lab: Lab) -> None:
    lab.reconcile(desired(listener(FIRST), vips=[FIRST]))
    lab.reconciler.close_listeners()
    assert not is_open(FIRST)
    assert lab.routes.routed == {FIRST}
    lab.reconciler.remove_addresses()
    assert lab.routes.routed == set()
