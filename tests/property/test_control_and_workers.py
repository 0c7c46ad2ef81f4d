"""Reconciler, publication, supervisor and the tables of two workers, whatever happens to them and in which order.

All of it is the real thing, in one process: sockets on loopback, channels, relays between clients and backends. The test
turns the event loop and moves the clock.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from proxyd.api.discovery import EndpointPort, EndpointSlice, SliceEndpoint
from proxyd.api.meta import ObjectMeta, ObjectName
from proxyd.api.service import (
    LoadBalancerIngress,
    LoadBalancerStatus,
    Protocol,
    Service,
    ServicePort,
    ServiceSpec,
    ServiceStatus,
    ServiceType,
    SessionAffinity,
    TrafficPolicy,
)
from proxyd.control.reconcile import reconciler as reconciler_module
from proxyd.control.reconcile.reconciler import Reconciler
from proxyd.control.runtime.logs import Summariser, get_logger
from proxyd.control.workers import publication as publication_module
from proxyd.control.workers import supervisor as supervisor_module
from proxyd.control.workers.publication import Held, Publication
from proxyd.control.workers.slot_allocator import SPARE, SlotAllocator
from proxyd.control.workers.supervisor import Events, Supervisor, Worker
from proxyd.host import sockets as sockets_module
from proxyd.host.holders import Holder
from proxyd.relay.ipc.channel import Channel
from proxyd.relay.ipc.messages import Trouble
from proxyd.relay.ipc.options import Options as WorkerOptions
from proxyd.relay.ipc.slots import MAX_SLOTS, Slots
from proxyd.relay.worker import Worker as WorkerProgram
from proxyd.state.desired import Planner
from proxyd.state.snapshot import NodeAddress, NodeView, Options, Snapshot, VipMode
from proxyd.state.spec import BalancerKey, ListenerKey, ServicePortName
from tests.support.manual_loop import ManualLoop

NAMES = ["a", "b"]
WORKERS = [0, 1]
DRAIN = 30.0
# Small, so that addresses collide often; of this process, so that no other test has them.
_PID = os.getpid()
IPS = [f"127.97.{_PID >> 6 & 255}.{4 * (_PID & 63) + last}" for last in (1, 2)]
PORTS = [7001, 7002]
KEYS = [ListenerKey(ip, port, one) for ip in IPS for port in PORTS for one in (Protocol.TCP, Protocol.UDP)]
OPTIONS = Options(vip_mode=VipMode(), protocols=frozenset({"TCP", "UDP"}))
NODE = NodeView(name="n1", addresses=(NodeAddress(ip="127.0.0.1", interface="lo"),))

names = st.sampled_from(NAMES)
indexes = st.sampled_from(WORKERS)
keys = st.sampled_from(KEYS)
# Some changes come with others in one reconcile.
mostly = st.sampled_from([True, True, True, False])
ports = st.lists(
    st.builds(
        ServicePort,
        port=st.sampled_from([PORTS[0], *PORTS]),
        protocol=st.sampled_from([Protocol.TCP, Protocol.TCP, Protocol.UDP]),
        name=st.sampled_from(["x", "y"]),
        target_port=st.just(1),
    ),
    min_size=1,
    max_size=2,
    unique_by=(lambda port: port.name, lambda port: (port.port, port.protocol)),
).map(tuple)


class Comes(NamedTuple):
    """A Service is made, or becomes another one."""

    name: str
    ips: tuple[str, ...]
    ingress: tuple[str, ...]
    ports: tuple[ServicePort, ...]
    affinity: bool
    local: bool  # from outside only endpoints of this node are reached
    ranges: bool

    def service(self, stamp: str) -> Service:
        return Service(
            metadata=ObjectMeta(name=self.name, creation_timestamp=stamp),
            spec=ServiceSpec(
                type=ServiceType.LOAD_BALANCER,
                cluster_ips=self.ips,
                ports=self.ports,
                session_affinity=SessionAffinity.CLIENT_IP if self.affinity else SessionAffinity.NONE,
                external_traffic_policy=TrafficPolicy.LOCAL if self.local else TrafficPolicy.CLUSTER,
                load_balancer_source_ranges=("127.0.0.0/8",) if self.ranges else (),
            ),
            status=ServiceStatus(
                load_balancer=LoadBalancerStatus(
                    ingress=tuple(LoadBalancerIngress(ip=ip) for ip in self.ingress)
                )
            ),
        )


class EndpointsChange(NamedTuple):
    """Other backends are a Service's endpoints; there may be none."""

    name: str
    numbers: tuple[int, ...]
    here: bool


