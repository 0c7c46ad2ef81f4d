"""UDP listeners: each has its clients' flows, finds the flow of a datagram and sends it on.

A listener is bound to one address, so that its replies leave from the address the client used, on any node. It belongs
to one worker alone. What it takes many datagrams at a time from its socket is in `udp_vector`, a flow in `udp_flow`, what
all flows of a worker share in `udp_table`.
"""

from __future__ import annotations

import errno
import os
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory
from collections import deque
from time import monotonic

from proxyd.relay.engine.accepting import SourceRanges
from proxyd.relay.engine.balancer import Balancer
from proxyd.relay.engine.plane import PAUSE_SECONDS, Plane
from proxyd.relay.engine.poller import IN
from proxyd.relay.ipc.messages import ListenerConfig
from proxyd.relay.ipc.slots import DROPPED, DROPPED_OVERRUN, OPENED, REFUSED
from proxyd.relay.udp import gso
from proxyd.relay.udp.figures import overruns
from proxyd.relay.udp.flow import Flow
from proxyd.relay.udp.mmsg import SLOTS, ClientKey, ClientName, client_address, client_key
from proxyd.relay.udp.postponed import Postponed
from proxyd.relay.udp.table import LEAVE_SECONDS, FlowTable, Victim
from proxyd.relay.udp.upstream import TALKING

# Batches of a single datagram after which datagrams are taken singly, which costs less as long as they come singly.
PATIENCE = 4
_U32 = (1 << 32) - 1
_NOTHING = frozenset({errno.EAGAIN, errno.EINTR})


