"""All UDP flows of one worker: how many there may be, which end to make room, and when one is idle.

Nothing here runs for a single datagram. A flow takes note of the table's coarse clock when it moves
something. A pass over all flows, every TICK_SECONDS, brings counters up to date and ends the flows that have
been idle for too long.
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
from proxyd.relay.udp.mmsg import MmsgBuffer
from proxyd.relay.udp.upstream import ANSWERED, TALKING, WAITING, FlowOwner

TICK_SECONDS = 0.5
# For a timeout below 2 s a pass comes every quarter of it, but no more often than this.
_MIN_TICK_SECONDS = 0.05
# Until the first reply, at least. Resolvers give a query up after 5 s, and some clients after 5 s more.
WAIT_SECONDS = 10.0
# After a single exchange, unless a timeout is given: most DNS queries are one, from a port that is not used again.
BRIEF_SECONDS = 10.0
# Where nobody has said otherwise.
IDLE_SECONDS = 60.0
# The same while the table fills up.
HURRIED_SECONDS = 1.0
# How long a flow waits for a reply under way when its endpoint is gone.
DRAIN_SECONDS = 2.0

# About 4 KB of memory each, mostly the kernel's.
MAX_FLOWS = 32_768
# Of the node's local ports; the rest is for its other programs, among them its own resolver.
_PORT_SHARE = 0.75
# Of the table, for a single listener.
_LISTENER_SHARE = 0.75
# Of the table: when it is fuller, single exchanges end sooner.
_HURRIED_SHARE = 0.5
# One pass over a full table chooses an eighth of it as the flows that make room next.
_VICTIMS_PART = 8
# Where something else ran out before the table was full, a thirty-second of it ends.
_SHORT_PART = 32
# Idle flows are ended and busy ones counted this many at a time, which takes 3 ms at most, with a pause
# between.
_DUE_AT_ONCE = 200
_PAUSE_SECONDS = 0.005

# A flow, when it had last been used, and its stage, at the time it was chosen.
Victim = tuple[Flow, float, int]


class Listener(FlowOwner[Flow], Protocol):
    """A UDP listener, as the table sees it."""

    victims: deque[Victim]  # those of its flows that make room for others next
    overruns: int  # of its socket, as counted so far

    def count(self) -> None:
        """Bring the counter up to date of datagrams that found the receive buffer full."""


class FlowTable:
    """The flows of all UDP listeners of one worker.

    Args:
        plane: of the worker.
    """

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self.poller = plane.poller
        self.counters = plane.counters
        self.clock = plane.now()  # of the last pass
        self.listeners: dict[str, Listener] = {}  # by address
        self.draining: dict[Flow, float] = {}  # since when
        self._given_seconds = plane.options.udp_timeout
        self._ports = int(_local_ports() * _PORT_SHARE / max(plane.options.workers, 1))
        self._receivers: dict[int, MmsgBuffer] = {}
        self._senders: dict[int, MmsgBuffer] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tick_seconds = TICK_SECONDS
        self._swept = 0.0  # the clock, when flows were last collected
        # Flows to be ended unless they were used after this time, or 0: to be counted.
        self._due: deque[tuple[Flow, float]] = deque()
        self._due_timer: asyncio.TimerHandle | None = None
        self._victims: deque[Victim] = deque()  # the flows that make room for others next
        # How many flows there may be in all and of one listener: half of the descriptors, and no more than
        # memory and local ports allow.
        self.limit = self._listener_limit = self._measured = 0
        self._measure()

    def receiver(self, family: int) -> MmsgBuffer:
        """The buffer that listeners of a family receive into."""
        if family not in self._receivers:
            self._receivers[family] = MmsgBuffer(family)
        return self._receivers[family]

    def sender(self, family: int) -> MmsgBuffer:
        """The buffer in which replies to clients of a family wait for the end of the batch."""
        if family not in self._senders:
            sender = self._senders[family] = MmsgBuffer(family)
            sender.on_first = self._batch_begun
        return self._senders[family]

    # -- flows -----------------------------------------------------------------------------------------------

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
        """Every flow but those that are draining."""
        for listener in self.listeners.values():
            yield from listener.flows.values()

    def make_room(self, listener: Listener) -> None:
        """End a flow where there is no room for one more of this listener, or of all."""
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

        Where most flows only wait for a last reply, one of these goes first.
        """
        if len(self.draining) > self.plane.flows // 2:
            flow = next(iter(self.draining))  # the one that has waited longest
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
        """The longest idle of the flows that fill the table: unanswered ones, or single exchanges.

        A flood of clients of one packet leaves the one or the other; the fewer of the two are the real
        clients. Conversations go only when there is nothing else. One pass over all flows chooses enough for
        many new ones.
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

    # -- time ------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._timer = None
        self.clock = now = self.plane.now()
        self._measure()
        hurried = self.plane.flows > self.limit * _HURRIED_SHARE
        collect = not self._due  # else those of an earlier pass are still gone through
        shortest = IDLE_SECONDS
        for listener in list(self.listeners.values()):
            given = listener.balancer.udp_idle_seconds or self._given_seconds
            idle = given or IDLE_SECONDS
            shortest = min(shortest, idle)
            if collect and listener.flows:
                listener.count()
                brief = HURRIED_SECONDS if hurried else (given or BRIEF_SECONDS)
                self._sweep(listener, (max(WAIT_SECONDS, given or 0.0), brief, idle))
        if collect:
            self._swept = now
        for flow in [flow for flow, since in self.draining.items() if now - since >= DRAIN_SECONDS]:
            flow.finish("endpoint removed")
        if self._due_timer is None:
            self._go_through()
        self._tick_seconds = min(TICK_SECONDS, max(shortest / 4, _MIN_TICK_SECONDS))
        if self.plane.flows and self._timer is None:
            self._timer = self.plane.loop.call_later(self._tick_seconds, self._tick)

    def _sweep(self, listener: Listener, seconds: tuple[float, float, float]) -> None:
        """Collect the flows that moved since the last pass, and those that were idle for too long."""
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
        """Count the flows that moved and end the idle ones, some at a time."""
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
        """See that the replies of the batch that begins are sent at its end."""
        self.poller.at_end(self.end_batch)

    def end_batch(self) -> None:
        """Send the replies of a batch; count those that were dropped."""
        for mmsg in self._senders.values():
            mmsg.end()
            if mmsg.dropped:
                self._note_dropped(mmsg)

    def _note_dropped(self, mmsg: MmsgBuffer) -> None:
        dropped, mmsg.dropped = mmsg.dropped, {}
        for listener in self.listeners.values():
            if count := dropped.get(listener.fd, 0):
                self.counters[listener.balancer.row + DROPPED_TO_CLIENT] += count
                self.plane.reporter.trouble(
                    f"listener {listener.address}: replies to UDP clients were dropped: "
                    "the kernel did not take them"
                )

    def shut(self) -> None:
        """Stop the timers."""
        for timer in (self._timer, self._due_timer):
            if timer is not None:
                timer.cancel()


def flow_table(plane: Plane) -> FlowTable:
    """The flow table of a worker, which is made with its first UDP listener."""
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
