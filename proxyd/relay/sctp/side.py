"""The message path: each side of an SCTP relay reads messages, and sends each to its peer as it came.

A message keeps its boundaries, its stream, its order (or lack of it) and its payload protocol identifier. The
kernel sends a message whole or not at all, so a message that arrives in parts is put together first. If the
peer's socket has no room for a message, its side holds a copy and reads no more: the receive window closes,
and the sender waits. That is the back-pressure.

Sockets are edge-triggered for reading. For writing a socket is watched only while a message waits for it: the
kernel reports room with every acknowledgement, which would be an event for each message.

SCTP knows no half-close. A side that has *ended* sends nothing more: its SHUTDOWN came, after all its data.
To a side that is *deaf* nothing can be sent any more. A side that is *over* has no association left.
"""

from __future__ import annotations

import errno
import socket
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory
from typing import Any, Protocol

from proxyd.relay.engine.plane import TURN_BYTES, Plane
from proxyd.relay.engine.poller import ERR, IN, OUT, RDHUP
from proxyd.relay.sctp.shared import Control, Shared
from proxyd.state.sctpsocket import (
    ASSOC_CHANGE,
    COMM_LOST,
    CONTROL_BYTES,
    MSG_NOTIFICATION,
    PARTIAL_DELIVERY_EVENT,
    RESTART,
    SHUTDOWN_COMP,
    SHUTDOWN_EVENT,
    message_key,
    notification,
    sent_on,
)

EDGES = IN | RDHUP | 1 << 31  # EPOLLET
_WITH_ROOM = EDGES | OUT
# Messages that a side moves in one turn, before the others have theirs.
TURN_MESSAGES = 64
_NOWAIT = socket.MSG_DONTWAIT
_EOR = socket.MSG_EOR


class SideOwner(Protocol):
    """The relay of two sides, as they see it."""

    plane: Plane

    @property
    def done(self) -> bool:
        """Whether it has ended."""

    def closing(self) -> None:
        """One direction has ended."""

    def side_over(self) -> None:
        """One association has come to its end."""

    def reset_by(self, side: Side, /) -> None:
        """`side` was aborted by its other end, or its path is lost: the relay is over."""

    def restarted(self, side: Side, /) -> None:
        """`side` was set up anew by its other end: the relay is over."""

    def send_failed(self, side: Side, error: OSError, stream: int, size: int, /) -> bool:
        """A message of `size` bytes could not be sent to `side`; whether the relay goes on without it."""

    def too_long(self, side: Side, /) -> None:
        """`side` sent a message longer than those that are relayed: the relay is over."""

    def count_dropped(self, side: Side, /) -> None:
        """Count a message that could not be sent on to `side`."""

    def crash(self) -> None:
        """End after an internal error."""


