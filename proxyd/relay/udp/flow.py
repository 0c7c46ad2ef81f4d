"""A UDP flow, the datagrams of one client address at one listener. `upstream` is its endpoint's side."""

from __future__ import annotations

import socket
import time

from proxyd.relay.ipc.messages import Connection, LiveConnection, address_text
from proxyd.relay.ipc.slots import CLOSED
from proxyd.relay.udp import gso
from proxyd.relay.udp.mmsg import NAME6_BYTES, NAME_BYTES, SLOTS, client_address, client_name
from proxyd.relay.udp.upstream import (
    ANSWERED,
    DRAINING,
    KEPT_BYTES,
    TALKING,
    WAITING,
    FlowOwner,
    Table,
    Upstream,
)

# The receive buffer of a flow that has become a conversation.
TALKING_BUFFER = 1024 * 1024
# Replies taken from a flow in one turn, once it was ready in STREAK turns on end. Before, only one is taken:
# another read would mostly find nothing, and that costs an exception.
MAX_BATCH = 16
STREAK = 4


class Flow(Upstream):
    """One client of one listener: `forward` is the way to the endpoint, `ready` the way back."""

    __slots__ = ()

    listener: FlowOwner[Flow]
    _table: Table[Flow]

    # -- client to endpoint ----------------------------------------------------------------------------------

    def forward(self, data: memoryview | bytes) -> None:
        """Send a datagram to the endpoint. `Receiver` has these lines written out where it does so most."""
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

    def forward_segments(self, data: memoryview, size: int) -> bool:
        """Send segments of `size` bytes to the endpoint; False where they have to go one by one."""
        if self.stage != TALKING or self._sock is None:
            return False
        self.used = self._table.clock
        try:
            self._sock.sendmsg([data], gso.control_for(size))
        except OSError:
            return False
        self.bytes_in += len(data)
        self.datagrams_in += -(-len(data) // size)
        return True

    def early(self, data: memoryview | bytes) -> None:
        """Take note of a client's datagram, before it is sent, while the flow is not TALKING."""
        if self.stage == WAITING:
            self._kept = bytes(data) if len(data) <= KEPT_BYTES else None
        else:
            self.stage = TALKING
            self.name = client_name(self.key)
            self.listener.named[self.name] = self
            if self._sock is not None:
                # It becomes as large as net.core.rmem_max allows: a worker has no privileges.
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TALKING_BUFFER)

    # -- endpoint to client ----------------------------------------------------------------------------------

    def ready(self, _events: int) -> None:
        """Take replies, which are sent at the end of the batch."""
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
        mmsg = self._mmsg
        recv_into = self._recv_into
        try:
            while left:
                slot = mmsg.queued
                if slot == SLOTS or mmsg.to != self._fd:
                    mmsg.turn_to(self._fd, self.listener.sendto)
                    slot = 0
                size = recv_into(mmsg.views[slot])
                if mmsg.v6:
                    name = slot * NAME_BYTES
                    mmsg.names[name : name + NAME6_BYTES] = self.key  # type: ignore[assignment]  # bytes here
                else:
                    mmsg.words[slot * 4] = self.key  # type: ignore[assignment]  # int here
                mmsg.sizes[2 * slot + 1] = size
                mmsg.name = self.name
                mmsg.queued = slot + 1
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
        """Take a reply and send it at once, as it is the only one of its batch."""
        view = self._mmsg.views[0]
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
            self._mmsg.turn_to(self._fd, self.listener.sendto)
            self._mmsg.lost(1)

    def _bulk(self) -> None:
        """Receive segments from now on: the endpoint has filled a batch."""
        if self.name is not None and self._sock is not None and gso.enable_gro(self._sock):
            self._poller.handlers[self._sock.fileno()] = self._ready_gro

    def _ready_gro(self, _events: int) -> None:
        """Take a buffer of replies, one or segments; several when the flow has been ready turn after turn."""
        turn = self._poller.turns
        self._streak = self._streak + 1 if turn == self._last_turn + 1 else 0
        self._last_turn = turn
        mmsg, sock, name = self._mmsg, self._sock, self.name
        assert sock is not None
        assert name is not None
        taken = 0
        try:
            for _ in range(MAX_BATCH if self._streak else 1):
                slot = mmsg.queued
                if slot == SLOTS or mmsg.to != self._fd:
                    mmsg.turn_to(self._fd, self.listener.sendto)
                    slot = 0
                size, control, _flags, _ = sock.recvmsg_into([mmsg.views[slot]], gso.CONTROL_BYTES)
                segment = gso.segment_size(control) if control else 0
                if 0 < segment < size:
                    mmsg.flush()  # replies that came before
                    mmsg.lost(self.listener.send_segments(mmsg.views[slot][:size], segment, name))
                    self.datagrams_out += -(-size // segment)
                    taken += size
                else:
                    mmsg.queue(slot, self.key, name, size)
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
        elif self.stage == DRAINING and self.datagrams_out >= self.datagrams_in:
            self.finish("endpoint removed")

    # -- the end ---------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Make room in the listener's table. If a reply is under way, wait for it for a moment."""
        if self.datagrams_out >= self.datagrams_in:
            self.finish("endpoint removed")
        else:
            self.listener.flows.pop(self.key, None)
            self._unname()
            self.stage = DRAINING
            self._table.draining[self] = self._table.plane.now()

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
        elif table.draining.pop(self, None) is None:
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

    # -- figures ---------------------------------------------------------------------------------------------

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
