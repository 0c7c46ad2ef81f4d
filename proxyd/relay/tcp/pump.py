"""The byte path: each side of a TCP relay reads its socket as soon as it can, and writes to its peer.

Sockets are edge-triggered, so a side must know at all times why it is not reading:

- The socket is *empty*: the last read was short. The kernel reports the next byte with a new edge. But a FIN,
  an error or urgent data ends a read as well; after one of these (`thorough`) a side reads on until there is
  nothing more.
- The side is *held*: its peer is not connected yet, or its peer has no room (`peer.pending`), or its own
  stream has ended. An edge that comes meanwhile is noted in `readable`, and acted on when the hold is lifted.
- The side has had its share of this turn, and is in the poller's queue for another.

Whenever no code of a side runs, it is in exactly one of these states.

A side that has brought much, and still fills the buffer with each read, is *bulk*: a pipe takes the place of
the buffer, so that nothing is copied, until the side brings little again.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import sys
import termios
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory
from typing import Protocol

from proxyd.relay.engine.pipes import Pipe
from proxyd.relay.engine.plane import READ_BYTES, TURN_BYTES, Plane
from proxyd.relay.engine.poller import ERR, HUP, IN, OUT, PRI, RDHUP

_IN_OUT = IN | OUT
_ENDING = RDHUP | HUP | ERR | PRI
_READ = IN | _ENDING
_WRITE = OUT | HUP | ERR
_NOWAIT = int(socket.MSG_DONTWAIT)
# For bytes from a socket whose FIN has come, but no reset: the kernel keeps the last, partial packet back
# until the FIN, and both go in one packet. It never waits long, as a side that has seen a FIN reads on to the
# end.
_MORE_COMES = int(socket.MSG_DONTWAIT | socket.MSG_MORE)
# A side that has brought this many bytes may be bulk. Short transfers never pay for the change.
BULK_BYTES = 1024 * 1024
# Errors of the first splice where the kernel has none, or a sandbox forbids it.
_NO_SPLICE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EPERM})


class PumpOwner(Protocol):
    """The relay of two sides, as the sides see it. Each method may end it."""

    @property
    def done(self) -> bool:
        """Whether it has ended."""

    def reset_by(self, side: Side, /) -> None:
        """`side` was reset by its other end."""

    def write_failed(self, side: Side, /) -> None:
        """A write to `side` failed."""

    def finish(self, reason: str, /) -> None:
        """Both directions have come to their end."""

    def crash(self) -> None:
        """End after an internal error."""


class Side:
    """One socket of a relay. Its bytes go to `peer`, which is set once both are connected."""

    __slots__ = (
        "broken", "bulk", "eof", "flags", "held", "inline", "moved", "peer", "pending", "plane", "readable",
        "relay", "sock", "thorough",
    )  # fmt: skip

    peer: Side

    def __init__(self, relay: PumpOwner, sock: Socket, plane: Plane, held: bool) -> None:
        self.relay = relay
        self.sock = sock
        self.plane = plane
        self.moved = 0  # bytes read
        self.pending: memoryview | Pipe | None = None  # to be written to this socket first
        self.held = held  # not to be read now
        self.readable = False  # an edge came while held
        self.thorough = False  # a short read does not mean that the socket is empty
        self.broken = False  # an error was reported
        self.bulk = False  # `ready_bulk` is the handler
        self.inline = False  # urgent data is read in its place
        self.flags = _NOWAIT  # for sending on what is read
        self.eof = False

    def ready(self, events: int) -> None:
        """Act on an edge: move the bytes that can be moved."""
        if (events != _IN_OUT or self.held or self.pending is not None) and not self._may_read(events):
            return
        plane = self.plane
        sock = self.sock
        peer = self.peer
        budget = TURN_BYTES
        while True:
            view = plane.view
            try:
                size = sock.recv_into(view, 0, _NOWAIT)
            except BlockingIOError:
                if self.broken:
                    self.relay.reset_by(self)
                return
            except OSError:
                self.relay.reset_by(self)
                return
            if not size:
                self._end_of_stream()
                return
            self.moved += size
            try:
                sent = peer.sock.send(view[:size], self.flags)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.relay.write_failed(peer)
                return
            if sent != size:
                self._stall(memoryview(bytes(view[sent:size])), more=size == len(view))
                return
            if size != len(view):
                if not self.thorough:
                    return
            elif not self.inline:
                self._read_urgent_inline()  # the next read may begin at it, before it is reported
            if self.moved > BULK_BYTES and not self.thorough and self._set_bulk(True):
                self.ready_bulk(_IN_OUT)
                return
            budget -= size
            if budget <= 0:
                plane.poller.again(self.ready)
                return

    def ready_bulk(self, events: int) -> None:
        """Act on an edge as `ready` does, but through a pipe.

        A short read says nothing here: it reads until the kernel has no more.
        """
        if (events != _IN_OUT or self.held or self.pending is not None) and not self._may_read(events):
            return
        plane = self.plane
        pipe = None if self.thorough else plane.take_pipe()
        if pipe is None:
            self._set_bulk(False)
            self.ready(_IN_OUT)
            return
        sock = self.sock
        peer = self.peer
        begin = self.moved
        while self.moved < begin + TURN_BYTES:
            try:
                size = pipe.fill(sock)
            except OSError as error:
                plane.pipes.give(pipe)
                self._not_filled(error, self.moved - begin)
                return
            if not size:
                # The end of the stream, or urgent data before it: a read without a pipe tells.
                plane.pipes.give(pipe)
                self._set_bulk(False)
                self.ready(_IN_OUT | PRI)
                return
            self.moved += size
            try:
                while pipe.left:
                    pipe.drain(peer.sock)
            except BlockingIOError:
                self._stall(pipe, more=True)
                return
            except OSError:
                plane.pipes.give(pipe)
                self.relay.write_failed(peer)
                return
        plane.pipes.give(pipe)
        plane.poller.again(self.ready_bulk)

    def _not_filled(self, error: OSError, brought: int) -> None:
        """Act on an error of `Pipe.fill`, after `brought` bytes in this turn."""
        if isinstance(error, BlockingIOError):
            if brought < READ_BYTES:
                self._set_bulk(False)
        elif error.errno in _NO_SPLICE:
            self.plane.pipes.refuse()
            self._set_bulk(False)
            self.ready(_IN_OUT)
        else:
            self.relay.reset_by(self)

    def _set_bulk(self, bulk: bool) -> bool:
        """Change the handler; False where there is no pipe."""
        plane = self.plane
        if bulk:
            pipe = plane.take_pipe()
            if pipe is None:
                return False
            plane.pipes.give(pipe)
            for side in (self, self.peer):
                side.sock.setblocking(False)
        self.bulk = bulk
        plane.poller.handlers[self.sock.fileno()] = self.ready_bulk if bulk else self.ready
        return True

    def release(self) -> None:
        """Lift the hold, and read what came meanwhile."""
        self.held = False
        if self.readable:
            self.readable = False
            if self.bulk:
                self.ready_bulk(_IN_OUT)
            else:
                self.ready(_IN_OUT)

    def unsent(self) -> int:
        """How many bytes are under way to this socket's other end: pending, or not acknowledged."""
        answer = fcntl.ioctl(self.sock.fileno(), termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(answer, sys.byteorder) + (0 if self.pending is None else len(self.pending))

    def crash(self) -> None:
        """End after an internal error."""
        self.relay.crash()

    def _may_read(self, events: int) -> bool:
        """Act on events other than plain data; whether to read now."""
        if self.relay.done:  # it ended after it had asked for another turn
            return False
        if self.pending is not None and events & _WRITE and not self._flush():
            return False
        if events & _ENDING:
            self.thorough = True
            if events & (RDHUP | ERR) == RDHUP:
                self.flags = _MORE_COMES
            if events & PRI:
                self._read_urgent_inline()
            if events & ERR:
                self.broken = True
                if self.held:
                    self.relay.reset_by(self)
                    return False
        if not events & _READ:
            return False
        if self.held:
            self.readable = True
            return False
        return True

    def _read_urgent_inline(self) -> None:
        """Have the urgent byte stay in its place in the stream, and not be lost."""
        self.inline = True
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)

    def _flush(self) -> bool:
        """Write what is pending; False when the relay has ended."""
        pending = self.pending
        assert pending is not None
        try:
            if isinstance(pending, Pipe):
                # On to the end: a signal that cuts splice(2) short, as when the process is stopped, brings no
                # edge.
                while pending.left:
                    self.plane.keep(-pending.drain(self.sock))
                self.plane.pipes.give(pending)
            else:
                sent = self.sock.send(pending, _NOWAIT)
                self.plane.keep(-sent)
                if sent != len(pending):
                    self.pending = pending[sent:]
                    return True
        except BlockingIOError:
            return True
        except OSError:
            self.relay.write_failed(self)
            return False
        self.pending = None
        if self.peer.eof:
            self._finish_writing()
        else:
            self.peer.release()
        return not self.relay.done

    def _stall(self, rest: memoryview | Pipe, *, more: bool) -> None:
        """Keep the bytes that the peer has no room for, and read no more until it has taken them."""
        self.peer.pending = rest
        self.plane.keep(len(rest))
        self.held = True
        self.readable = more or self.thorough

    def _end_of_stream(self) -> None:
        """Pass the end on, after everything that came before it."""
        self.eof = True
        self.held = True
        if self.broken:
            self.relay.reset_by(self)
        elif self.peer.pending is None:
            self.peer._finish_writing()  # noqa: SLF001 the same class

    def _finish_writing(self) -> None:
        """Send FIN; or end the relay, if the other direction has ended before."""
        if self.eof and self.peer.pending is None:
            self.relay.finish("closed")
            return
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.relay.reset_by(self)
