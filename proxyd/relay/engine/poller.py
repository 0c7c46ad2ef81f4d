"""One epoll in the event loop, whose events are dispatched to plain functions, without tasks or transports.

The loop watches the epoll's own descriptor. When it is readable, the poller dispatches one batch, and the
loop goes on. In a process of its own the poller lingers while events come quickly: the way through the loop
costs a system call, and as much Python as moving a request. Timers and callbacks of the loop then wait for
_TURN_SECONDS and one _LINGER_SECONDS at most; a descriptor that `give_way_to` names does not wait.

Three rules keep it right:

- A descriptor is closed at the end of the batch. Until then its number cannot be used again, so that an event
  that was fetched for the old socket cannot reach a new one.
- An edge is reported once. A handler that stops before its socket is drained asks for another turn with
  `again`.
- An exception in one handler is handed to `on_error`, and the rest of the batch goes on.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from time import monotonic
from typing import Protocol

Handler = Callable[[int], None]

IN = select.EPOLLIN
OUT = select.EPOLLOUT
PRI = select.EPOLLPRI
ERR = select.EPOLLERR
HUP = select.EPOLLHUP
RDHUP = select.EPOLLRDHUP
# A relay's socket is registered with these once, for its whole life. PRI: a read ends short at urgent data,
# and without that event a short read would be taken for a drained socket.
EDGES = IN | OUT | PRI | RDHUP | select.EPOLLET

_BATCH = 256

# How long the poller waits for the next events, if the last ones came as soon. No less than the kernel's
# tick, mostly 4 ms: a shorter wait programs a timer, which costs more than the wait saves.
_LINGER_SECONDS = 0.005
# After this time the loop has its turn, whatever comes.
_TURN_SECONDS = 0.003


def events_now(fd: int) -> int:
    """The events of a descriptor at this moment, of which the last batch may not know; 0: none."""
    poll = select.poll()
    poll.register(fd, IN | OUT | RDHUP)
    return sum(events for _, events in poll.poll(0))


class Closable(Protocol):
    """A socket."""

    def fileno(self) -> int:
        """The descriptor."""

    def close(self) -> None:
        """Close it."""


def _ignore(_events: int) -> None:
    """Ignore the events of a socket that was closed earlier in the batch."""


class Poller:
    """Dispatches events to `handlers`, by descriptor; they may be replaced at any time.

    Args:
        loop: the event loop that drives it.
        on_error: called with the handler that raised, and its exception.
        alone: nothing in this process is more urgent than the events.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_error: Callable[[Handler, Exception], None],
        *,
        alone: bool = False,
    ) -> None:
        self.handlers: dict[int, Handler] = {}
        self.turns = 0  # batches dispatched
        self._loop = loop
        self._on_error = on_error
        self._epoll = select.epoll()
        self._closing: list[Closable] = []
        self._again: dict[Handler, None] = {}  # in the order in which they asked
        self._inside = False
        self._alone = alone
        self._leave = False  # do not linger: the loop has something more urgent to do
        self._left = 0.0  # when the last turn was over
        self.lone = False  # the event that is being dispatched is its batch's only one
        self._at_end: list[Callable[[], None]] = []
        loop.add_reader(self._epoll.fileno(), self._turn)

    def add(self, fd: int, handler: Handler, events: int = EDGES) -> None:
        """Watch a descriptor.

        Raises:
            OSError: no memory, or too many watches.
        """
        self.handlers[fd] = handler
        try:
            self._epoll.register(fd, events)
        except OSError:
            del self.handlers[fd]
            raise

    def modify(self, fd: int, events: int) -> None:
        """Change what is watched for; 0 mutes a level-triggered descriptor."""
        self._epoll.modify(fd, events)

    def close(self, sock: Closable) -> None:
        """Close a socket that only this process holds, at the end of the batch."""
        if self._inside:
            fd = sock.fileno()
            if fd >= 0:
                self.handlers[fd] = _ignore
                self._closing.append(sock)
        else:
            self.handlers.pop(sock.fileno(), None)
            sock.close()

    def close_shared(self, sock: Closable) -> None:
        """Close a socket that other processes hold too: its registration would outlive our descriptor."""
        if sock.fileno() >= 0:
            self._epoll.unregister(sock.fileno())
            self.close(sock)

    def again(self, handler: Handler) -> None:
        """Call `handler(IN | OUT)` once in the next turn of the loop, after everybody else had a turn.

        A handler that waits for its turn may be called for an edge and ask again meanwhile. That is no second turn: under
        constant traffic turns would grow longer and longer.
        """
        if not self._again:
            self._loop.call_soon(self._continue)
            self._leave = True
        self._again[handler] = None

    def give_way_to(self, fd: int) -> None:
        """End lingering when this descriptor, which the loop watches, is readable."""
        if self._alone:
            self.add(fd, self._give_way, IN)

    def _give_way(self, _events: int) -> None:
        self._leave = True

    def at_end(self, what: Callable[[], None]) -> None:
        """Call `what` at the end of this batch, before its sockets are closed; outside a batch, soon.

        It must not raise.
        """
        if self._inside:
            self._at_end.append(what)
        else:
            self._loop.call_soon(what)

    def shut(self) -> None:
        """Stop. The owners of sockets have closed them before."""
        self._leave = True
        self._loop.remove_reader(self._epoll.fileno())
        self._again.clear()
        self._epoll.close()

    def _turn(self) -> None:
        """Dispatch a batch, and the batches that come soon after."""
        poll = self._epoll.poll
        handlers = self.handlers
        now = monotonic()
        until = now + _TURN_SECONDS if self._alone and now - self._left < _LINGER_SECONDS else 0.0
        timeout = 0.0
        self._leave = bool(self._again)
        while batch := poll(timeout, _BATCH):
            self.turns += 1
            self.lone = len(batch) == 1
            self._inside = True
            ready = iter(batch)
            handler: Handler = _ignore
            while True:
                try:
                    for fd, events in ready:
                        handler = handlers[fd]
                        handler(events)
                    break
                except Exception as error:  # noqa: BLE001 one relay's error must not reach another
                    self._on_error(handler, error)
            if self._closing or self._at_end:
                self._end_batch()
            else:
                self._inside = False
            if self._leave or monotonic() >= until:
                break
            timeout = _LINGER_SECONDS
        self._left = monotonic()

    def _continue(self) -> None:
        """Give the handlers that asked for it another turn."""
        self._inside = True
        waiting, self._again = self._again, {}
        for handler in waiting:
            try:
                handler(IN | OUT)
            except Exception as error:  # noqa: BLE001 one relay's error must not reach another
                self._on_error(handler, error)
        self._end_batch()

    def _end_batch(self) -> None:
        if self._at_end:
            ending, self._at_end = self._at_end, []
            for what in ending:
                what()
        self._inside = False
        if self._closing:
            handlers = self.handlers
            for sock in self._closing:
                handlers.pop(sock.fileno(), None)
                sock.close()
            self._closing.clear()
