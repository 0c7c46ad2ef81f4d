"""What the workers know: balancers and listeners by number, and the updates from one state to the next."""

from __future__ import annotations

import contextlib
import itertools
import socket
import zlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from proxyd.api.service import Protocol
from proxyd.control.workers.slot_allocator import SlotAllocator
from proxyd.relay import registry
from proxyd.relay.ipc.messages import MAX_DESCRIPTORS, Apply, BalancerConfig, CloseListener, ListenerConfig
from proxyd.relay.ipc.slots import FIELDS, MAX_SLOTS, Slots
from proxyd.state.spec import (
    BalancerKey,
    BalancerSpec,
    Endpoint,
    Home,
    ListenerKey,
    ListenerSpec,
    ServicePortName,
)

_T = TypeVar("_T")
_Config = TypeVar("_Config", BalancerConfig, ListenerConfig)

# Endpoints of one balancer, as it must fit into one message: of IPv4, and where addresses may be of IPv6.
# Further ones are left out. Kubernetes caps Endpoints at 1,000.
MAX_ENDPOINTS = 4000
_MAX_LONG_ENDPOINTS = 2300
# Bytes that configurations may take of one message; MAX_BYTES leaves room for the rest. One takes at most so
# many for itself, names included, and for each endpoint, whose address may be an IPv6 one in full.
_PART_BYTES = 120_000
_CONFIG_BYTES = 200
_ENDPOINT_BYTES = 51


@dataclass(slots=True, eq=False)
class Held:
    """One listening socket and its number in the workers. `owner` is the one worker that has it; None: all.

    `specs` are all listeners that the socket serves, several for a multi-homed SCTP endpoint; `spec` is the
    first.
    """

    id: int
    socket: socket.socket
    spec: ListenerSpec
    owner: int | None
    specs: dict[ListenerKey, ListenerSpec]
    gso: bool = True  # UDP: as in `ListenerConfig`


@dataclass(slots=True, eq=False)
class Retired:
    """A closed listener whose relays may live on in its worker (`owner`; None: in all workers).

    `drains`: the relays end after the drain time in any case. `keys`: the addresses that they use.
    """

    id: int
    spec: ListenerSpec
    owner: int | None
    drains: bool
    keys: tuple[ListenerKey, ...]


@dataclass(slots=True)
class Update:
    """What changed since the last generation. In `close` each listener has its owner; None: all workers."""

    generation: int
    balancers: list[BalancerConfig] = field(default_factory=list)
    listeners: dict[int, Held] = field(default_factory=dict)  # by number
    close: list[tuple[CloseListener, int | None]] = field(default_factory=list)
    drop_balancers: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.balancers or self.listeners or self.close or self.drop_balancers)