class Side:
    """One association of a relay. Messages from it go to `peer`, which is set once both are there."""

    __slots__ = (
        "bytes", "deaf", "ended", "held", "messages", "over", "parts", "peer", "pending", "plane", "readable",
        "recv", "relay", "send", "shared", "sock",
    )  # fmt: skip

    peer: Side

    def __init__(self, relay: SideOwner, sock: Socket, shared: Shared, held: bool) -> None:
        self.relay = relay
        self.sock = sock
        self.plane = relay.plane
        self.shared = shared
        self.recv: Any = sock.recvmsg_into  # attributes, not methods: the interpreter finds them faster
        self.send: Any = sock.sendmsg
        self.bytes = 0  # of the whole messages that were read
        self.messages = 0
        self.parts: bytearray | None = None  # of a message that is still arriving
        self.pending: tuple[bytes, Control] | None = None  # to be sent to this side first
        self.held = held  # not to be read now
        self.readable = False  # an edge came while held
        self.ended = False
        self.deaf = False
        self.over = False

    def ready(self, events: int) -> None:
        """Act on an edge: move the messages that can be moved."""
        if self.relay.done or self.over:  # it ended after it had asked for another turn
            return
        if self.pending is not None and events & ~IN and not self._flush():
            return
        if self.held:
            if events & ERR:
                self.relay.reset_by(self)
            elif events & ~OUT:
                self.readable = True
            return
        if events & ~OUT:
            self._read()

    def release(self) -> None:
        """Lift the hold, and read what came meanwhile."""
        self.held = False
        if self.readable:
            self.readable = False
            self._read()

    def crash(self) -> None:
        """End after an internal error."""
        self.relay.crash()

    def shut(self) -> None:
        """Shut down this side's association, after everything that was sent to it."""
        if not self.deaf:
            self.deaf = True
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise
        self.relay.closing()

    def drop_pending(self) -> None:
        """Give up the message that waits for this side."""
        if self.pending is not None:
            self.plane.keep(-len(self.pending[0]))
            self.pending = None
            self.relay.count_dropped(self)

    # -- reading ---------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Move messages until none is left, the peer is full, or this side has had its share of the turn."""
        peer = self.peer
        shared = self.shared
        buffers, view, controls, recv = shared.buffers, shared.view, shared.controls, self.recv
        budget = TURN_BYTES
        for _ in range(TURN_MESSAGES):
            try:
                size, control, flags, _ = recv(buffers, CONTROL_BYTES, _NOWAIT)
            except BlockingIOError:
                return
            except OSError:
                self.relay.reset_by(self)
                return
            if flags & MSG_NOTIFICATION:
                if not self._notified(*notification(view[:size])):
                    return
                continue
            if not size:
                self._gone()
                return
            if self.parts is not None or not flags & _EOR or size > shared.max_message:
                if not self._join(view[:size]):
                    return
                if not flags & _EOR:
                    continue
                data: bytes | memoryview = self._joined()
                size = len(data)
            else:
                data = view[:size]
            self.messages += 1
            self.bytes += size
            if peer.deaf:
                self.relay.count_dropped(peer)
                continue
            key = message_key(control[0][2])
            how = controls.get(key) or shared.control(key)
            try:
                peer.send((data,), how, _NOWAIT)
            except BlockingIOError:
                self._stall(data, how)
                return
            except OSError as error:
                if not self.relay.send_failed(peer, error, key[0], size):
                    return
                continue
            budget -= size
            if budget <= 0:
                break
        self.plane.poller.again(self.ready)

    def _join(self, part: memoryview) -> bool:
        """Keep a part of a message; False where the message is too long, and the relay has ended."""
        if self.parts is None:
            self.parts = bytearray()
        self.parts += part
        self.plane.keep(len(part))
        if len(self.parts) > self.shared.max_message:
            self.relay.too_long(self)
            return False
        return True

    def _joined(self) -> bytes:
        assert self.parts is not None
        data = bytes(self.parts)
        self.forget_parts()
        return data

    def forget_parts(self) -> None:
        """Throw a half message away."""
        if self.parts is not None:
            self.plane.keep(-len(self.parts))
            self.parts = None

    def _notified(self, kind: int, state: int) -> bool:
        """Act on a notification; False where there is nothing more to read."""
        if kind == SHUTDOWN_EVENT:
            # The peer's data has come before, all of it, and it takes no more.
            self.ended = True
            self.deaf = True
            if self.pending is not None:
                self.drop_pending()
                self.peer.release()
                if self.relay.done:
                    return False
            self._pass_end_on()
        elif kind == PARTIAL_DELIVERY_EVENT:
            self.forget_parts()
        elif kind == ASSOC_CHANGE and state == COMM_LOST:
            self.relay.reset_by(self)
        elif kind == ASSOC_CHANGE and state == RESTART:
            self.relay.restarted(self)
        elif kind == ASSOC_CHANGE and state == SHUTDOWN_COMP:
            # The end that began the shutdown reads no end of stream after it.
            self._gone()
            return False
        return not self.relay.done

    def _gone(self) -> None:
        """Act on the end of the association: everything that was sent on it has arrived."""
        self.ended = self.deaf = self.over = True
        self.forget_parts()
        if self.pending is not None:
            self.drop_pending()
            self.peer.release()
        if not self.relay.done:
            self._pass_end_on()
        if not self.relay.done:
            self.relay.side_over()

    def _pass_end_on(self) -> None:
        if self.peer.pending is None:
            self.peer.shut()

    # -- writing ---------------------------------------------------------------------------------------------

    def _stall(self, data: bytes | memoryview, how: Control) -> None:
        """Keep the message that the peer has no room for, and read no more until the peer has taken it."""
        peer = self.peer
        peer.pending = (bytes(data), how)
        self.plane.keep(len(data))
        self.held = True
        self.readable = True
        # If there is room by now, the kernel reports it at once.
        self.plane.poller.modify(peer.sock.fileno(), _WITH_ROOM)

    def retry(self) -> None:
        """Try again to send what is pending: if the kernel had no memory, no event tells when it has some."""
        if self.pending is not None:
            self._flush()

    def _flush(self) -> bool:
        """Send what is pending; False where the relay has ended."""
        assert self.pending is not None
        data, how = self.pending
        try:
            self.send((data,), how, _NOWAIT)
        except BlockingIOError:
            return True
        except OSError as error:
            self.plane.keep(-len(data))
            self.pending = None
            if not self.relay.send_failed(self, error, sent_on(how), len(data)):
                return False
        else:
            self.plane.keep(-len(data))
            self.pending = None
        self.plane.poller.modify(self.sock.fileno(), EDGES)
        if self.peer.ended:
            self.shut()
        self.peer.release()
        return not self.relay.done
