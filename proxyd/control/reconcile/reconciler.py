"""Carries plans out: routes, rules, listening sockets, and the publication for the workers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from proxyd.api.problems import Problem
from proxyd.api.service import Protocol
from proxyd.control.reconcile.addresses import Addresses
from proxyd.control.reconcile.parking import Parking
from proxyd.control.runtime.logs import get_logger, log_some
from proxyd.control.workers.handover import ListeningSocket
from proxyd.control.workers.inherited_sockets import InheritedSockets
from proxyd.control.workers.old_workers import DrainingWorkers
from proxyd.control.workers.publication import Held, Publication, Retired, Update
from proxyd.host.guard import VipGuard
from proxyd.host.routes import VipRoutes
from proxyd.host.sockets import BindFailed, open_listener
from proxyd.host.steering import Steering as SteeringRules
from proxyd.state.desired import DesiredState
from proxyd.state.plan import Plan, plan
from proxyd.state.spec import (
    BalancerKey,
    BalancerSpec,
    HostState,
    ListenerKey,
    ListenerSpec,
    ListenerState,
    ListenerStatus,
    SctpOptions,
    ServicePortName,
    status_of,
)

log = get_logger("reconciler")


_FIRST_RETRY = 0.1
_LAST_RETRY = 5.0
_BACKLOG = 4096
# Balancers, or listeners, after which an update is published while the rest is carried out.
_PUBLISHED_AT_ONCE = 1000
# A connection whose handshake began before its listener was superseded is in the backlog by then.
_BACKLOG_SECONDS = 3.0
_MENDED = "listener opened after failures"


@dataclass(slots=True)
class Failure:
    """A listener that could not be opened."""

    spec: ListenerSpec
    message: str
    attempts: int
    retry_at: float  # monotonic
    exhausted: bool  # descriptors or memory ran out: logged once for many listeners
    taken: bool = False  # another process has the address


@dataclass(slots=True)
class Ending:
    """A closed listener and the workers that may still have relays of it."""

    retired: Retired
    workers: set[int]
    holds: bool  # the relays need its address, which proxyd has made


class Reconciler:
    """Makes the node agree with desired states. It owns every address and listening socket.

    `observed` is what was really done: whatever failed is missing there, so the next plan has it again.
    """

    def __init__(
        self,
        publication: Publication,
        *,
        routes: VipRoutes | None,
        rules: SteeringRules | None,
        guard: VipGuard | None,
        drain_seconds: float,
        note: Callable[[ServicePortName, str], None] = lambda _service_port, _what: None,
        sctp: SctpOptions = SctpOptions(),  # noqa: B008 - it is immutable
        parking: Parking | None = None,
    ) -> None:
        self.desired = DesiredState()
        self.failures: dict[ListenerKey, Failure] = {}
        self._publication = publication
        self._addresses = Addresses(routes, rules, guard, parking)
        self._parking = parking
        self._superseded: list[tuple[float, Held]] = []  # to be closed at a time (monotonic)
        self._drain = drain_seconds
        self._sctp = sctp
        self._note = note  # takes what became of a service port's listener, for people to read
        # The state that was desired last, if all of it was carried out. It then stands for `observed`, and
        # the next plan looks only at what changed.
        self._carried_out: HostState | None = None
        self._balancers: dict[BalancerKey, BalancerSpec] = {}
        self._listeners: dict[ListenerKey, ListenerSpec] = {}
        self._idle: set[BalancerKey] = set()  # dropped, but their counters are kept for their service port
        self._ending: dict[int, Ending] = {}  # by the listener's number
        # The keys of `desired.unopened`, computed when they are first needed.
        self._unopened: set[tuple[ListenerKey, ServicePortName]] | None = None
        self._inherited = InheritedSockets()
        self._old_workers: DrainingWorkers | None = None
        self._lines: dict[str, list[dict[str, str]]] = {}  # the fields of lines to be logged, by event

    @property
    def observed(self) -> HostState:
        """What the node holds now."""
        return HostState(
            balancers=self._balancers,
            listeners=self._listeners,
            vips=frozenset(self._addresses.vips),
            steering=self._addresses.steering,
        )

    def reconcile(
        self, desired: DesiredState, workers: Iterable[int], publish: Callable[[Update], None]
    ) -> None:
        """Change the node towards `desired`, and publish that.

        An error concerns only the listener that it belongs to: see `failures` and `statuses`.

        Args:
            desired: the state to reach.
            workers: numbers of the workers that may hold relays.
            publish: sends an update to the workers. It is called several times if there is much to do, so
                that they work while the rest is done.
        """
        unopened_before = self.desired.unopened
        self.desired, self._unopened = desired, None
        before, self._carried_out = self._carried_out, None
        todo = plan(before or self.observed, desired.host)
        crew = set(workers)
        self._addresses.add(todo, desired.host.listeners)
        for number, spec in enumerate(todo.set_balancers, 1):
            self._publication.set_balancer(spec)
            self._balancers[spec.key] = spec
            if number % _PUBLISHED_AT_ONCE == 0:
                publish(self._publication.take_update())
        gone = frozenset(todo.close)
        for key in todo.close:
            self._close(key, gone)
        self._open_all(todo.open, publish)
        self._inherited.close()
        for wish in todo.change:
            self._change(wish)
        for balancer in todo.drop_balancers:
            self._publication.drop_balancer(balancer)
            del self._balancers[balancer]
        self._forget(todo, unopened_before)
        self._keep_relays(crew)
        self._addresses.settle(todo, self._listeners, self._held_keys())
        for key in [key for key in self.failures if key not in desired.host.listeners]:
            del self.failures[key]
            if self._parking is not None:
                self._parking.close(key)  # a port that was left to somebody else
        now = time.monotonic()
        for _, old in [one for one in self._superseded if one[0] <= now]:
            self._publication.close_superseded(old)
        self._superseded = [one for one in self._superseded if one[0] > now]
        if update := self._publication.take_update():
            publish(update)
        if self._is_carried_out(todo, vips_were=before is not None):
            self._carried_out = desired.host

    def _is_carried_out(self, todo: Plan, *, vips_were: bool) -> bool:
        """Whether the node holds exactly what is desired. `vips_were`: so did its VIPs before the plan."""
        wanted = self.desired.host
        return (
            not self.failures
            and len(self._listeners) == len(wanted.listeners)
            and len(self._balancers) == len(wanted.balancers)
            and self._addresses.steering == wanted.steering
            and (
                (vips_were and not (todo.add_vips or todo.remove_vips)) or self._addresses.vips == wanted.vips
            )
        )

    def inherit(self, sockets: Iterable[ListeningSocket], old_workers: DrainingWorkers) -> None:
        """Go on from the program before an upgrade. Call it before the first reconcile.

        Args:
            sockets: its listening sockets, which are used rather than opened anew.
            old_workers: its workers, whose relays need their addresses.
        """
        self._inherited = InheritedSockets(sockets)
        self._old_workers = old_workers
        if self._parking is not None:
            self._parking.begin(self._addresses.guarded, self._inherited)

    def relayed(self) -> dict[int, tuple[tuple[ListenerKey, ...], frozenset[int]]]:
        """By number, the addresses of each closed listener that may have relays, and the workers that may."""
        return {
            number: (ending.retired.keys, frozenset(ending.workers))
            for number, ending in self._ending.items()
        }

    @property
    def vip_lookup(self) -> dict[str, int]:
        """Descriptors by name of what has clients find parked listeners; {} if none are parked."""
        return self._parking.descriptors if self._parking is not None else {}

    def park_inherited(self) -> bool:
        """Park the listeners that the program before bound. Call it when this one's workers have everything.

        Clients find the new socket at once; the old one is closed when nobody can be left in its backlog.

        Returns:
            Whether there is something to publish.
        """
        parking = self._parking
        if parking is None:
            return False
        specs = [self._listeners[key] for key in parking.take_bound() if key in self._listeners]
        for key, sock in parking.open(specs, InheritedSockets(), _BACKLOG).items() if specs else ():
            if isinstance(sock, socket.socket):
                old = self._publication.supersede(self._listeners[key], sock)
                self._superseded.append((time.monotonic() + _BACKLOG_SECONDS, old))
        return bool(specs)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What does not work as it should, of no single listener."""
        return self._addresses.problems

    def set_drain(self, seconds: float) -> None:
        """Set how long the relays of listeners that are closed from now on may go on."""
        self._drain = seconds

    def observe(self, suspects: AbstractSet[str] = frozenset()) -> dict[str, str]:
        """Look at the node again: what somebody has removed is part of the next plan. See `Addresses`."""
        self._carried_out = None
        lost = self._addresses.observe(suspects)
        if self._parking is not None:
            for key, who in self._parking.taken_by_others().items():
                self._give_up(key, who)
        return lost

    def next_retry(self) -> float | None:
        """When there is something to do again (monotonic), such as a failed listener; None if never."""
        due = [failure.retry_at for failure in self.failures.values()]
        due += [when for when, _ in self._superseded]
        return min(due, default=None)

    def drained(self, worker: int, numbers: Iterable[int]) -> bool:
        """A worker has no relays left of these closed listeners. Returns whether an address may be free."""
        return sum(self._one_drained(worker, number) for number in numbers) > 0

    def worker_died(self, worker: int) -> bool:
        """A worker has died, and its relays with it. Returns whether an address may be free."""
        return sum(self._one_drained(worker, number) for number in list(self._ending)) > 0

    def statuses(self) -> tuple[ListenerStatus, ...]:
        """The status of every listener that is wanted."""
        open_or_failed = [
            status_of(spec, ListenerState.FAILED, failure.message)
            if (failure := self.failures.get(key))
            else status_of(spec, ListenerState.SERVING)
            for key, spec in self.desired.host.listeners.items()
        ]
        return (*open_or_failed, *self.desired.unopened)

    def close_listeners(self) -> None:
        """Close every listening socket. The addresses stay, for the relays that drain."""
        self._publication.close_all()
        self._inherited.close()  # there still are some if the end comes before the first reconcile
        self._listeners.clear()
        self._carried_out = None

    def remove_addresses(self) -> None:
        """Remove every route, rule and table."""
        self._addresses.remove_all()
        self._carried_out = None

    def addresses_changed(self, gone: AbstractSet[str]) -> dict[str, str]:
        """Repair what depends on the node's addresses. Call it when these have changed. See `Addresses`."""
        lost = self._addresses.changed(gone)
        if lost:
            self._carried_out = None
        if self._parking is not None:
            for key in self._parking.look_at_devices():
                if key in self._listeners:
                    self._publication.set_gso(key, gso=self._parking.gso)
        return lost

    def _open_all(self, specs: Iterable[ListenerSpec], publish: Callable[[Update], None]) -> None:
        said = any(failure.exhausted for failure in self.failures.values())
        of_sctp: list[ListenerSpec] = []
        parked: list[ListenerSpec] = []
        for number, spec in enumerate(filter(self._due, specs), 1):
            if spec.key.protocol is Protocol.SCTP:
                of_sctp.append(spec)
            elif self._parking is not None and self._parking.parks(spec):
                parked.append(spec)
            else:
                self._open(spec)
            if number % _PUBLISHED_AT_ONCE == 0 and (update := self._publication.take_update()):
                publish(update)
        for first in range(0, len(parked), _PUBLISHED_AT_ONCE):
            self._open_parked(parked[first : first + _PUBLISHED_AT_ONCE])
            if update := self._publication.take_update():
                publish(update)
        if of_sctp:
            self._open_sctp(of_sctp)
        if not said and (new := [failure for failure in self.failures.values() if failure.exhausted]):
            log.warning("listeners failed", count=len(new), error=new[0].message)
        said_late, self._lines = self._lines, {}
        for event, lines in said_late.items():
            log_some(log.info if event is _MENDED else log.warning, event, lines)

    def _due(self, spec: ListenerSpec) -> bool:
        """Whether to try to open a listener now: one that has failed waits for its next attempt."""
        failure = self.failures.get(spec.key)
        return not (failure and failure.spec == spec and time.monotonic() < failure.retry_at)

    def _open(self, spec: ListenerSpec) -> None:
        try:
            sock = self._inherited.take(spec) or open_listener(spec, backlog=_BACKLOG)
        except BindFailed as error:
            self._failed(spec, error)
            return
        self._publication.open(spec, sock)
        self._opened(spec)

    def _open_parked(self, specs: list[ListenerSpec]) -> None:
        assert self._parking is not None
        opened = self._parking.open(specs, self._inherited, _BACKLOG)
        for spec in specs:
            sock = opened[spec.key]
            if isinstance(sock, BindFailed):
                self._failed(spec, sock)
            else:
                self._publication.open(spec, sock, gso=self._parking.gso)
                self._opened(spec)

    def _give_up(self, key: ListenerKey, who: str) -> None:
        """Close a listener, as somebody else is bound to its address; it is tried again."""
        assert self._parking is not None
        spec = self._listeners[key]
        self._close(key, frozenset({key}))
        self._failed(spec, self._parking.leave_to(key, who))

    def _open_sctp(self, specs: list[ListenerSpec]) -> None:
        # Imported only where SCTP is turned on.
        from proxyd.control.reconcile.sctp_endpoints import SctpEndpoints  # noqa: PLC0415

        failed = SctpEndpoints(self._publication, self._inherited, self._sctp).open(specs, _BACKLOG)
        for spec in specs:
            if spec.key in failed:
                self._failed(spec, failed[spec.key])
            else:
                self._opened(spec)

    def _failed(self, spec: ListenerSpec, error: BindFailed) -> None:
        failure = self.failures.get(spec.key)
        attempts = failure.attempts + 1 if failure and failure.spec == spec else 1
        message = self._addresses.vip_errors.get(spec.key.ip) or str(error)
        if failure is None or failure.message != message:
            if not error.exhausted:
                self._note_line("listener failed", spec, error=message)
            self._note(spec.service_port, f"Failed {spec.key}: {message}")
        # What only a person can mend is tried at the longest interval from the beginning.
        pause = (
            min(_FIRST_RETRY * 2 ** min(attempts - 1, 10), _LAST_RETRY) if error.retryable else _LAST_RETRY
        )
        retry_at = time.monotonic() + pause
        self.failures[spec.key] = Failure(spec, message, attempts, retry_at, error.exhausted, error.taken)

    def _opened(self, spec: ListenerSpec) -> None:
        if self.failures.pop(spec.key, None):
            self._note_line(_MENDED, spec)
        self._note(spec.service_port, f"Opened {spec.key}")
        self._listeners[spec.key] = spec

    def _note_line(self, event: str, spec: ListenerSpec, **fields: str) -> None:
        """Keep a line until all listeners were tried: of hundreds that fail alike, a few are logged."""
        line = {"listener": str(spec.key), "service": str(spec.service_port), **fields}
        self._lines.setdefault(event, []).append(line)

    def _change(self, spec: ListenerSpec) -> None:
        # Relays drain if their Service lost the address; another spec of the same service port leaves its
        # relays alone.
        same = self._listeners[spec.key].service_port == spec.service_port
        self._publication.change(spec, None if same else self._drain)
        self._listeners[spec.key] = spec

    def _close(self, key: ListenerKey, gone: frozenset[ListenerKey]) -> None:
        """Close a listener. `gone` are all that are to be closed with it."""
        service_port = self._listeners.pop(key).service_port
        self._note(service_port, f"Closed {key}")
        held = self._publication.held.get(key)
        if held is None:
            return  # it was closed together with another listener of its socket
        if not gone.issuperset(held.specs):
            self._leave_home(held, key)
            return
        # If the Service still wants the address, only its endpoints have gone: its relays stay.
        stay = any(self._wants(one, service_port) for one in held.specs)
        if self._parking is not None:
            self._parking.close(key)
        self._publication.close(key, None if stay else self._drain)

    def _leave_home(self, held: Held, key: ListenerKey) -> None:
        from proxyd.control.reconcile.sctp_endpoints import leave  # noqa: PLC0415 - see `_open_sctp`

        self._publication.leave(key)
        if error := leave(held, key):
            log.warning("SCTP address can't be given up", listener=str(key), error=error)

    def _keep_relays(self, crew: set[int]) -> None:
        """Note which listeners were closed, and drain those that their Service no longer wants."""
        for retired in self._publication.take_retired():
            workers = crew if retired.owner is None else crew & {retired.owner}
            if workers:
                holds = any(
                    key.ip in self._addresses.vips or key in self._addresses.steering for key in retired.keys
                )
                self._ending[retired.id] = Ending(retired, set(workers), holds)
        for retired in [ending.retired for ending in self._ending.values() if not ending.retired.drains]:
            if not any(self._wants(key, retired.spec.service_port) for key in retired.keys):
                self._publication.drain(retired, self._drain)
        if self._old_workers:
            wanted = self.desired.host.listeners.keys() | {one.key for one in self.desired.unopened}
            self._old_workers.let_go(wanted, self._drain)

    def _wants(self, key: ListenerKey, service_port: ServicePortName) -> bool:
        """Whether a service port wants an address, even if it can't have it at present."""
        holder = self.desired.host.listeners.get(key)
        if holder is not None and holder.service_port == service_port:
            return True
        if self._unopened is None:
            self._unopened = {(status.key, status.service_port) for status in self.desired.unopened}
        return (key, service_port) in self._unopened

    def _one_drained(self, worker: int, number: int) -> bool:
        ending = self._ending.get(number)
        if ending is None:
            return False
        ending.workers.discard(worker)
        if ending.workers:
            return False
        del self._ending[number]
        return ending.holds

    def _held_keys(self) -> set[ListenerKey]:
        held = {key for ending in self._ending.values() if ending.holds for key in ending.retired.keys}
        return held | self._old_workers.keys() if self._old_workers else held

    def _forget(self, todo: Plan, before: tuple[ListenerStatus, ...]) -> None:
        """Free the counters of balancers whose service port is gone: often some time after its endpoints.

        Args:
            todo: the plan.
            before: what was not to be opened before it.
        """
        self._idle.update(todo.drop_balancers)
        self._idle.difference_update(spec.key for spec in todo.set_balancers)
        if not self._idle or not (todo.drop_balancers or self.desired.unopened is not before):
            return
        wanted = {status.service_port for status in self.desired.unopened}
        wanted |= {spec.service_port for spec in self.desired.host.listeners.values()}
        for key in [key for key in self._idle if key.service_port not in wanted]:
            self._publication.forget(key)
            self._idle.remove(key)
