"""UDP listeners: who gets a flow, and what becomes of flows when the listener or its endpoints change.

A listener is bound to one address, so that replies come from the address that the client used, on any node.
It belongs to one worker alone. `receiver` reads its socket, `flow` is the life of a flow, `table` is shared
by all flows of a worker.
"""

from __future__ import annotations

from collections import deque

from proxyd.relay.engine.accepting import SourceRanges
from proxyd.relay.engine.balancer import Balancer
from proxyd.relay.engine.plane import Plane
from proxyd.relay.ipc.messages import ListenerConfig
from proxyd.relay.ipc.slots import DROPPED, DROPPED_OVERRUN, OPENED, REFUSED
from proxyd.relay.udp.flow import Flow
from proxyd.relay.udp.mmsg import ClientKey, client_address, overruns
from proxyd.relay.udp.postponed import Postponed
from proxyd.relay.udp.receiver import Receiver
from proxyd.relay.udp.table import DRAIN_SECONDS, Listener, Victim, flow_table

_U32 = (1 << 32) - 1


class UdpListener(Receiver):
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
        self.closed = False
        self.balancer = balancer
        self._ranges = SourceRanges.of(config, plane.reporter)
        self._until: float | None = None  # while it lingers: when to stop waiting for replies
        self.victims: deque[Victim] = deque()  # those of its flows that make room for others next
        self.postponed = Postponed(plane.poller, self._later)
        super().__init__(config.address, fd, flow_table(plane))
        self.gso = config.gso
        self.overruns = overruns(self._socket)  # as counted so far
        before = self.table.listeners.get(self.address)
        self.table.listeners[self.address] = self
        if before is not None:
            self._take_over(before)

    @property
    def open_relays(self) -> int:
        """How many flows it has."""
        return len(self.flows) + sum(flow.listener is self for flow in self.table.draining)

    def endpoints_changed(self) -> None:
        """Drain the flows to endpoints that were removed: their clients' next datagrams go to others."""
        for flow in [flow for flow in self.flows.values() if flow.endpoint is None or flow.endpoint.removed]:
            flow.drain()

    def open_flow(self, key: ClientKey, data: memoryview | bytes) -> None:
        """Begin a flow with a client's datagram."""
        balancer = self.balancer
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
        """Send a postponed datagram on."""
        if not self.receives():
            self.plane.counters[self.balancer.row + DROPPED] += 1
            return
        flow = self.flows.get(key)
        if flow is None:
            self.open_flow(key, data)
        else:
            flow.forward(data)

    def receives(self) -> bool:
        """Whether it takes datagrams: not when it is closed or lingers, or another has taken over."""
        return not self.closed and self._until is None and self.table.listeners.get(self.address) is self

    def count(self) -> None:
        """Bring the counter up to date of datagrams that found the receive buffer full."""
        lost = overruns(self._socket)
        if lost == self.overruns:
            return
        self.plane.counters[self.balancer.row + DROPPED_OVERRUN] += (lost - self.overruns) & _U32
        self.overruns = lost
        self.plane.reporter.trouble(
            f"listener {self.address}: datagrams came faster than they could be sent on: some were dropped"
        )

    def flow_ended(self) -> None:
        """Close if it lingers and this was its last flow."""
        if self._until is not None and not self.open_relays:
            self.close()

    # -- the end ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close at once, with all flows: the port must be free, and clients must see that nobody is there."""
        if self.closed:
            return
        if self.table.listeners.get(self.address) is self:
            self.count()
            del self.table.listeners[self.address]
        self.closed = True
        for flow in [*self.flows.values(), *(f for f in self.table.draining if f.listener is self)]:
            flow.finish("drained")
        self.sender.end()  # the number may be another socket's next
        self.plane.poller.close_shared(self._socket)
        self.plane.reporter.drained(self.id)
        if self._until is not None:
            self._until = None
            self.plane.closed(self)

    def linger(self, seconds: float) -> bool:
        """Take no more datagrams, and close when the replies under way have come, in DRAIN_SECONDS at most.

        Returns:
            Whether there is anything to wait for; otherwise it is closed.
        """
        for flow in list(self.flows.values()):
            flow.drain()
        if seconds <= 0 or not self.open_relays:
            self.close()
            return False
        self._until = self.plane.now() + min(seconds, DRAIN_SECONDS)
        self.plane.poller.modify(self.fd, 0)
        self.plane.opened(self)
        return True

    def tick(self, now: float) -> None:
        """Close when it has waited long enough. The plane calls this once a second while it lingers."""
        if self._until is not None and now >= self._until:
            self.close()

    def dial_due(self, now: float) -> None:
        """Nothing is dialled."""

    def crash(self) -> None:
        """Go on: an internal error costs the datagrams of one batch."""

    def _take_over(self, before: Listener) -> None:
        """Go on with the flows of the listener that this one replaces, where they may have one here too."""
        self.plane.poller.modify(before.fd, 0)
        before.count()
        self.overruns = before.overruns
        if before.balancer is not self.balancer:
            return
        for key, flow in list(before.flows.items()):
            if self._ranges is None or self._ranges.admit(flow.client_ip):
                del before.flows[key]
                self.flows[key] = flow
                flow.adopted(self)
                if flow.name is not None:
                    self.named[flow.name] = flow