class Turns(NamedTuple):
    """One property of a Service becomes another: `affinity`, `local` or `ranges`."""

    name: str
    what: str


class Goes(NamedTuple):
    """A Service is deleted."""

    name: str


rarely = st.sampled_from([False, False, False, True])
comes = st.builds(
    Comes,
    name=names,
    ips=st.lists(st.sampled_from(IPS), min_size=1, max_size=2, unique=True).map(tuple),
    ingress=st.lists(st.sampled_from(IPS), max_size=1).map(tuple),
    ports=ports,
    affinity=rarely,
    local=rarely,
    ranges=rarely,
)
endpoints_change = st.builds(
    EndpointsChange,
    name=names,
    numbers=st.lists(st.integers(0, 2), max_size=3, unique=True).map(tuple),
    here=mostly,
)
turns = st.builds(Turns, name=names, what=st.sampled_from(["affinity", "local", "ranges"]))
goes = st.builds(Goes, name=names)
changes = st.one_of(comes, endpoints_change, turns, goes)


@dataclass(eq=False)
class Client:
    """A connection that a backend has taken."""

    sock: socket.socket
    backend: socket.socket
    key: ListenerKey
    service_port: ServicePortName
    worker: int
    unwanted: bool = False  # its Service does not want the address any more, or did not for a while
    not_before: float | None = None  # its Service lost the address, and it may end then ...
    due: float | None = None  # ... and has to by then

    def ended(self) -> bool:
        try:
            return self.sock.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        self.sock.close()
        self.backend.close()


class Crew(Supervisor):
    """A supervisor whose workers live in this process, where one can look at their tables."""

    programs: dict[int, WorkerProgram]

    def _process(self, index: int, ours: socket.socket, theirs: socket.socket) -> Worker:
        ours.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 1
        )  # as small as can be: messages wait in control
        program = WorkerProgram(self._loop, Channel(theirs.dup()), self._slots, index, self._options)
        program._plane.now = self._loop.time
        program.start()
        self.programs[index] = program
        return Worker(index, None, -1, Channel(ours), self._loop.time())


