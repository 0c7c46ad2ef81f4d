"""What all relays of one worker share: poller, receive buffer, counters, limits and coarse timers.

No relay has a timer of its own. A timer of 25 ms runs while something is being dialled, and one of a second
runs while there are relays.
"""

from __future__ import annotations

import asyncio
import os
import resource
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from types import MethodType
from typing import Protocol, runtime_checkable

from proxyd.relay.engine.pipes import MAX_PIPES, Pipe, Pipes
from proxyd.relay.engine.poller import Handler, Poller
from proxyd.relay.engine.reporter import Reporter
from proxyd.relay.ipc.options import Options
from proxyd.relay.ipc.slots import Slots

# Bytes of one read, and so the most that is kept for one direction. 256 KiB made bulk 10 % slower: they do
# not stay in the processor's cache. While more than PENDING_LIMIT bytes are kept in all, reads are tight.
READ_BYTES = 64 * 1024
TIGHT_READ_BYTES = 16 * 1024
PENDING_LIMIT = 64 * 1024 * 1024
# A relay that has moved this many bytes waits until the others had their turn.
TURN_BYTES = 1024 * 1024

DIAL_SCAN_SECONDS = 0.025
TICK_SECONDS = 1.0
# How long accepting rests when the process has reached one of its limits.
PAUSE_SECONDS = 0.15
# Descriptors that are never given to relays.
_SPARE_DESCRIPTORS = 40
# One pipe, which is two descriptors, for this many descriptors that the worker may have.
_PIPE_PART = 64
# Pipes of all workers: half of what fs.pipe-user-pages-soft gives a user. The other half is for the workers
# after an upgrade and for the user's other programs (for root: those of all containers), whose pipes would be
# cut to two pages.
_PIPES_OF_ALL = 32


class TimedRelay(Protocol):
    """A relay as the timers see it."""

    def dial_due(self, now: float) -> None:
        """Give up the endpoint that has not answered in time."""

    def tick(self, now: float) -> None:
        """Do what is done once a second."""

    def crash(self) -> None:
        """End after an internal error."""


@runtime_checkable
class Crashable(Protocol):
    """The owner of a method that events are dispatched to: it is told when that has raised."""

    def crash(self) -> None:
        """End, or go on, after an internal error."""


class Pausable(Protocol):
    """A listener that rests while accepting is paused."""

    def resume(self) -> None:
        """Accept again."""


class Extension(Protocol):
    """What the listeners of one protocol share beyond the plane."""

    def shut(self) -> None:
        """Stop its timers. Relays and listeners have been closed before."""

    def __iter__(self) -> Iterator[object]:
        """The relays that are alive and not in `Plane.relays`, such as UDP flows."""