class UdpListener:
    """Forwards the datagrams of one socket.

    Args:
        config: what control said.
        fd: the socket; owned by the listener from now on.
        balancer: of new flows.
        plane: of the worker.

    Raises:
        OSError: not a socket, or no room to watch it.
    """

    def __init__(self, config: ListenerConfig, fd: int, balancer: Balancer, plane: Plane) -> None:
        self.id = config.id
        self.address = config.address
        self.plane = plane
        self._poller = plane.poller
        self.closed = False
        self.flows: dict[ClientKey, Flow] = {}
        self.named: dict[ClientName, Flow] = {}  # of them the conversations
        self.fd = fd
        self.table = table = flow_table(plane)
        self._balancer = balancer
        self._ranges = SourceRanges.of(config, plane.reporter)
        self._until: float | None = None  # while only replies under way are waited for
        self.victims: deque[Victim] = deque()  # of its flows those that make room for others next
        self.postponed = Postponed(plane.poller, self._later)
        self._last_turn = 0
        self._batches = 0  # to be tried yet, of which none has had two datagrams
        self._socket = Socket(fileno=fd)
        self.sendto = self._socket.sendto
        self._receive = self._socket.recvfrom_into
        try:
            self._socket.setblocking(False)
            self._vector = table.receiver(self._socket.family)
            self._view = self._vector.views[0]
            self.sender = table.sender(self._socket.family)
            plane.poller.add(fd, self._ready_for_trains if gso.started(self._socket) else self._ready, IN)
        except OSError:
            self._socket.close()
            raise
        self._overruns = overruns(self._socket)
        before = table.listeners.get(self.address)
        table.listeners[self.address] = self
        if before is not None:
            self._take_over(before)

    @property
    def open_relays(self) -> int:
        """How many flows it has."""
        return len(self.flows) + sum(flow.listener is self for flow in self.table.leaving)

    @property
    def balancer(self) -> Balancer:
        """Of new flows. Those of another balancer end when it is set."""
        return self._balancer

    @balancer.setter
    def balancer(self, balancer: Balancer) -> None:
        if balancer is not self._balancer:
            self._balancer = balancer
            for flow in list(self.flows.values()):
                flow.leave()

    def endpoints_changed(self) -> None:
        """Let go of the flows to endpoints that were removed: their clients' next datagrams go to others."""
        for flow in [flow for flow in self.flows.values() if flow.endpoint is None or flow.endpoint.removed]:
            flow.leave()

    def first(self, key: ClientKey, data: memoryview | bytes) -> None:
        """Begin a flow with a client's datagram."""
        balancer = self._balancer
        counters = self.plane.counters
        if not balancer.endpoints or (
            self._ranges is not None and not self._ranges.admit(client_address(key)[0])
        ):
            counters[balancer.row + REFUSED] += 1
            return
        table = self.table
        table.make_room(self)
        table.opened()
        flow = self.flows[key] = Flow(self, key)
        counters[balancer.row + OPENED] += 1
        if flow.dial(data):
            flow.datagrams_in = 1
            flow.bytes_in = len(data)

    def _later(self, key: ClientKey, data: bytes) -> None:
        """Send on what was postponed."""
        if self.closed or self._until is not None or self.table.listeners.get(self.address) is not self:
            self.plane.counters[self._balancer.row + DROPPED] += 1
            return
        flow = self.flows.get(key)
        if flow is None:
            self.first(key, data)
        else:
            flow.forward(data)

    def count(self) -> None:
        """Bring the counter of datagrams that found the receive buffer full up to date."""
        lost = overruns(self._socket)
        if lost == self._overruns:
            return
        self.plane.counters[self._balancer.row + DROPPED_OVERRUN] += (lost - self._overruns) & _U32
        self._overruns = lost
        self.plane.reporter.trouble(
            f"listener {self.address}: datagrams came faster than they could be sent on: some were dropped"
        )

    def flow_ended(self) -> None:
        """Close, where the last flow was all that was waited for."""
        if self._until is not None and not self.open_relays:
            self.close()

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close at once, with all flows: the port must be free, and clients must see that nobody is there."""
        if self.closed:
            return
        if self.table.listeners.get(self.address) is self:
            self.count()
            del self.table.listeners[self.address]
        self.closed = True
        for flow in [*self.flows.values(), *(f for f in self.table.leaving if f.listener is self)]:
            flow.finish("drained")
        self.sender.end()  # the number may be another socket's next
        self.plane.poller.close_shared(self._socket)
        self.plane.reporter.drained(self.id)
        if self._until is not None:
            self._until = None
            self.plane.closed(self)

    def linger(self, seconds: float) -> bool:
        """Take no more datagrams, and close when the replies under way have come, at most LEAVE_SECONDS from now.

        Returns:
            Whether there is anything to wait for; else it is closed.
        """
        for flow in list(self.flows.values()):
            flow.leave()
        if seconds <= 0 or not self.open_relays:
            self.close()
            return False
        self._until = monotonic() + min(seconds, LEAVE_SECONDS)
        self.plane.poller.modify(self.fd, 0)
        self.plane.opened(self)
        return True

    def tick(self, now: float) -> None:
        """Close when it has waited long enough. Called once a second while it lingers."""
        if self._until is not None and now >= self._until:
            self.close()

    def dial_due(self, now: float) -> None:
        """Nothing is dialled."""

    def crash(self) -> None:
        """Go on: an internal error costs the datagrams of one batch."""

    def _take_over(self, before: UdpListener) -> None:
        """Go on with the flows of a listener that this one replaces, where they still are what was wished for."""
        before.plane.poller.modify(before.fd, 0)
        before.count()
        self._overruns = before._overruns
        if before.balancer is not self._balancer:
            return
        for key, flow in list(before.flows.items()):
            if self._ranges is None or self._ranges.admit(flow.client_ip):
                del before.flows[key]
                self.flows[key] = flow
                flow.adopted(self)
                if flow.name is not None:
                    self.named[flow.name] = flow

    # -- client to endpoint ---------------------------------------------------------------------------------------

    def _ready(self, _events: int) -> None:
        """Send on a datagram, or a batch of them where there have been some lately.

        Level-triggered: what is left is reported again, after everybody else had a turn.
        """
        if self._batches:
            self._batch()
            return
        turn = self._poller.turns
        if turn == self._last_turn + 1:
            self._batches = PATIENCE
        self._last_turn = turn
        try:
            size, name = self._receive(self._view)
        except OSError as error:
            self._receive_failed(error)
            return
        data = self._view[:size]
        flow = self.named.get(name)
        if flow is None:
            self._unnamed(name, data)
            return
        flow.used = self.table.clock
        send = flow.send  # an attribute, not a method: so the interpreter finds it faster
        try:
            send(data)
        except OSError as error:
            flow.send_failed(error, data)
            return
        flow.bytes_in += size
        flow.datagrams_in += 1

    def _unnamed(self, name: ClientName, data: memoryview) -> None:
        """Send on a single datagram of a client that has no conversation."""
        key = client_key(name)
        flow = self.flows.get(key)
        if flow is None:
            self.first(key, data)
        else:
            flow.forward(data)

    def _batch(self) -> None:
        """Send on a batch."""
        vector = self._vector
        try:
            sizes = vector.receive(self.fd)
        except OSError as error:
            self._receive_failed(error)
            return
        if len(sizes) > 1:
            self._batches = PATIENCE
            if len(sizes) >= gso.LENGTH and sizes[0] == sizes[1] >= gso.BULK_BYTES:
                self._bulk(len(sizes))
        else:
            self._batches -= 1
        find = self.flows.get
        views = vector.views
        words = vector.words
        clock = self.table.clock
        v6 = vector.v6
        slot = 0
        for size in sizes:
            key = vector.key(slot) if v6 else words[slot * 4]
            data = views[slot][:size]
            slot += 1
            flow = find(key)
            if flow is None:
                self.first(key, data)
                continue
            if flow.stage != TALKING:
                flow.early(data)
            flow.used = clock
            send = flow.send
            try:
                send(data)
            except OSError as error:
                flow.send_failed(error, data)
                continue
            flow.bytes_in += size
            flow.datagrams_in += 1

    def _bulk(self, count: int) -> None:
        """Receive trains from now on if the batch is one client's."""
        key = self._vector.key
        if key(0) == key(count // 2) == key(count - 1) and gso.start(self._socket):
            self._poller.handlers[self.fd] = self._ready_for_trains

    def _ready_for_trains(self, _events: int) -> None:
        """Send on a datagram, or some if it has been ready turn after turn; each may be a train."""
        turn = self._poller.turns
        more = turn == self._last_turn + 1
        self._last_turn = turn
        taken = 0
        for _ in range(SLOTS if more else 1):
            try:
                size, control, _flags, name = self._socket.recvmsg_into([self._view], gso.CONTROL_BYTES)
            except OSError as error:
                self._last_turn = 0
                self._receive_failed(error)
                return
            data = self._view[:size]
            segment = gso.segment_of(control) if control else 0
            if 0 < segment < size:
                flow = self.named.get(name)
                if flow is None or not flow.forward_train(data, segment):
                    for part in gso.parts(data, segment):
                        self._one(name, part)
                taken += size
                if taken > gso.TURN_BYTES:
                    return
            else:
                self._one(name, data)

    def _one(self, name: ClientName, data: memoryview) -> None:
        flow = self.named.get(name)
        if flow is None:
            self._unnamed(name, data)
        else:
            flow.forward(data)

    def send_train(self, train: memoryview, segment: int, name: ClientName) -> int:
        """Send a train to a client; how many of its datagrams the kernel did not take."""
        try:
            self._socket.sendmsg([train], gso.control_for(segment), 0, name)
        except OSError:
            lost = 0
            for part in gso.parts(train, segment):
                try:
                    self.sendto(part, name)
                except OSError:
                    lost += 1
            return lost
        return 0

    def _receive_failed(self, error: OSError) -> None:
        if error.errno in _NOTHING:
            return
        self.plane.reporter.trouble(
            f"listener {self.address}: can't receive: {os.strerror(error.errno or 0)}"
        )
        self._poller.modify(self.fd, 0)
        self.plane.loop.call_later(PAUSE_SECONDS, self._resume)

    def _resume(self) -> None:
        """Receive again after a pause."""
        if not self.closed and self._until is None and self.table.listeners.get(self.address) is self:
            self._poller.modify(self.fd, IN)


def flow_table(plane: Plane) -> FlowTable:
    """The flow table of a worker, made with its first UDP listener."""
    if plane.flow_table is None:
        plane.flow_table = FlowTable(plane, plane.udp_idle_seconds, plane.workers)
    return plane.flow_table