class ControlAndWorkers(RuleBasedStateMachine):
    """Rules do what may happen; `settle` waits until everybody knows everything, and then looks at all tables."""

    def __init__(self) -> None:
        super().__init__()
        self.descriptors = _sockets()
        self.loop = ManualLoop()
        self.patches = pytest.MonkeyPatch()
        self.loop.rule(self.patches, reconciler_module, supervisor_module)
        # Updates come in many parts.
        self.patches.setattr(publication_module, "MAX_DESCRIPTORS", 2)
        self.patches.setattr(publication_module, "_PART_BYTES", 500)
        # It looks through /proc, which takes long, for a word in a message.
        self.patches.setattr(sockets_module, "holder", lambda _key: Holder("somebody"))
        self.services: dict[ObjectName, Service] = {}
        self.wishes: dict[ObjectName, Comes] = {}
        self.slices: dict[ObjectName, tuple[EndpointSlice, ...]] = {}
        self.created = itertools.count()
        self.planner = Planner()
        self.backends = [_listen() for _ in range(3)]
        self.occupied: dict[ListenerKey, socket.socket] = {}
        self.clients: list[Client] = []
        self.held_up: set[int] = set()  # workers that do not read
        self.unheard: set[int] = set()  # workers that control does not read from
        self.numbers: set[int] = set()  # of every listener that there was
        self.named: dict[int, Held] = {}
        self.counted: dict[ServicePortName, set[BalancerKey]] = {}  # what has counters

        self.slots = Slots.create()
        self.publication = Publication(self.slots, len(WORKERS))
        self.reconciler = Reconciler(
            self.publication, routes=None, rules=None, guard=None, drain_seconds=DRAIN
        )

        async def make() -> Crew:
            options, summariser = WorkerOptions(workers=len(WORKERS)), Summariser(get_logger("test"))
            return Crew(len(WORKERS), self.slots, self.publication, options, summariser=summariser)

        self.crew = self.loop.run_until_complete(make())
        self.crew.programs = {}
        self.crew.start(
            Events(
                acknowledged=lambda: None,
                drained=self.reconciler.drained,
                died=self.reconciler.worker_died,
                connections=lambda _records, _dropped: None,
                trouble=self.trouble,
                failures=lambda _records: None,
            )
        )

    @initialize(rows=st.sampled_from([8, 16, MAX_SLOTS]), changes=st.lists(comes, min_size=1, max_size=3))
    def start(self, rows: int, changes: list[Comes]) -> None:
        """With Services that have clients, and not always with a row of counters for each of their endpoints."""
        self.publication._rows = SlotAllocator(self.slots, rows)
        all_have_some = [EndpointsChange(name, (0, 1), here=True) for name in NAMES]
        self.services_change([*changes, *all_have_some], now=True)
        self.clients_come([0, 1, 2])

    def trouble(self, _worker: int, said: Trouble) -> None:
        raise AssertionError(said)

    # -- what is wished for

    @rule(changes=st.lists(changes, min_size=1, max_size=3), now=mostly)
    def services_change(self, changes: list[Comes | EndpointsChange | Turns | Goes], now: bool) -> None:
        for change in changes:
            key = ObjectName("default", change.name)
            match change:
                case Comes():
                    self.set_service(key, change)
                case Turns() if key in self.services:
                    old = self.wishes[key]
                    self.set_service(key, old._replace(**{change.what: not getattr(old, change.what)}))
                case EndpointsChange():
                    self.slices[key] = tuple(self.slice(change, number) for number in change.numbers)
                case Goes():
                    self.services.pop(key, None)
        if now:
            self.reconcile()

    def set_service(self, key: ObjectName, wish: Comes) -> None:
        old = self.services.get(key)
        stamp = old.metadata.creation_timestamp if old else f"{next(self.created):06}"
        self.services[key] = wish.service(stamp)
        self.wishes[key] = wish

    def slice(self, change: EndpointsChange, number: int) -> EndpointSlice:
        """A backend, which is an endpoint of every port."""
        where = "n1" if change.here else "n2"
        port = self.backends[number].getsockname()[1]
        return EndpointSlice(
            metadata=ObjectMeta(name=f"{change.name}-{number}"),
            endpoints=(SliceEndpoint(addresses=("127.0.0.1",), node_name=where),),
            ports=tuple(
                EndpointPort(name=name, protocol=protocol, port=port)
                for name in ("x", "y")
                for protocol in (Protocol.TCP, Protocol.UDP)
            ),
        )

    def reconcile(self) -> None:
        # The daemon's snapshots are never changed in place.
        snapshot = Snapshot(services=dict(self.services), slices=dict(self.slices))
        desired = self.planner.desired(snapshot, NODE, OPTIONS)
        self.reconciler.reconcile(desired, self.crew.workers, self.crew.publish)
        listeners = desired.host.listeners
        wanted = {(spec.key, spec.service_port) for spec in listeners.values()}
        wanted |= {(status.key, status.service_port) for status in desired.unopened}
        ports = {service_port for _, service_port in wanted}
        self.counted = {one: keys for one, keys in self.counted.items() if one in ports}
        for balancer in desired.host.balancers:
            self.counted.setdefault(balancer.service_port, set()).add(balancer)
        for client in self.clients:
            holder = listeners.get(client.key)
            client.unwanted |= (client.key, client.service_port) not in wanted
            taken = holder is not None and holder.service_port != client.service_port
            if client.not_before is None and (client.unwanted or taken):
                client.not_before = self.loop.now + DRAIN

    @rule(anew=rarely)
    def reconcile_again(self, anew: bool) -> None:
        """As the daemon does now and then."""
        if anew:
            self.reconciler.observe()
        self.reconcile()

    # -- what happens to listeners

    @rule(key=keys)
    def somebody_else_takes_an_address(self, key: ListenerKey) -> None:
        """Where they can. It is in the way of a listener, which opens when they have given it back."""
        kind = socket.SOCK_DGRAM if key.protocol is Protocol.UDP else socket.SOCK_STREAM
        sock = socket.socket(socket.AF_INET, kind)
        try:
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # but for what listens
            sock.bind((key.ip, key.port))
            if kind == socket.SOCK_STREAM:
                sock.listen()
        except OSError:
            sock.close()
            # A worker that is late has a duplicate of a closed UDP socket.
            late = key.protocol is Protocol.UDP and self.not_settled()
            assert late or key in self.publication.held or key in self.occupied
        else:
            assert key not in self.publication.held
            self.occupied[key] = sock

    @rule()
    def they_give_back_what_they_took(self) -> None:
        for sock in self.occupied.values():
            sock.close()
        self.occupied.clear()

    @rule(seconds=st.sampled_from([0.05, 0.3, 6.0, DRAIN + 1]))
    def time_passes(self, seconds: float) -> None:
        self.loop.advance(seconds)
        retry = self.reconciler.next_retry()
        if retry is not None and retry <= self.loop.now:
            self.reconcile()

    # -- what happens to workers

    @rule(index=indexes)
    def a_worker_dies(self, index: int) -> None:
        """Without a word, in the middle of whatever it was told."""
        worker = self.crew.workers.get(index)
        if worker is None:
            return
        self.held_up.discard(index)
        self.unheard.discard(index)
        program = self.crew.programs.pop(index)
        program._reporter.stop()
        program.stop(1)
        self.loop.add_reader(worker.channel.fileno(), self.crew._readable, worker)
        self.loop.until(lambda: self.crew.workers.get(index) is not worker)
        for client in [client for client in self.clients if client.worker == index]:
            self.loop.until(client.ended)
            self.clients.remove(client)
            client.close()

    @rule(index=indexes, worker_reads=st.booleans(), control_reads=st.booleans())
    def somebody_is_slow(self, index: int, worker_reads: bool, control_reads: bool) -> None:
        """A worker that does not read what it is told for a while; a control that does not read what that worker says."""
        worker = self.crew.workers.get(index)
        if worker is None:
            return
        program = self.crew.programs[index]
        self.held_up.discard(index)
        self.unheard.discard(index)
        if worker_reads:
            self.loop.add_reader(program._channel.fileno(), program._readable)
        else:
            self.loop.remove_reader(program._channel.fileno())
            self.held_up.add(index)
        if control_reads:
            self.loop.add_reader(worker.channel.fileno(), self.crew._readable, worker)
        else:
            self.loop.remove_reader(worker.channel.fileno())
            self.unheard.add(index)

    @rule()
    def turn(self) -> None:
        self.loop.turn()

    # -- clients

    @rule(key=keys)
    def client_is_refused(self, key: ListenerKey) -> None:
        """At once where nobody listens, also while a worker has not heard yet that the listener is closed."""
        if key.protocol is Protocol.TCP and key not in self.occupied and key not in self.publication.held:
            with socket.socket() as sock, pytest.raises(ConnectionRefusedError):
                sock.connect((key.ip, key.port))

    @rule(numbers=st.lists(st.integers(0, 5), min_size=1, max_size=3))
    def clients_come(self, numbers: list[int]) -> None:
        self.settle()
        for number in numbers:
            self.client_comes(number)

    def client_comes(self, number: int) -> None:
        listeners = [spec for key, spec in self.reconciler._listeners.items() if key.protocol is Protocol.TCP]
        if not listeners:
            return
        spec = listeners[number % len(listeners)]
        key = spec.key
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex((key.ip, key.port))
        before = set(self.relays())
        self.loop.until(lambda: not before.issuperset(self.relays()))
        ((index, relay),) = (
            (index, relay)
            for index, program in self.crew.programs.items()
            for relay in program._plane.relays - before
        )
        self.loop.until(lambda: relay._connected)
        backend, number = self.accepted()
        ports = {one.port for one in self.publication._specs[spec.balancer].endpoints}
        assert self.backends[number].getsockname()[1] in ports
        self.clients.append(Client(sock, backend, key, spec.service_port, index))

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(self.clients))
        self.clients.remove(client)
        client.close()

    def accepted(self) -> tuple[socket.socket, int]:
        for number, backend in enumerate(self.backends):
            with contextlib.suppress(BlockingIOError):
                sock, _ = backend.accept()
                sock.setblocking(False)
                return sock, number
        raise AssertionError("no backend has a connection")

    def relays(self) -> Iterator[Any]:
        for program in self.crew.programs.values():
            yield from program._plane.relays

    # -- what holds at any time

    @invariant()
    def a_listener_is_in_one_state(self) -> None:
        reconciler = self.reconciler
        listeners, failures = reconciler._listeners, reconciler.failures
        assert not listeners.keys() & failures.keys()
        assert listeners.keys() | failures.keys() == reconciler.desired.host.listeners.keys()
        assert listeners.keys() == self.publication.held.keys()
        for key, held in self.publication.held.items():
            assert held.spec == listeners[key] == reconciler.desired.host.listeners[key]
            assert held.socket.fileno() >= 0
            assert held.socket.getsockname() == (key.ip, key.port)
            # What remembers clients is in one worker.
            remembers = (
                key.protocol is Protocol.UDP or reconciler._balancers[held.spec.balancer].affinity_seconds
            )
            assert (held.owner is not None) == bool(remembers)
        assert set(reconciler._ending).isdisjoint(held.id for held in self.publication.held.values())

    @invariant()
    def numbers_are_not_used_twice(self) -> None:
        for held in self.publication.held.values():
            known = self.named.setdefault(held.id, held)
            assert known is held, "a listener's number is never used again"
        assert self.publication._configs.keys() == self.reconciler._balancers.keys()
        configs = self.publication._configs.values()
        ids = [config.id for config in configs]
        assert len(set(ids)) == len(ids)
        rows = [one for one in ids if one < MAX_SLOTS]
        rows += [row for config in configs for _, _, row in config.endpoints if row != SPARE]
        assert len(set(rows)) == len(rows), "what is in use has a row to itself, or the spare one"

    @invariant()
    def rows_are_owned_or_free(self) -> None:
        book = self.publication._rows
        owned, free = list(book._owned.values()), list(book._freed)
        assert sorted(owned + free) == list(range(1, book._next)), "each of them once"
        # A balancer keeps its counters for as long as its service port is wanted, also without endpoints.
        assert self.publication._counted == self.counted
        balancers = {owner for owner in book._owned if isinstance(owner, BalancerKey)}
        assert balancers <= {key for keys in self.counted.values() for key in keys}
        for owner in book._owned.keys() - balancers:
            balancer, endpoint = owner
            assert endpoint in self.reconciler._balancers[balancer].endpoints

    # -- what holds once all is delivered

    def not_settled(self) -> bool:
        return bool(
            self.held_up or self.unheard or len(self.crew.workers) < len(WORKERS) or self.crew.lagging()
        )

    @rule()
    def settle(self) -> None:
        for index in WORKERS:
            self.somebody_is_slow(index, worker_reads=True, control_reads=True)
        while len(self.crew.workers) < len(WORKERS):
            self.loop.advance(1.0)
        self.loop.until(lambda: not self.crew.lagging() and not self.crew.telling())
        # Sockets that were in the way have gone by now, be it of a worker that was late.
        self.loop.now += 6.0
        self.reconcile()
        generation = self.publication.generation
        self.reconcile()
        assert self.publication.generation == generation, "nothing is left to be told"
        self.loop.until(lambda: not self.crew.lagging() and not self.crew.telling())
        for client in self.clients:
            if client.unwanted and client.due is None:
                client.due = self.loop.now + DRAIN
        self.loop.turn()  # for what is due
        self.loop.until(self.relays_are_those_of_clients)
        self.loop.turn(3)  # for what the workers report then
        self.check_listeners()
        self.check_tables()
        self.check_clients()

    def relays_are_those_of_clients(self) -> bool:
        now = self.loop.now + 0.1
        may_end = [one for one in self.clients if one.not_before is not None and one.not_before <= now]
        for client in [client for client in may_end if client.ended()]:
            self.clients.remove(client)
            client.close()
        return sum(1 for _ in self.relays()) == len(self.clients)

    def check_listeners(self) -> None:
        assert self.reconciler.failures.keys() == (
            self.occupied.keys() & self.reconciler.desired.host.listeners.keys()
        )
        assert self.reconciler.observed.balancers == self.reconciler.desired.host.balancers

    def check_tables(self) -> None:
        publication = self.publication
        configs = {
            config.id: (
                config.name,
                [(ip, port) for ip, port, _ in config.endpoints],
                [row for _, _, row in config.endpoints],
                config.affinity_seconds,
            )
            for config in publication._configs.values()
        }
        holders: Counter[int] = Counter()
        for index, program in self.crew.programs.items():
            table = {
                number: (
                    balancer.name,
                    [endpoint.address for endpoint in balancer.endpoints],
                    [endpoint.slot for endpoint in balancer.endpoints],
                    balancer.affinity_seconds,
                )
                for number, balancer in program._balancers.items()
            }
            assert table == configs
            expected = {
                held.id: (
                    f"{key.ip}:{key.port}",
                    publication._configs[held.spec.balancer].id,
                    _inode(held.socket),
                )
                for key, held in publication.held.items()
                if held.owner in (None, index)
            }
            assert {
                number: (
                    listener.address,
                    next(n for n, one in program._balancers.items() if one is listener.balancer),
                    _inode(listener._socket),
                )
                for number, listener in program._listeners.items()
            } == expected
            assert not any(listener.closed for listener in program._listeners.values())
            holders.update(inode for _, _, inode in expected.values())
            ending = {
                number for number, (_, workers) in self.reconciler.relayed().items() if index in workers
            }
            draining = {number for number, one in program._closed.items() if one.open_relays}
            assert ending == draining
        # Nobody has a duplicate of anything else, and nobody has two.
        mine = Counter(_inode_of(name) for name in _sockets())
        for held in publication.held.values():
            assert mine[_inode(held.socket)] == 1 + holders[_inode(held.socket)]

    def check_clients(self) -> None:
        for client in self.clients:
            assert client.due is None or client.due > self.loop.now - 1.0, "it had its time"
            client.sock.send(b"x")
            self.loop.until(lambda client=client: _read(client.backend) == b"x")

    def teardown(self) -> None:
        failed = sys.exc_info()[0] is not None  # what is found here would only hide it
        try:
            if not failed:
                self.settle()
                self.end()
        finally:
            self.reconciler.close_listeners()
            self.crew.kill()
            for program in self.crew.programs.values():
                program.stop(1)
            self.slots.close()
            for sock in (*self.backends, *self.occupied.values()):
                sock.close()
            for client in self.clients:
                client.close()
            self.loop.close()
            self.patches.undo()
        assert failed or _sockets() == self.descriptors, "whatever was opened is closed"

    def end(self) -> None:
        """What was in the way goes; relays have their time; then all Services go, and the program ends."""
        self.they_give_back_what_they_took()
        self.loop.advance(DRAIN + 1.0)
        self.settle()
        self.services.clear()
        self.reconcile()
        self.settle()
        assert not self.publication.held
        self.loop.advance(DRAIN + 1.0)
        self.loop.until(lambda: not any(True for _ in self.relays()))
        self.loop.turn(3)
        assert not self.reconciler.relayed()
        book = self.publication._rows
        assert not book._owned
        assert not self.publication._counted
        self.reconciler.close_listeners()
        self.crew.kill()
        self.loop.until(lambda: all(program._stopped for program in self.crew.programs.values()))


def _listen() -> socket.socket:
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    return sock


def _read(sock: socket.socket) -> bytes:
    try:
        return sock.recv(10)
    except BlockingIOError:
        return b""


def _inode(sock: Any) -> int:
    return os.fstat(sock.fileno()).st_ino


def _inode_of(name: str) -> int:
    return int(name.removeprefix("socket:[").removesuffix("]")) if name.startswith("socket:[") else 0


def _sockets() -> list[str]:
    """Every descriptor of this process that is no file, each as often as it is there."""
    found = []
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208 - a thousand times
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))  # noqa: PTH115 - as above
    return sorted(target for target in found if not target.startswith("/") or target.startswith("/memfd"))


@pytest.mark.timeout(900)  # a failure is made smaller before it is shown
class TestControlAndWorkers(ControlAndWorkers.TestCase):
    settings = settings(
        max_examples=5000 if os.environ.get("PROXYD_TEST_LONG") else 200,
        stateful_step_count=40,
        deadline=None,
        phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
