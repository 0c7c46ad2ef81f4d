"""The worker process: it takes listeners and balancers from control, and relays."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator

import msgspec
import uvloop

from proxyd.relay.engine.balancer import Balancer, Endpoint
from proxyd.relay.engine.listing import Listings
from proxyd.relay.engine.plane import Plane
from proxyd.relay.engine.reporter import Reporter
from proxyd.relay.ipc.channel import Channel, ChannelError, close_all
from proxyd.relay.ipc.messages import (
    Acknowledged,
    Apply,
    BalancerConfig,
    CloseListener,
    ListConnections,
    ListenerConfig,
    Ready,
    Shutdown,
)
from proxyd.relay.ipc.options import Options
from proxyd.relay.ipc.slots import MAX_SLOTS, Slots
from proxyd.relay.privileges import drop_privileges
from proxyd.relay.registry import (
    USUAL,
    FollowsEndpoints,
    Listed,
    Listener,
    drains,
    follows_endpoints,
    is_listed,
    lingers,
    load,
)

# Messages that are taken in one turn of the loop, so that a long update does not hold up the relays.
_MESSAGES_AT_ONCE = 8


class Worker:
    """A worker, in a process of its own or within control.

    Args:
        loop: the event loop that it lives in. channel: to control; owned by the worker from now on. slots:
        shared positions and counters. index: of the worker; says which counters it writes. options: settings.
        alone: it has the process for itself. on_stopped: called once, when everything is closed, with an exit
        code: 0 after a Shutdown, 1 when control is gone.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        channel: Channel,
        slots: Slots,
        index: int,
        options: Options,
        *,
        alone: bool = False,
        on_stopped: Callable[[int], None] = lambda _code: None,
    ) -> None:
        self._loop = loop
        self._channel = channel
        self._slots = slots
        self._index = index
        self._on_stopped = on_stopped
        self._reporter = Reporter(loop, channel)
        self._plane = Plane(loop, self._reporter, slots, index, options, alone=alone)
        self._listings = Listings(loop, channel, _Alive(self._plane))
        self._balancers: dict[int, Balancer] = {}
        self._listeners: dict[int, Listener] = {}
        self._closed: dict[int, Listener] = {}  # closed, with relays left
        self._following: dict[Balancer, set[FollowsEndpoints]] = {}  # listeners, by their balancer
        self._drain_until: dict[Listener, float] = {}
        self._drain_timer: asyncio.TimerHandle | None = None
        self._shutdown_timer: asyncio.TimerHandle | None = None
        self._stopped = False

    def start(self) -> None:
        """Listen to control."""
        self._loop.add_reader(self._channel.fileno(), self._readable)
        self._plane.poller.give_way_to(self._channel.fileno())
        self._reporter.answer(Ready(os.getpid()))

    def stop(self, code: int = 0) -> None:
        """End everything at once: relays are reset, listeners are left to the other workers."""
        if self._stopped:
            return
        self._stopped = True
        try:
            self._close_everything()
        except Exception:  # noqa: BLE001 - it must end all the same: nobody else would end it
            traceback.print_exc()
        self._on_stopped(code)

    def _close_everything(self) -> None:
        self._plane.on_empty = None
        for listener in list(self._listeners.values()):
            listener.close()
        for relay in list(filter(drains, self._plane.relays)):
            relay.abort("drained")
        for timer in (self._drain_timer, self._shutdown_timer):
            if timer is not None:
                timer.cancel()
        self._loop.remove_reader(self._channel.fileno())
        self._listings.stop()
        self._reporter.flush()
        self._reporter.stop()
        self._plane.shut()
        self._channel.close()

    # -- what control says -----------------------------------------------------------------------------------

    def _readable(self) -> None:
        for _ in range(_MESSAGES_AT_ONCE):
            try:
                received = self._channel.receive()
            except EOFError:
                self.stop(1)
                return
            except ChannelError as error:
                self._reporter.trouble(f"from control: {error}")
                continue
            if received is None:
                return
            message, descriptors = received
            if isinstance(message, Apply):
                self._apply(message, descriptors)
                continue
            close_all(descriptors)
            if isinstance(message, Shutdown):
                self._shut_down(message.drain)
                if self._stopped:
                    return
            elif isinstance(message, ListConnections):
                self._listings.ask(message)
            else:
                self._reporter.trouble(f"from control: unexpected {type(message).__name__}")

    def _apply(self, message: Apply, descriptors: list[int]) -> None:
        """Put one part of an update in force. What is impossible is reported, and the rest goes on."""
        for balancer in message.balancers:
            self._set_balancer(balancer)
        if len(descriptors) > len(message.listeners):
            close_all(descriptors[len(message.listeners) :])
        for position, listener in enumerate(message.listeners):
            if position < len(descriptors):
                self._open(listener, descriptors[position])
            else:
                self._reporter.trouble(
                    "listeners without a descriptor: out of file descriptors in this worker"
                )
        for closing in message.close:
            self._close(closing)
        for number in message.drop_balancers:
            self._balancers.pop(number, None)
        if message.last:
            if message.listeners or self._closed:
                self._closed = {number: held for number, held in self._closed.items() if held.open_relays}
                self._plane.measure_descriptors()
            self._reporter.answer(Acknowledged(message.generation))

    def _set_balancer(self, config: BalancerConfig) -> None:
        row = self._slots.row
        slot = config.id if 0 <= config.id < MAX_SLOTS else 0
        balancer = self._balancers.get(config.id)
        if balancer is None:
            balancer = Balancer(config.name, self._slots.view, slot, row(self._index, slot))
            self._balancers[config.id] = balancer
        balancer.name = config.name
        endpoints = []
        for ip, port, number in config.endpoints:
            try:
                socket.inet_pton(socket.AF_INET6 if ":" in ip else socket.AF_INET, ip)
            except OSError:
                self._reporter.endpoint_trouble(config.name, ip, "not an IP address: left out")
                continue
            own = number if 0 <= number < MAX_SLOTS else 0
            endpoints.append(Endpoint(ip, port, own, row(self._index, own)))
        before = balancer.endpoints
        balancer.update(endpoints, config.affinity_seconds)
        balancer.udp_idle_seconds = config.udp_idle_seconds
        for endpoint in balancer.endpoints:
            endpoint.further = tuple(config.further.get(endpoint.address[0], ())) if config.further else ()
        if any(endpoint.removed for endpoint in before):
            for listener in list(self._following.get(balancer, ())):
                listener.endpoints_changed()

    def _open(self, config: ListenerConfig, fd: int) -> None:
        balancer = self._balancers.get(config.balancer)
        why = f"no balancer {config.balancer}"
        listener: Listener | None = None
        if balancer is not None:
            try:
                listener = load(config.protocol, config.implementation)(config, fd, balancer, self._plane)
            except OSError as error:
                why = error.strerror or str(error)
            except (LookupError, ImportError) as error:
                why = str(error.args[0])
        if listener is None:
            close_all([fd])
            self._reporter.trouble(f"listener {config.address} can't be opened: {why}")
            return
        if config.id in self._listeners:
            self._reporter.trouble(f"from control: listener {config.id} was given twice")
            self._close(CloseListener(config.id))
        self._listeners[config.id] = listener
        if follows_endpoints(listener):
            self._following.setdefault(listener.balancer, set()).add(listener)

    def _close(self, closing: CloseListener) -> None:
        listener = self._listeners.pop(closing.id, None)
        if listener is None:
            listener = self._closed.get(closing.id)
            if listener is None or not listener.open_relays:
                self._reporter.drained(closing.id)  # this worker has nothing of it
                return
        listener.close()
        self._follow_no_more(listener)
        if listener.open_relays:
            self._closed[closing.id] = listener
            if closing.drain is not None:
                # If control says it again, as after an upgrade, that gives no more time.
                until = self._plane.now() + closing.drain
                self._drain_until[listener] = min(until, self._drain_until.get(listener, until))
                self._set_drain_timer()

    def _follow_no_more(self, listener: Listener) -> None:
        following = self._following.get(listener.balancer)
        if following is not None and follows_endpoints(listener):
            following.discard(listener)
            if not following:
                del self._following[listener.balancer]

    # -- draining --------------------------------------------------------------------------------------------

    def _set_drain_timer(self) -> None:
        if self._drain_timer is not None:
            self._drain_timer.cancel()
            self._drain_timer = None
        if self._drain_until:
            delay = max(min(self._drain_until.values()) - self._plane.now(), 0.0)
            self._drain_timer = self._loop.call_later(delay, self._drain_due)

    def _drain_due(self) -> None:
        """End the relays of the closed listeners whose time is over, in one pass over all relays."""
        self._drain_timer = None
        limit = self._plane.now() + 0.01  # the loop's timers are in milliseconds
        due = {listener for listener, until in self._drain_until.items() if until <= limit}
        for listener in due:
            del self._drain_until[listener]
        for relay in list(filter(drains, self._plane.relays)):
            if relay.listener in due:
                relay.abort("drained")
        self._drain_until = {held: until for held, until in self._drain_until.items() if held.open_relays}
        self._set_drain_timer()

    def _shut_down(self, drain: float) -> None:
        for number, listener in list(self._listeners.items()):
            if not (lingers(listener) and listener.linger(drain)):
                self._close(CloseListener(number))
        if not self._plane.relays or drain <= 0:
            self.stop(0)
            return
        self._plane.on_empty = self._emptied
        self._shutdown_timer = self._loop.call_later(drain, self.stop, 0)

    def _emptied(self) -> None:
        # Not at once: the sockets of the last relay are closed at the end of the batch.
        self._plane.on_empty = None
        self._loop.call_soon(self.stop, 0)