class Publication:
    """The listeners and balancers in force, and the update under construction.

    Its only I/O is to close sockets: the supervisor carries updates to the workers.
    """

    def __init__(self, slots: Slots, workers: int) -> None:
        self._slots = slots
        self._workers = max(workers, 1)
        self._rows = SlotAllocator(slots)
        self._ids = itertools.count(1)
        # For balancers that found no row free: they share the spare one, but workers have to tell them apart.
        self._rowless = itertools.count(MAX_SLOTS)
        self._configs: dict[BalancerKey, BalancerConfig] = {}
        self._specs: dict[BalancerKey, BalancerSpec] = {}
        self._counted: dict[ServicePortName, set[BalancerKey]] = {}
        self.held: dict[ListenerKey, Held] = {}
        self._homes: dict[Home, Held] = {}
        self.generation = 0
        self._update = Update(1)
        self._retired: list[Retired] = []

    def set_balancer(self, spec: BalancerSpec) -> None:
        """Add a balancer, or change its endpoints and affinity."""
        key = spec.key
        old = self._specs.get(key)
        if old is not None:
            for endpoint in set(old.endpoints).difference(spec.endpoints):
                self._rows.give_back((key, endpoint))
        endpoints = _those_that_fit(spec)
        config = BalancerConfig(
            id=self._number(key),
            name=str(key.service_port),
            endpoints=[(e.ip, e.port, self._rows.take((key, e))) for e in endpoints],
            affinity_seconds=spec.affinity_seconds,
            udp_idle_seconds=spec.udp_idle_seconds,
            further={e.ip: list(spec.further[e.ip]) for e in endpoints if e.ip in spec.further},
        )
        self._specs[key] = spec
        self._configs[key] = config
        self._counted.setdefault(key.service_port, set()).add(key)
        self._update.balancers.append(config)
        if old is not None and bool(old.affinity_seconds) != bool(spec.affinity_seconds):
            # With affinity one worker owns the listeners, without it all do.
            for held in [held for held in self._sockets() if held.spec.balancer == key]:
                self._reissue(held, held.spec, None)

    def _number(self, key: BalancerKey) -> int:
        known = self._configs.get(key)
        return known.id if known is not None else self._rows.take(key) or next(self._rowless)

    def drop_balancer(self, key: BalancerKey) -> None:
        """Remove a balancer. Its key keeps the counters and the round-robin position until `forget`."""
        config, spec = self._configs.pop(key), self._specs.pop(key)
        for endpoint in spec.endpoints:
            self._rows.give_back((key, endpoint))
        self._update.drop_balancers.append(config.id)

    def forget(self, key: BalancerKey) -> None:
        """Free the counters of a balancer whose service port is gone."""
        self._rows.give_back(key)
        keys = self._counted.get(key.service_port, set())
        keys.discard(key)
        if not keys:
            self._counted.pop(key.service_port, None)

    def open(self, spec: ListenerSpec, sock: socket.socket, *, gso: bool = True) -> None:
        """Publish a listener, and own its socket from now on. `gso` is as in `ListenerConfig`."""
        held = Held(next(self._ids), sock, spec, self._owner(spec), {spec.key: spec}, gso)
        self._hold(held)
        self._update.listeners[held.id] = held

    def join(self, spec: ListenerSpec, held: Held) -> None:
        """Add an address to an open socket."""
        held.specs[spec.key] = spec
        self.held[spec.key] = held

    def leave(self, key: ListenerKey) -> None:
        """Remove an address from a socket that has others."""
        held = self.held.pop(key)
        del held.specs[key]
        if held.spec.key == key:
            held.spec = next(iter(held.specs.values()))

    def home(self, home: Home) -> Held | None:
        """The socket of a multi-homed SCTP endpoint; None if it is not open."""
        return self._homes.get(home)

    def change(self, spec: ListenerSpec, drain: float | None) -> None:
        """Give an open listener another spec; the socket stays.

        Args:
            spec: has the same key.
            drain: seconds after which relays that began under the old spec are ended; None: they stay.
        """
        held = self.held[spec.key]
        if held.spec.key == spec.key:
            self._reissue(held, spec, drain)
        else:
            # Workers know only the first of several specs, and are told of the change with that one.
            held.specs[spec.key] = spec

    def set_gso(self, key: ListenerKey, *, gso: bool) -> None:
        """Say otherwise of an open listener whether `gso` holds for it."""
        held = self.held[key]
        if held.gso != gso:
            held.gso = gso
            self._reissue(held, held.spec, None)

    def supersede(self, spec: ListenerSpec, sock: socket.socket) -> Held:
        """Give a listener another socket. Returns the old one, which accepts until `close_superseded`."""
        old = self.held[spec.key]
        held = Held(next(self._ids), sock, spec, self._owner(spec), dict(old.specs), old.gso)
        self._hold(held)
        self._update.listeners[held.id] = held
        return old

    def close_superseded(self, old: Held) -> None:
        """Close the old socket of a listener that has another. Its relays stay."""
        self._retire(old, None)
        old.socket.close()

    def close(self, key: ListenerKey, drain: float | None) -> None:
        """Close a listener and all others of its socket. `drain` is as in `change`."""
        held = self.held[key]
        for one in held.specs:
            del self.held[one]
        if held.spec.home is not None:
            del self._homes[held.spec.home]
        self._retire(held, drain)
        close_listening(held.socket)

    def drain(self, retired: Retired, seconds: float) -> None:
        """Have the workers end a closed listener's relays after that many seconds."""
        retired.drains = True
        self._update.close.append((CloseListener(retired.id, seconds), retired.owner))

    def take_retired(self) -> list[Retired]:
        """The listeners that workers knew, and that were closed or renumbered since the last call."""
        retired, self._retired = self._retired, []
        return retired

    def close_all(self) -> None:
        """Close every socket, without telling the workers."""
        for held in self._sockets():
            close_listening(held.socket)
        self.held.clear()
        self._homes.clear()

    def take_update(self) -> Update:
        """What changed since the last call. If anything did, it is a new generation."""
        update = self._update
        if update:
            self.generation = update.generation
            self._update = Update(update.generation + 1)
        return update

    def full(self) -> Update:
        """Everything in force, for a new worker. Call it while no update is under construction."""
        return Update(
            self.generation,
            balancers=list(self._configs.values()),
            listeners={held.id: held for held in self._sockets()},
        )

    def row(self, owner: Hashable) -> list[int]:
        """All counters of a balancer or a (balancer, endpoint); zeros if it has no row. Safe from any thread.

        They are in the order of `proxyd.relay.ipc.slots`, each summed over the workers.
        """
        slot = self._rows.get(owner)
        return [0] * FIELDS if slot is None else self._slots.read(slot, self._workers)

    def balancer_keys(self, service_port: ServicePortName) -> frozenset[BalancerKey]:
        """The balancers of a service port that have counters, those that were dropped included."""
        return frozenset(self._counted.get(service_port, ()))

    def rows(self) -> range:
        """Every row that may hold counts."""
        return self._rows.rows()

    def listener_config(self, held: Held) -> ListenerConfig:
        """A listener as workers are told of it."""
        spec = held.spec
        host = f"[{spec.key.ip}]" if ":" in spec.key.ip else spec.key.ip
        return ListenerConfig(
            id=held.id,
            balancer=self._configs[spec.balancer].id,
            protocol=str(spec.key.protocol),
            address=f"{host}:{spec.key.port}",
            source_ranges=list(spec.source_ranges),
            implementation=registry.find().classes.get(spec.key.protocol, ""),
            gso=held.gso,
        )

    def parts(self, update: Update, worker: int) -> Iterator[tuple[Apply, list[Held]]]:
        """An update as messages for one worker, each small enough for one datagram.

        Each message comes with the listeners whose descriptors travel beside it.
        """
        listeners = [held for held in update.listeners.values() if held.owner in (None, worker)]
        close = [one for one, owner in update.close if owner in (None, worker)]
        for balancers in _by_weight(update.balancers):
            yield Apply(update.generation, last=False, balancers=balancers), []
        for some in _chunks(listeners, MAX_DESCRIPTORS):
            first = 0
            for configs in _by_weight([self.listener_config(held) for held in some]):
                these = some[first : first + len(configs)]
                yield Apply(update.generation, last=False, listeners=configs), these
                first += len(these)
        for closing in _chunks(close, 2000):
            yield Apply(update.generation, last=False, close=closing), []
        for ids in _chunks(update.drop_balancers, 2000):
            yield Apply(update.generation, last=False, drop_balancers=ids), []
        yield Apply(update.generation, last=True), []

    def _hold(self, held: Held) -> None:
        for key in held.specs:
            self.held[key] = held
        if held.spec.home is not None:
            self._homes[held.spec.home] = held

    def _sockets(self) -> Iterable[Held]:
        """Every open socket, each once."""
        return dict.fromkeys(self.held.values())

    def _reissue(self, held: Held, spec: ListenerSpec, drain: float | None) -> None:
        # The same socket under a new number: the backlog is kept, and old relays can be told from new ones.
        self._retire(held, drain)
        specs = {**held.specs, spec.key: spec}
        new = Held(next(self._ids), held.socket, spec, self._owner(spec), specs, held.gso)
        self._hold(new)
        self._update.listeners[new.id] = new

    def _retire(self, held: Held, drain: float | None) -> None:
        if self._update.listeners.pop(held.id, None):  # no worker has heard of it yet
            return
        self._update.close.append((CloseListener(held.id, drain), held.owner))
        keys = tuple(held.specs)
        self._retired.append(Retired(held.id, held.spec, held.owner, drains=drain is not None, keys=keys))

    def _owner(self, spec: ListenerSpec) -> int | None:
        balancer = self._specs[spec.balancer]
        if spec.key.protocol is Protocol.UDP or balancer.affinity_seconds:
            return zlib.crc32(str(spec.service_port).encode()) % self._workers
        return None


