"""All UDP flows of one worker: how many there may be, which are ended when there are too many, and when they are idle.

Nothing here is done for a single datagram. A flow notes the table's coarse clock when it moves something; a pass over
all flows, each TICK_SECONDS, brings counters up to date and ends what has been idle for too long.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Protocol

from proxyd.relay.engine.plane import Plane
from proxyd.relay.ipc.slots import DROPPED_TO_CLIENT, EVICTED
from proxyd.relay.udp.flow import Flow
from proxyd.relay.udp.mmsg import Vector
from proxyd.relay.udp.upstream import ANSWERED, TALKING, WAITING, FlowOwner

TICK_SECONDS = 0.5
# For timeouts below 2 s a pass each quarter of them, but no more often than this.
_MIN_TICK_SECONDS = 0.05
# Until the first reply. Resolvers give up a query after 5 s, and some clients after 5 s more.
WAIT_SECONDS = 10.0
# After a single exchange; the usual DNS query is one, from a port that is never used again.
BRIEF_SECONDS = 10.0
# The same while the table fills up.
HURRIED_SECONDS = 1.0
# How long a reply under way is waited for when the endpoint is gone.
LEAVE_SECONDS = 2.0

# About 4 KB of memory each, mostly the kernel's.
MAX_FLOWS = 32_768
# Of the local ports that the node has; the rest is for its other programs, its own resolver among them.
_PORT_SHARE = 0.75
# What a single listener may take of the table.
_LISTENER_SHARE = 0.75
# How full the table is when single exchanges are forgotten sooner.
_HURRIED_SHARE = 0.5
# One pass over a full table chooses this part of it as those that make room next.
_VICTIMS_PART = 8
# And this part is ended where something else ran out before the table was full.
_SHORT_PART = 32
# Idle flows are ended, and busy ones counted, so many at a time, at most 3 ms of work, with a pause for the others between.
_DUE_AT_ONCE = 200
_PAUSE_SECONDS = 0.005

# A flow, and when it had been used and its stage when it was chosen.
Victim = tuple[Flow, float, int]


class Listener(FlowOwner[Flow], Protocol):
    """A UDP listener, as the table sees it."""

    victims: deque[Victim]  # of its flows those that make room for others next
    overruns: int  # of its socket, as counted so far

    def count(self) -> None:
        """Bring the counter of datagrams that found the receive buffer full up to date."""


class FlowTable:
    """Shared by the UDP listeners of one worker.

    Args:
        plane: of the worker.
    """

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self.poller = plane.poller
        self.counters = plane.counters
        self.clock = plane.now()  # of the last pass
        self.listeners: dict[str, Listener] = {}  # by address
        self.leaving: dict[Flow, float] = {}  # since when
        self._idle_seconds = plane.options.udp_timeout
        self._ports = int(_local_ports() * _PORT_SHARE / max(plane.options.workers, 1))
        self._receivers: dict[int, Vector] = {}
        self._senders: dict[int, Vector] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tick_seconds = TICK_SECONDS
        self._swept = 0.0  # the clock, when flows were last collected
        # To be ended unless used since then; 0: to be counted.
        self._due: deque[tuple[Flow, float]] = deque()
        self._due_timer: asyncio.TimerHandle | None = None
        self._victims: deque[Victim] = deque()  # the flows that make room for others next
        # How many flows there may be: half of the descriptors, and no more than memory and local ports allow; and how many
        # of one listener.
        self.limit = self._listener_limit = self._measured = 0
        self._measure()

    def receiver(self, family: int) -> Vector:
        """What listeners of a family receive into."""
        if family not in self._receivers:
            self._receivers[family] = Vector(family)
        return self._receivers[family]

    def sender(self, family: int) -> Vector:
        """What replies to clients of a family are queued in until the end of the batch."""
        if family not in self._senders:
            sender = self._senders[family] = Vector(family)
            sender.to_end = self._batch_begun
        return self._senders[family]

    # -- flows ----------------------------------------------------------------------------------------------------

    def opened(self) -> None:
        """Count a flow in."""
        self.plane.flows += 1
        if self._timer is None:
            self.clock = self.plane.now()
            self._timer = self.plane.loop.call_later(TICK_SECONDS, self._tick)

    def closed(self, flow: Flow) -> None:
        """Count a flow out."""
        self.plane.flows -= 1
        flow.listener.flow_ended()

    def __iter__(self) -> Iterator[Flow]:
        """Every flow that is in a listener's table."""
        for listener in self.listeners.values():
            yield from listener.flows.values()

    def make_room(self, listener: Listener) -> None:
        """End a flow where there is none left for one more, of this listener or of all."""
        if self.plane.max_relays != self._measured:
            self._measure()
        if len(listener.flows) >= self._listener_limit:
            self._evict(listener.victims, [listener])
        elif self.plane.flows >= self.limit:
            self._evict(self._victims, self.listeners.values())

    def short(self) -> None:
        """End some flows because descriptors, memory or ports ran out before the limit was reached."""
        for _ in range(max(self.plane.flows // _SHORT_PART, 1)):
            self._evict(self._victims, self.listeners.values())

    def _measure(self) -> None:
        self._measured = self.plane.max_relays
        self.limit = min(self._measured, MAX_FLOWS, self._ports)
        self._listener_limit = max(int(self.limit * _LISTENER_SHARE), 1)

    def _evict(self, victims: deque[Victim], listeners: Iterable[Listener]) -> None:
        """End the next of the victims that has not been used since it was chosen.

        Flows that only wait for a last reply go first where they are most of what there is.
        """
        if len(self.leaving) > self.plane.flows // 2:
            flow = next(iter(self.leaving))  # the first that was left
            self.counters[flow.balancer.row + EVICTED] += 1
            flow.finish("evicted")
            return
        for _ in range(2):
            while victims:
                flow, used, stage = victims.popleft()
                if flow.used == used and flow.stage == stage and flow.listener.flows.get(flow.key) is flow:
                    self.counters[flow.balancer.row + EVICTED] += 1
                    flow.finish("evicted")
                    return
            victims.extend(self._choose(listeners))

    def _choose(self, listeners: Iterable[Listener]) -> list[Victim]:
        """The longest idle of what fills the table: unanswered flows, or single exchanges if these are more.

        Either is what a flood of one-packet clients leaves; the fewer of the two are the real ones. Conversations go
        only when there is nothing else. So many are chosen that one pass over all flows serves many new ones.
        """
        stages: tuple[list[Flow], ...] = ([], [], [])
        for listener in listeners:
            for flow in listener.flows.values():
                stages[flow.stage].append(flow)
        waiting, answered, talking = stages
        chosen = max(waiting, answered, key=len) or talking
        chosen.sort(key=_used)
        advice = "; raise the limit of open files" if self.limit == self.plane.max_relays else ""
        self.plane.reporter.trouble(f"as many UDP flows as there may be: the longest idle are ended{advice}")
        return [(flow, flow.used, flow.stage) for flow in chosen[: len(chosen) // _VICTIMS_PART + 1]]

    # -- time -----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._timer = None
        self.clock = now = self.plane.now()
        self._measure()
        hurried = self.plane.flows > self.limit * _HURRIED_SHARE
        collect = not self._due  # else those of an earlier pass are still gone through
        shortest = self._idle_seconds
        for listener in list(self.listeners.values()):
            own = listener.balancer.udp_idle_seconds
            idle = own or self._idle_seconds
            shortest = min(shortest, idle)
            if collect and listener.flows:
                listener.count()
                brief = HURRIED_SECONDS if hurried else (own or min(BRIEF_SECONDS, idle))
                self._sweep(listener, (WAIT_SECONDS, brief, idle))
        if collect:
            self._swept = now
        for flow in [flow for flow, since in self.leaving.items() if now - since >= LEAVE_SECONDS]:
            flow.finish("endpoint removed")
        if self._due_timer is None:
            self._go_through()
        self._tick_seconds = min(TICK_SECONDS, max(shortest / 4, _MIN_TICK_SECONDS))
        if self.plane.flows and self._timer is None:
            self._timer = self.plane.loop.call_later(self._tick_seconds, self._tick)

    def _sweep(self, listener: Listener, seconds: tuple[float, float, float]) -> None:
        """Collect what moved since the last pass, and what has been idle for longer than its stage allows."""
        swept = self._swept
        # `used` may be a tick older than the flow's last datagram.
        limits = {
            stage: self.clock - each - self._tick_seconds
            for stage, each in zip((WAITING, ANSWERED, TALKING), seconds, strict=True)
        }
        for flow in listener.flows.values():
            used = flow.used
            if used >= swept:
                self._due.append((flow, 0.0))
            elif used < limits[flow.stage]:
                self._due.append((flow, used))

    def _go_through(self) -> None:
        """Count what moved, and end what is idle, some at a time."""
        self._due_timer = None
        for _ in range(min(_DUE_AT_ONCE, len(self._due))):
            flow, used = self._due.popleft()
            if not used:
                flow.count()
            elif flow.used == used:
                flow.finish("idle")
        if self._due:
            self._due_timer = self.plane.loop.call_later(_PAUSE_SECONDS, self._go_through)

    def _batch_begun(self) -> None:
        """See that the first reply of a batch, and those that follow, are sent."""
        self.poller.at_end(self.end_batch)

    def end_batch(self) -> None:
        """Send the replies of one batch; count what was dropped of them."""
        for vector in self._senders.values():
            vector.end()
            if vector.dropped:
                self._note_dropped(vector)

    def _note_dropped(self, vector: Vector) -> None:
        dropped, vector.dropped = vector.dropped, {}
        for listener in self.listeners.values():
            if count := dropped.get(listener.fd, 0):
                self.counters[listener.balancer.row + DROPPED_TO_CLIENT] += count
                self.plane.reporter.trouble(
                    f"listener {listener.address}: replies to UDP clients were dropped: the kernel did not take them"
                )

    def shut(self) -> None:
        """Stop the timers."""
        for timer in (self._timer, self._due_timer):
            if timer is not None:
                timer.cancel()


def flow_table(plane: Plane) -> FlowTable:
    """That of a worker, made with its first UDP listener."""
    found = plane.extensions.get("UDP")
    if not isinstance(found, FlowTable):
        found = plane.extensions["UDP"] = FlowTable(plane)
    return found


_used = attrgetter("used")


def _local_ports() -> int:
    """How many local ports the kernel gives out."""
    try:
        first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()
        return int(last) - int(first) + 1
    except (OSError, ValueError):
        return 28_232  # the default, 32768 to 60999