class _Alive:
    """The relays of a worker that can be listed."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane

    def __iter__(self) -> Iterator[Listed]:
        yield from filter(is_listed, self._plane.relays)
        for extension in self._plane.extensions.values():
            yield from filter(is_listed, extension)


def main(arguments: list[str] | None = None) -> int:
    """Run a worker process until control ends it. It exits, and never returns."""
    parser = argparse.ArgumentParser(
        prog="proxyd-worker", description="A data-plane process; started by proxyd."
    )
    parser.add_argument("--channel-fd", type=int, required=True, help="Unix SOCK_SEQPACKET socket to control")
    parser.add_argument("--slots-fd", type=int, required=True, help="shared counters")
    parser.add_argument("--index", type=int, required=True, help="whose counters to write")
    parser.add_argument("--options", type=Options.decode, metavar="JSON", help="proxyd.relay.ipc.options")
    given, others = parser.parse_known_args(arguments)
    options = given.options or _one_by_one(others)
    # A terminal's Ctrl-C reaches the whole process group, but control says when and how to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Now, as files may be out of reach without privileges.
    for protocol in USUAL:
        load(protocol)
    drop_privileges()
    channel = Channel(socket.socket(fileno=given.channel_fd))
    loop = uvloop.new_event_loop()
    # os._exit: everything is closed by then, and taking thousands of objects apart would take time.
    worker = Worker(
        loop, channel, Slots(given.slots_fd), given.index, options, alone=True, on_stopped=os._exit
    )
    worker.start()
    # Relays leave no reference cycles behind, and the objects of now stay: there is little garbage to look
    # for.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)
    loop.run_forever()
    return 1


def _one_by_one(flags: list[str]) -> Options:
    """Options as a daemon before 0.2.0 gives them, a flag for each.

    Such a daemon may still run when a newer proxyd has been installed: it starts this worker where one of its
    own dies.
    """
    fields = {}
    for flag in flags:
        name, _, value = flag.removeprefix("--").partition("=")
        off = name.startswith("no-")
        fields[name.removeprefix("no-").replace("-", "_")] = "false" if off else value or "true"
    return msgspec.convert(fields, Options, strict=False)


if __name__ == "__main__":
    sys.exit(main())