def close_listening(sock: socket.socket) -> None:
    """Close a listening socket of which workers have duplicates.

    The address is free and clients are refused at once, even while a worker is too busy to close its
    duplicate.
    """
    if sock.type == socket.SOCK_STREAM:
        with contextlib.suppress(OSError):
            if sock.proto == socket.IPPROTO_SCTP:
                sock.listen(0)  # ends listening (net/sctp/socket.c); shutdown(2) concerns associations
            else:
                sock.shutdown(socket.SHUT_RD)
    sock.close()


def still_open(message: Apply, listeners: list[Held]) -> tuple[Apply, list[int]]:
    """A message as it can be sent now, without listeners that have been closed since; and its descriptors."""
    alive = [held.socket.fileno() >= 0 for held in listeners]
    if not all(alive):
        kept = [config for config, lives in zip(message.listeners, alive, strict=True) if lives]
        message = msgspec.structs.replace(message, listeners=kept)
    return message, [held.socket.fileno() for held, lives in zip(listeners, alive, strict=True) if lives]


def _chunks(items: list[_T], size: int) -> Iterator[list[_T]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _by_weight(configs: Iterable[_Config]) -> Iterator[list[_Config]]:
    """Lists of configurations, each of which fits into one message."""
    chunk: list[_Config] = []
    total = 0
    for config in configs:
        weight = _weight(config)
        if chunk and total + weight > _PART_BYTES:
            yield chunk
            chunk, total = [], 0
        chunk.append(config)
        total += weight
    if chunk:
        yield chunk


def _weight(config: BalancerConfig | ListenerConfig) -> int:
    """How many bytes it takes at most."""
    if isinstance(config, ListenerConfig):
        return _CONFIG_BYTES + sum(3 + len(one) for one in config.source_ranges)
    addresses = len(config.endpoints)
    if config.further:
        addresses += sum(1 + len(others) for others in config.further.values())
    return _CONFIG_BYTES + _ENDPOINT_BYTES * addresses


def _those_that_fit(spec: BalancerSpec) -> Sequence[Endpoint]:
    """The endpoints that one message has room for."""
    room = MAX_ENDPOINTS if spec.key.family == 4 and not spec.further else _MAX_LONG_ENDPOINTS
    if not spec.further:
        return spec.endpoints[:room]
    fit = []
    for endpoint in spec.endpoints:
        room -= 2 + len(spec.further.get(endpoint.ip, ()))
        if room < 0:
            break
        fit.append(endpoint)
    return fit
