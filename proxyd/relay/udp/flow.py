"""The life of one UDP flow: the datagrams of one client address at one listener. `udp_upstream` has its endpoint's side."""

from __future__ import annotations

import socket
import time

from proxyd.relay.ipc.messages import Connection, LiveConnection, address_text
from proxyd.relay.ipc.slots import CLOSED
from proxyd.relay.udp import gso
from proxyd.relay.udp.mmsg import NAME6_BYTES, NAME_BYTES, SLOTS, client_address, client_name
from proxyd.relay.udp.upstream import (
    ANSWERED,
    KEPT_BYTES,
    LEAVING,
    TALKING,
    WAITING,
    FlowOwner,
    Table,
    Upstream,
)

# The receive buffer of a flow that has become a conversation.
TALKING_BUFFER = 1024 * 1024
# Replies taken from one flow in one turn once it was ready in so many turns on end. Before, it is one: another read
# would mostly find nothing, and that costs an exception.
MAX_BATCH = 16
STREAK = 4


class Flow(Upstream):
    """One client of one listener. The client's path is in `UdpListener`, the endpoint's is `ready`."""

    __slots__ = ()

    listener: FlowOwner[Flow]
    _table: Table[Flow]

    # -- client to endpoint ---------------------------------------------------------------------------------------

    def forward(self, data: memoryview | bytes) -> None:
        """Send a datagram of the client. `UdpListener` has the same written out where it does this most."""
        if self.stage != TALKING:
            self.early(data)
        self.used = self._table.clock
        try:
            self.send(data)
        except OSError as error:
            self.send_failed(error, data)
            return
        self.bytes_in += len(data)
        self.datagrams_in += 1

    def forward_train(self, train: memoryview, segment: int) -> bool:
        """Send a train of the client; False where it must go one by one."""
        if self.stage != TALKING or self._sock is None:
            return False
        self.used = self._table.clock
        try:
            self._sock.sendmsg([train], gso.control_for(segment))
        except OSError:
            return False
        self.bytes_in += len(train)
        self.datagrams_in += -(-len(train) // segment)
        return True

    def early(self, data: memoryview | bytes) -> None:
        """Take a datagram of the client on a flow that is not TALKING yet, before it is sent."""
        if self.stage == WAITING:
            self._kept = bytes(data) if len(data) <= KEPT_BYTES else None
        else:
            self.stage = TALKING
            self.name = client_name(self.key)
            self.listener.named[self.name] = self
            if self._sock is not None:
                # As large as net.core.rmem_max allows: a worker has no privilege.
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TALKING_BUFFER)

    # -- endpoint to client ---------------------------------------------------------------------------------------

    def ready(self, _events: int) -> None:
        """Take replies. They leave at the end of the batch."""
        poller = self._poller
        turn = poller.turns
        left = 1
        if turn == self._last_turn + 1:
            self._streak += 1
            if self._streak >= STREAK:
                left = MAX_BATCH
        else:
            self._streak = 0
            if poller.lone and self.stage == TALKING:
                self._last_turn = turn
                self._pass_on()
                return
        self._last_turn = turn
        vector = self._vector
        recv_into = self._recv_into
        try:
            while left:
                slot = vector.queued
                if slot == SLOTS or vector.to != self._fd:
                    vector.turn_to(self._fd, self.listener.sendto)
                    slot = 0
                size = recv_into(vector.views[slot])
                if vector.v6:
                    vector.names[slot * NAME_BYTES : slot * NAME_BYTES + NAME6_BYTES] = self.key  # type: ignore[assignment]  # bytes here
                else:
                    vector.words[slot * 4] = self.key  # type: ignore[assignment]  # int here
                vector.sizes[2 * slot + 1] = size
                vector.name = self.name
                vector.queued = slot + 1
                self.bytes_out += size
                self.datagrams_out += 1
                self.used = self._table.clock
                if self.stage != TALKING:
                    self._replied()
                    if self._sock is None:
                        return
                left -= 1
            if self._streak >= STREAK and size >= gso.BULK_BYTES:
                self._bulk()
        except BlockingIOError:
            self._streak = 0
        except OSError as error:
            self._refused(error)

    def _pass_on(self) -> None:
        """Take a reply and send it at once: it is the only one of its batch."""
        view = self._vector.views[0]
        try:
            size = self._recv_into(view)
        except BlockingIOError:
            return
        except OSError as error:
            self._refused(error)
            return
        self.bytes_out += size
        self.datagrams_out += 1
        self.used = self._table.clock
        name = self.name
        assert name is not None
        try:
            self.listener.sendto(view[:size], name)
        except OSError:
            self._vector.turn_to(self._fd, self.listener.sendto)
            self._vector.lost(1)

    def _bulk(self) -> None:
        """Receive trains from now on, of an endpoint that had filled a batch."""
        if self.name is not None and self._sock is not None and gso.start(self._sock):
            self._poller.handlers[self._sock.fileno()] = self._ready_for_trains

    def _ready_for_trains(self, _events: int) -> None:
        """Take a reply, or some if it has been ready turn after turn; each may be a train."""
        turn = self._poller.turns
        self._streak = self._streak + 1 if turn == self._last_turn + 1 else 0
        self._last_turn = turn
        vector, sock, name = self._vector, self._sock, self.name
        assert sock is not None
        assert name is not None
        taken = 0
        try:
            for _ in range(MAX_BATCH if self._streak else 1):
                slot = vector.queued
                if slot == SLOTS or vector.to != self._fd:
                    vector.turn_to(self._fd, self.listener.sendto)
                    slot = 0
                size, control, _flags, _ = sock.recvmsg_into([vector.views[slot]], gso.CONTROL_BYTES)
                segment = gso.segment_of(control) if control else 0
                if 0 < segment < size:
                    vector.flush()  # what came before it
                    vector.lost(self.listener.send_train(vector.views[slot][:size], segment, name))
                    self.datagrams_out += -(-size // segment)
                    taken += size
                else:
                    vector.queue(slot, self.key, name, size)
                    self.datagrams_out += 1
                self.used = self._table.clock
                self.bytes_out += size
                self._replied()
                if self.done or taken > gso.TURN_BYTES:
                    return
        except BlockingIOError:
            self._streak = 0
        except OSError as error:
            self._refused(error)

    def _replied(self) -> None:
        if self.stage == WAITING:
            self.stage = ANSWERED
            self._kept = None
            self._tried = ()
        elif self.stage == LEAVING and self.datagrams_out >= self.datagrams_in:
            self.finish("endpoint removed")

    # -- the end --------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Leave the listener's table. A reply under way is waited for, for a moment."""
        if self.datagrams_out >= self.datagrams_in:
            self.finish("endpoint removed")
        else:
            self.listener.flows.pop(self.key, None)
            self._unname()
            self.stage = LEAVING
            self._table.leaving[self] = self._table.plane.now()

    def _unname(self) -> None:
        if self.name is not None:
            self.listener.named.pop(self.name, None)

    def adopted(self, listener: FlowOwner[Flow]) -> None:
        """Go on at a listener with the same address and balancer."""
        self.listener = listener
        self._fd = listener.fd

    def crash(self) -> None:
        """End after an internal error."""
        self.finish("internal error")

    def finish(self, reason: str) -> None:
        """Close and count."""
        table = self._table
        flows = self.listener.flows
        if flows.get(self.key) is self:
            del flows[self.key]
            self._unname()
        elif table.leaving.pop(self, None) is None:
            return  # it is over already
        self._close()
        self.count()
        endpoint = self.endpoint
        table.counters[self.balancer.row + CLOSED] += 1
        if endpoint is not None and self.balancer.affinity_seconds:
            self.balancer.ended(self.client_ip, endpoint, table.plane.now())
        table.closed(self)
        if table.plane.records:
            self._record(reason)

    # -- figures --------------------------------------------------------------------------------------------------

    def live(self, now: float) -> LiveConnection | None:
        """What it is and does at this moment; None where it has ended."""
        if self.done:
            return None
        return LiveConnection(
            client=address_text(*client_address(self.key)),
            frontend=self.listener.address,
            service=self.balancer.name,
            endpoint=str(self.endpoint or ""),
            protocol="UDP",
            seconds=now - self.started,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            state="answered" if self.datagrams_out else "unanswered",
        )

    def _record(self, reason: str) -> None:
        record = Connection(
            client=address_text(*client_address(self.key)),
            frontend=self.listener.address,
            service=self.balancer.name,
            endpoint=str(self.endpoint or ""),
            attempts=self.attempts,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            seconds=self._table.plane.now() - self.started,
            reason=reason,
            finished=time.time(),
            protocol="UDP",
        )
        self._table.plane.reporter.record(record)
