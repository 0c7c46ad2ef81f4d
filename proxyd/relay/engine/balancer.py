"""Chooses the endpoint of each new relay, by round robin or ClientIP affinity; no sockets, no clock."""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable, MutableSequence

from proxyd.relay.ipc.messages import address_text

# Clients that one balancer's affinity table remembers; the longest unused go first.
MAX_CLIENTS = 65_536
# How long an endpoint that has just failed is passed over, where there is another.
SUSPECT_SECONDS = 1.0
# Suspects that are passed over in one choice: of thousands of dead endpoints not all can be looked at.
MAX_PASSED = 64

_WRAP = (1 << 64) - 1


class Endpoint:
    """One backend of one balancer. `row` is its first counter in the slots' view.

    An endpoint that was removed is never used again: if it comes back, it is another object.
    """

    __slots__ = ("address", "answered", "family", "further", "removed", "row", "slot")

    def __init__(self, ip: str, port: int, slot: int, row: int) -> None:
        self.address = (ip, port)
        self.family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        self.slot = slot
        self.row = row
        self.removed = False
        self.further: tuple[str, ...] = ()  # SCTP: its other addresses, of the same port
        self.answered = 0  # SCTP: index of the address that answered last

    def __str__(self) -> str:
        return address_text(*self.address)


class _Client:
    """A client address: its endpoint, when it was last used, and how many relays it has."""

    __slots__ = ("endpoint", "relays", "used")

    def __init__(self, endpoint: Endpoint, used: float) -> None:
        self.endpoint = endpoint
        self.used = used
        self.relays = 0


class Balancer:
    """Chooses among `endpoints`. Times are seconds of any one monotonic clock.

    Args:
        name: of the service port, namespace/name:port.
        positions: shared round-robin positions; `positions[slot]` is this balancer's.
        slot: see `positions`.
        row: first counter of this balancer in the slots' view.
    """

    __slots__ = (
        "_clients",
        "_positions",
        "_slot",
        "affinity_seconds",
        "endpoints",
        "name",
        "row",
        "suspects",
        "udp_idle_seconds",
    )

    def __init__(self, name: str, positions: MutableSequence[int] | memoryview, slot: int, row: int) -> None:
        self.name = name
        self.row = row
        self.endpoints: tuple[Endpoint, ...] = ()
        self.affinity_seconds = 0
        self.udp_idle_seconds: float | None = None  # of its UDP flows; None: as the worker has it
        self.suspects: dict[Endpoint, float] = {}  # until when to pass over
        self._positions = positions
        self._slot = slot
        self._clients: dict[str, _Client] = {}  # the longest unused first

    def update(self, endpoints: Iterable[Endpoint], affinity_seconds: int) -> None:
        """Put other endpoints in force, all at once. Those that stay keep their object and their clients."""
        before = {(e.address, e.slot): e for e in self.endpoints}
        after = tuple(before.pop((e.address, e.slot), e) for e in endpoints)
        for endpoint in before.values():
            endpoint.removed = True
            self.suspects.pop(endpoint, None)
        self.endpoints = after
        self.affinity_seconds = affinity_seconds
        if not affinity_seconds:
            self._clients.clear()

    def pick(self, client: str, now: float, tried: Collection[Endpoint] = ()) -> Endpoint | None:
        """The endpoint for one more relay of this client address; None where all there are were tried."""
        if self.affinity_seconds:
            return self._sticky(client, now, tried)
        endpoints = self.endpoints
        if not endpoints:
            return None
        if self.suspects or tried:
            return self._next(now, tried)
        position = self._positions[self._slot]
        self._positions[self._slot] = (position + 1) & _WRAP
        return endpoints[position % len(endpoints)]

    def failed(self, client: str, endpoint: Endpoint, now: float) -> None:
        """Note that dialling `endpoint` failed: others go first for a while, and the client may change."""
        if not endpoint.removed:
            self.suspects[endpoint] = now + SUSPECT_SECONDS
        known = self._clients.get(client)
        if known is not None and known.endpoint is endpoint:
            del self._clients[client]

    def ended(self, client: str, endpoint: Endpoint, now: float) -> None:
        """Note that a relay with affinity has ended: if it was the client's last, its idle time begins."""
        known = self._clients.get(client)
        if known is not None and known.endpoint is endpoint:
            known.relays = max(known.relays - 1, 0)
            self._touch(client, known, now)

    def _next(self, now: float, tried: Collection[Endpoint]) -> Endpoint | None:
        """The next by round robin that was not tried, and no suspect where there are others."""
        endpoints = self.endpoints
        positions, slot, suspects = self._positions, self._slot, self.suspects
        fallback = None
        passed = 0
        for _ in endpoints:
            position = positions[slot]
            positions[slot] = (position + 1) & _WRAP
            endpoint = endpoints[position % len(endpoints)]
            if endpoint in tried:
                continue
            until = suspects.get(endpoint)
            if until is None:
                return endpoint
            if until <= now:
                del suspects[endpoint]
                return endpoint
            fallback = fallback or endpoint
            passed += 1
            if passed == MAX_PASSED:
                break
        return fallback

    def _sticky(self, client: str, now: float, tried: Collection[Endpoint]) -> Endpoint | None:
        known = self._clients.get(client)
        if known is not None and (
            known.endpoint.removed or known.endpoint in tried or self._expired(known, now)
        ):
            del self._clients[client]
            known = None
        if known is None:
            endpoint = self._next(now, tried)
            if endpoint is None:
                return None
            self._make_room(now)
            known = self._clients[client] = _Client(endpoint, now)
        known.relays += 1
        self._touch(client, known, now)
        return known.endpoint

    def _touch(self, client: str, known: _Client, now: float) -> None:
        known.used = now
        del self._clients[client]
        self._clients[client] = known

    def _expired(self, known: _Client, now: float) -> bool:
        return not known.relays and now - known.used >= self.affinity_seconds

    def _make_room(self, now: float) -> None:
        """Forget up to two clients whose time is over, so that the table shrinks; if full, the oldest."""
        for _ in range(2):
            oldest = next(iter(self._clients), None)
            if oldest is None:
                return
            known = self._clients[oldest]
            if not self._expired(known, now) and not known.endpoint.removed:
                break
            del self._clients[oldest]
        if len(self._clients) >= MAX_CLIENTS:
            del self._clients[next(iter(self._clients))]

    def __len__(self) -> int:
        """How many clients are remembered."""
        return len(self._clients)