class Plane:
    """Shared by the relays of one worker.

    Args:
        loop: the event loop.
        reporter: to control.
        slots: counters and positions.
        index: of the worker: whose counters to write.
        options: of the worker.
        alone: in a process of its own.
        now: monotonic seconds, for all relays and listeners.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        reporter: Reporter,
        slots: Slots,
        index: int,
        options: Options,
        *,
        alone: bool = False,
        now: Callable[[], float] = monotonic,
    ) -> None:
        self.now = now
        self.loop = loop
        self.reporter = reporter
        self.slots = slots
        self.index = index
        self.counters = slots.view
        self.poller = Poller(loop, self._handler_failed, alone=alone)
        self.options = options
        self.extensions: dict[str, Extension] = {}  # by protocol
        self.records = options.records
        self.idle_seconds = options.tcp_idle_timeout
        self.relays: set[TimedRelay] = set()
        self.dialling: dict[TimedRelay, float] = {}  # until when
        self.on_empty: Callable[[], None] | None = None  # called when the last relay has ended
        self.accepting_paused = False
        self._paused: list[Pausable] = []
        self.max_relays = self._fixed_limit = options.max_relays
        self.flows = 0  # UDP flows, each with one descriptor
        self._buffer = memoryview(bytearray(READ_BYTES))
        self.view = self._buffer  # to read into
        self._pending = 0
        self.pipes = Pipes(_most_pipes(options.workers) if options.tcp_splice else 0, now)
        self._scan_timer: asyncio.TimerHandle | None = None
        self._tick_timer: asyncio.TimerHandle | None = None
        self._pause_timer: asyncio.TimerHandle | None = None
        self.measure_descriptors()

    # -- relays ----------------------------------------------------------------------------------------------

    def opened(self, relay: TimedRelay) -> None:
        """Count a relay in."""
        self.relays.add(relay)
        if self._tick_timer is None:
            self._tick_timer = self.loop.call_later(TICK_SECONDS, self._tick)

    def closed(self, relay: TimedRelay) -> None:
        """Count a relay out."""
        self.relays.discard(relay)
        if self.on_empty is not None and not self.relays:
            self.on_empty()

    def dial_until(self, relay: TimedRelay, deadline: float) -> None:
        """Have `relay.dial_due` called at about `deadline`, unless it is taken out of `dialling` first."""
        self.dialling[relay] = deadline
        if self._scan_timer is None:
            self._scan_timer = self.loop.call_later(DIAL_SCAN_SECONDS, self._scan)

    def _scan(self) -> None:
        self._scan_timer = None
        now = self.now()
        for relay in [relay for relay, deadline in self.dialling.items() if deadline <= now]:
            self._guarded(relay, relay.dial_due, now)
        if self.dialling and self._scan_timer is None:
            self._scan_timer = self.loop.call_later(DIAL_SCAN_SECONDS, self._scan)

    def _tick(self) -> None:
        self._tick_timer = None
        now = self.now()
        for relay in list(self.relays):
            self._guarded(relay, relay.tick, now)
        if self.relays and self._tick_timer is None:
            self._tick_timer = self.loop.call_later(TICK_SECONDS, self._tick)

    # -- memory ----------------------------------------------------------------------------------------------

    def keep(self, size: int) -> None:
        """Count bytes that are kept for a socket without room; a negative number when they were sent."""
        self._pending += size
        if self._pending > PENDING_LIMIT:
            self.view = self._buffer[:TIGHT_READ_BYTES]
        elif self._pending < PENDING_LIMIT // 2:
            self.view = self._buffer

    def take_pipe(self) -> Pipe | None:
        """Borrow a pipe for bulk; None while memory is short."""
        return self.pipes.take() if self.view is self._buffer else None

    # -- limits ----------------------------------------------------------------------------------------------

    def measure_descriptors(self) -> None:
        """Find out how many relays there may be, of two descriptors each, beside the descriptors open now."""
        if self._fixed_limit:
            return
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            in_use = sum(1 for _ in os.scandir("/proc/self/fd")) - 2 * len(self.relays) - self.flows
        except OSError:  # out of descriptors at this moment
            in_use = soft // 4
        spare = _SPARE_DESCRIPTORS + 2 * (self.pipes.most - self.pipes.made)
        self.max_relays = max((soft - in_use - spare) // 2, 1)

    def may_accept(self) -> bool:
        """Whether there is room for one more relay; if not, accepting is paused."""
        if len(self.relays) + self.flows // 2 < self.max_relays:
            return True
        self.pause(
            "as many connections as descriptors allow: accepting paused; raise the limit of open files"
        )
        return False

    def share(self) -> int:
        """How many relays one listener may have: a tenth is left to the others, whatever its clients do."""
        return self.max_relays - self.max_relays // 10

    def pause(self, why: str) -> None:
        """Stop accepting for a moment. Clients wait in the backlog meanwhile."""
        self.reporter.trouble(why)
        if not self.accepting_paused:
            self.accepting_paused = True
            self._pause_timer = self.loop.call_later(PAUSE_SECONDS, self._resume)

    def rest(self, listener: Pausable) -> None:
        """Have `listener.resume` called when accepting goes on."""
        self._paused.append(listener)

    def _resume(self) -> None:
        self._pause_timer = None
        self.accepting_paused = False
        paused, self._paused = self._paused, []
        for listener in paused:
            listener.resume()

    # -- errors ----------------------------------------------------------------------------------------------

    def _guarded(self, relay: TimedRelay, what: Callable[[float], None], now: float) -> None:
        try:
            what(now)
        except Exception as error:  # noqa: BLE001 one relay's error must not reach another
            self._failed(relay, error)

    def _handler_failed(self, handler: Handler, error: Exception) -> None:
        self._failed(handler.__self__ if isinstance(handler, MethodType) else None, error)

    def _failed(self, owner: object, error: Exception) -> None:
        """Report an error of this program, and end the relay in which it happened."""
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        self.reporter.trouble(f"internal error at {where}: {type(error).__name__}: {error}")
        if isinstance(owner, Crashable):
            try:
                owner.crash()
            except Exception as second:  # noqa: BLE001 nothing more can be done for it
                self.reporter.trouble(
                    f"internal error while ending a relay: {type(second).__name__}: {second}"
                )

    def shut(self) -> None:
        """Stop timers and poller. Relays and listeners have been closed before."""
        for timer in (self._scan_timer, self._tick_timer, self._pause_timer):
            if timer is not None:
                timer.cancel()
        for extension in self.extensions.values():
            extension.shut()
        self.pipes.shut()
        self.poller.shut()


def _most_pipes(workers: int) -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(MAX_PIPES, soft // _PIPE_PART, max(_PIPES_OF_ALL // max(workers, 1), 1))
