"""The client's side of a UDP listener: it hands each datagram of its socket to the flow of the client.

It takes datagrams one by one while they come so, in batches when there have been some lately, and as GSO
segments when one client fills the batches.
"""

from __future__ import annotations

import contextlib
import errno
import os
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory
from abc import ABC, abstractmethod

from proxyd.relay.engine.plane import PAUSE_SECONDS, Plane
from proxyd.relay.engine.poller import IN
from proxyd.relay.udp import gso
from proxyd.relay.udp.flow import Flow
from proxyd.relay.udp.mmsg import SLOTS, ClientKey, ClientName, client_key
from proxyd.relay.udp.table import FlowTable
from proxyd.relay.udp.upstream import TALKING

# After this many batches of a single datagram they are taken one by one, which costs less as long as they
# come so.
PATIENCE = 4
_NOTHING = frozenset({errno.EAGAIN, errno.EINTR})


class Receiver(ABC):
    """Reads one socket. `UdpListener` decides which clients get a flow.

    Args:
        address: of the socket, ip:port, for messages.
        fd: the socket; owned by the listener from now on.
        table: of the worker.

    Raises:
        OSError: not a socket, or no room to watch it.
    """

    def __init__(self, address: str, fd: int, table: FlowTable) -> None:
        self.address = address
        self.fd = fd
        self.table = table
        self.plane: Plane = table.plane
        self.flows: dict[ClientKey, Flow] = {}
        self.named: dict[ClientName, Flow] = {}  # of them the conversations
        self._poller = table.poller
        self._last_turn = 0
        self.gso = True  # whether segments may be sent in one buffer
        self._patience = 0  # batches of one datagram until they are taken one by one
        self._socket = Socket(fileno=fd)
        self.sendto = self._socket.sendto
        self._receive = self._socket.recvfrom_into
        try:
            self._socket.setblocking(False)
            self._mmsg = table.receiver(self._socket.family)
            self._view = self._mmsg.views[0]
            self.sender = table.sender(self._socket.family)
            self._poller.add(fd, self._ready_gro if gso.gro_enabled(self._socket) else self._ready, IN)
        except OSError:
            self._socket.close()
            raise

    @abstractmethod
    def open_flow(self, key: ClientKey, data: memoryview | bytes) -> None:
        """Begin a flow with a client's datagram."""

    @abstractmethod
    def receives(self) -> bool:
        """Whether it takes datagrams at present."""

    def _ready(self, _events: int) -> None:
        """Send a datagram on, or a batch where there have been some lately.

        The socket is level-triggered: datagrams that are left are reported again, after everybody else had a
        turn.
        """
        if self._patience:
            self._ready_batch()
            return
        turn = self._poller.turns
        if turn == self._last_turn + 1:
            self._patience = PATIENCE
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
        send = flow.send  # an attribute, not a method: the interpreter finds it faster
        try:
            send(data)
        except OSError as error:
            flow.send_failed(error, data)
            return
        flow.bytes_in += size
        flow.datagrams_in += 1

    def _unnamed(self, name: ClientName, data: memoryview) -> None:
        """Send a datagram on whose client has no conversation."""
        key = client_key(name)
        flow = self.flows.get(key)
        if flow is None:
            self.open_flow(key, data)
        else:
            flow.forward(data)

    def _ready_batch(self) -> None:
        """Send a batch on."""
        mmsg = self._mmsg
        try:
            sizes = mmsg.receive(self.fd)
        except OSError as error:
            self._receive_failed(error)
            return
        if len(sizes) > 1:
            self._patience = PATIENCE
            if len(sizes) >= gso.BULK_BATCH and sizes[0] == sizes[1] >= gso.BULK_BYTES:
                self._bulk(len(sizes))
        else:
            self._patience -= 1
        find = self.flows.get
        views = mmsg.views
        words = mmsg.words
        clock = self.table.clock
        v6 = mmsg.v6
        slot = 0
        for size in sizes:
            key = mmsg.key(slot) if v6 else words[slot * 4]
            data = views[slot][:size]
            slot += 1
            flow = find(key)
            if flow is None:
                self.open_flow(key, data)
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
        """Receive segments from now on if the batch is one client's."""
        key = self._mmsg.key
        if key(0) == key(count // 2) == key(count - 1) and gso.enable_gro(self._socket):
            self._poller.handlers[self.fd] = self._ready_gro

    def _ready_gro(self, _events: int) -> None:
        """Send a datagram or segments on; several when the socket has been ready turn after turn."""
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
            segment = gso.segment_size(control) if control else 0
            if 0 < segment < size:
                flow = self.named.get(name)
                if flow is None or not flow.forward_segments(data, segment):
                    for part in gso.segments(data, segment):
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

    def send_segments(self, data: memoryview, size: int, name: ClientName) -> int:
        """Send segments of `size` bytes to a client; how many of them the kernel did not take."""
        if self.gso:
            with contextlib.suppress(OSError):
                self._socket.sendmsg([data], gso.control_for(size), 0, name)
                return 0
        lost = 0
        for segment in gso.segments(data, size):
            try:
                self.sendto(segment, name)
            except OSError:
                lost += 1
        return lost

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
        if self.receives():
            self._poller.modify(self.fd, IN)
