"""The control process from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import time
from collections.abc import Callable

import uvloop

from proxyd.control.admin.operations import Operations
from proxyd.control.admin.picture import draw
from proxyd.control.admin.views import Faces, Picture
from proxyd.control.config.file import Configuration
from proxyd.control.config.options import StartError, planning_options
from proxyd.control.config.reload import Reloading
from proxyd.control.config.settings import Settings
from proxyd.control.hearing import Hearing
from proxyd.control.kube.events import Duties
from proxyd.control.kube.migration import look as take_over
from proxyd.control.kube.migration import when_it_ends
from proxyd.control.observe.systemd import Notifier
from proxyd.control.observe.telemetry import Observation
from proxyd.control.observe.watchdog import Watchdog
from proxyd.control.runtime import logs
from proxyd.control.runtime.accesslog import AccessLog
from proxyd.control.runtime.garbage import seldom, uncollected
from proxyd.control.runtime.logs import Summariser, get_logger
from proxyd.control.runtime.tasks import cancel, describe, spawn
from proxyd.control.servers import Answering, prepare
from proxyd.control.signals import handle_signals, hold_signals
from proxyd.control.startup import (
    claim,
    interruptible,
    make_feeds,
    make_reconciler,
    read_first,
    set_oom_score,
)
from proxyd.control.upgrade import Succession
from proxyd.control.workers.handover import Handover, answer, checking, take
from proxyd.control.workers.publication import Publication, Update
from proxyd.control.workers.supervisor import Supervisor, WorkerOptions
from proxyd.host import limits
from proxyd.host.addresses import AddressMonitor, node_addresses
from proxyd.relay import registry
from proxyd.relay.ipc.slots import Slots
from proxyd.state.desired import Planner
from proxyd.state.snapshot import NodeView, Snapshot
from proxyd.state.spec import ListenerState

__all__ = ["Daemon", "StartError", "run"]

log = get_logger("proxyd")
# The admin API and health answer after so many seconds at the latest, also where a worker is slow to start.
ANSWER_SECONDS = 2.0
# Between two looks at what was logged once and went on.
_SUMMED_UP_SECONDS = 5.0
_ANSWER_GIVEN_SECONDS = 0.05


def run(
    settings: Settings,
    on_serving: Callable[[Picture], None] | None = None,
    configuration: Configuration | None = None,
) -> int:
    """Run the daemon until a signal ends it.

    Args:
        settings: what to do.
        on_serving: called once, when everything that can be open is open and every worker knows it.
        configuration: where the settings came from, so that they can be read again.

    Returns:
        The exit code.

    Raises:
        StartError: it can't start.
    """
    if checking():
        sys.stdout.write(f"{answer()}\n")
        return 0
    return uvloop.run(_run(settings, on_serving, configuration, take()))


async def _run(
    settings: Settings,
    on_serving: Callable[[Picture], None] | None,
    configuration: Configuration | None,
    left: Handover | None,
) -> int:
    daemon = Daemon(settings, on_serving, configuration, left)
    return await daemon.run()


class Daemon:
    """Joins the feed, the planner, the reconciler, the workers and the admin API."""

    def __init__(
        self,
        settings: Settings,
        on_serving: Callable[[Picture], None] | None = None,
        configuration: Configuration | None = None,
        left: Handover | None = None,
    ) -> None:
        self.settings = settings
        self.replaceable = configuration is not None
        self.started = time.time()
        self._on_serving = on_serving
        self.phase = "starting"
        self.snapshot = Snapshot()
        self.turns = 0  # of the reconcile loop
        self._dirty = asyncio.Event()
        self._reconciled = False  # the last reconcile went through
        self._stop = asyncio.Event()
        self._drain = 0.0
        self._fatal = ""
        self._resources = contextlib.ExitStack()
        self._said = Summariser(log)
        self.node = NodeView(name=settings.node_name)
        self._planner = Planner()
        self.observation = Observation(self, configuration)
        self.operations = Operations(self)
        self.duties = Duties(self)
        self.faces = Faces()
        self.succession = Succession(self, left)
        self.reloading = Reloading(self.reload)
        self._hearing = Hearing(self, self._said)

    async def run(self) -> int:
        """Start, serve until told to stop, take everything back."""
        seldom()
        with self._resources:
            self._loop = asyncio.get_running_loop()
            limits.raise_nofile()
            set_oom_score(self.settings)
            self.watchdog = Watchdog(self, Notifier.here())
            self._resources.callback(self.watchdog.close)
            handle_signals(self)
            self.options = planning_options(self.settings, may_route=limits.can_route())
            self._resources.enter_context(claim(self.options))
            self._answering = Answering(self)
            try:
                self._start_data_plane()
                # They come up while manifests are read.
                self.supervisor.start()
                for note in registry.find().notes:
                    log.info(note)
                self.succession.begin()
                taking_over = spawn(asyncio.to_thread(take_over, self.settings), name="takeover")
                self._start_feed()
                found = await taking_over
                found.say()
                if found.running is not None:
                    spawn(when_it_ends(self.settings), name="takeover")
                await self._serve()
                if self.succession.due:
                    await self._make_way()
            finally:
                await self._end()
        if self._fatal:
            log.error(self._fatal)
            return 1
        return 0

    def picture(self) -> Picture:
        """What the daemon is and does at this moment."""
        return draw(self)

    @property
    def stopping(self) -> bool:
        """Whether the end has begun."""
        return self._stop.is_set()

    def turn_is_due(self) -> bool:
        """Whether the reconcile loop has something to do."""
        return self._dirty.is_set()

    # Start

    def _start_data_plane(self) -> None:
        settings = self.settings
        slots = Slots.create()
        self._resources.callback(slots.close)
        self.publication = Publication(slots, settings.workers)
        self.reconciler = make_reconciler(
            settings, self.options, self.publication, self.operations.history.note
        )
        self.access = AccessLog(settings.access_log)
        self._resources.callback(self.access.close)
        self.supervisor = Supervisor(
            settings.workers,
            slots,
            self.publication,
            WorkerOptions(
                settings.tcp_idle_timeout,
                settings.udp_timeout,
                records=bool(settings.access_log),
                sctp_max_message=settings.sctp_max_message,
                tcp_splice=settings.tcp_splice,
            ),
            self._hearing.events(),
            said=self._said,
        )

    def _start_feed(self) -> None:
        self._monitor = AddressMonitor()
        self._resources.callback(self._monitor.close)
        self.feed = make_feeds(self.settings, self._snapshot_changed, self._node_changed)
        self._read_addresses()
        # Where clients are connected already, their relays have their time to end.
        with contextlib.nullcontext() if self.succession.goes_on else interruptible():
            read_first(self.feed, prepare)

    # Serve

    async def _serve(self) -> None:
        loop = self._loop
        loop.add_reader(self._monitor.fileno(), self._addresses_changed)
        self.watchdog.start()
        loop.call_later(ANSWER_SECONDS, self._answering.begin)
        loop.call_later(_SUMMED_UP_SECONDS, self._sum_up)
        following = spawn(self.feed.follow(), name="sources", on_failure=self.failed)
        try:
            await self._first_lists()
            await self._reconcile_forever()
        finally:
            await cancel(following)
            loop.remove_reader(self._monitor.fileno())

    async def _first_lists(self) -> None:
        """Wait until every source has delivered its first full list: nothing is opened or closed before."""
        stopped = asyncio.ensure_future(self._stop.wait())
        while not (self.feed.synced or self._stop.is_set()):
            self._dirty.clear()
            changed = asyncio.ensure_future(self._dirty.wait())
            await asyncio.wait({stopped, changed}, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
        stopped.cancel()
        if not self._stop.is_set():
            self.phase = "serving"

    async def _reconcile_forever(self) -> None:
        stopped = asyncio.ensure_future(self._stop.wait())
        resync = time.monotonic() + self.settings.sync_period
        renewal = time.monotonic() + self.settings.config_sync_period
        try:
            while not self._stop.is_set():
                began = time.monotonic()
                self.turns += 1
                self._dirty.clear()
                self._reconcile_or_say_why()
                changed = asyncio.ensure_future(self._dirty.wait())
                retry = self.reconciler.next_retry()
                due = min(resync, renewal) if retry is None else min(retry, resync, renewal)
                timeout = max(0.0, due - time.monotonic())
                await asyncio.wait({stopped, changed}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                if (pause := began + self.settings.min_sync_period - time.monotonic()) > 0:
                    await asyncio.wait({stopped}, timeout=pause)
                if time.monotonic() >= renewal:
                    # Whatever was remembered of earlier plans is forgotten: a safety net.
                    log.debug("planning everything anew")
                    self._planner = Planner()
                    gc.collect()
                    renewal = time.monotonic() + self.settings.config_sync_period
                if time.monotonic() >= resync:
                    self.reconciler.observe()
                    self._answering.look()
                    resync = time.monotonic() + self.settings.sync_period
        finally:
            stopped.cancel()

    def _sum_up(self) -> None:
        self._said.flush()
        self._loop.call_later(_SUMMED_UP_SECONDS, self._sum_up)

    def _reconcile_or_say_why(self) -> None:
        try:
            self._reconciled = False
            with uncollected() if self.turns == 1 else contextlib.nullcontext():
                self._reconcile()
        except Exception as error:  # noqa: BLE001 - what is served goes on; what was done so far is known to the next plan
            self._said.error("reconcile", "reconcile failed: tried again in 1 s", error=describe(error))
            self.observation.reconcile_failed()
            self._loop.call_later(1.0, self._dirty.set)

    def _reconcile(self) -> None:
        began = time.perf_counter()
        desired = self._planner.desired(self.snapshot, self.node, self.options)
        self.reconciler.reconcile(desired, self.supervisor.workers, self._publish)
        self.observation.reconciled(time.perf_counter() - began)
        self._reconciled = True
        self.acknowledged()
        self.operations.history.unopened(desired.unopened)
        self.duties.reconciled(desired)
        self._answering.changed()

    def _publish(self, update: Update) -> None:
        self.supervisor.publish(update)
        self.observation.published()

    def acknowledged(self) -> None:
        """A worker acknowledged something, or the servers answer: maybe all is in force now."""
        self.observation.acknowledged()
        if not self._reconciled or self._dirty.is_set():
            return
        if not self.supervisor.telling():
            # What the servers need is imported while the workers do what they were told.
            self._answering.begin()
        if not self._answering.begun or self.supervisor.lagging():
            return
        self.watchdog.in_force()
        self.succession.in_force()
        if self._on_serving is None:
            return
        on_serving, self._on_serving = self._on_serving, None
        on_serving(self.picture())

    def _snapshot_changed(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.observation.changed(snapshot)
        self._dirty.set()

    def _addresses_changed(self) -> None:
        if self._monitor.drain():
            self._read_addresses()
            self.reconciler.addresses_changed()
            self.observation.changed()
            self._dirty.set()

    def _read_addresses(self) -> None:
        self._addresses = node_addresses()
        self.node = self.feed.node_view(self._addresses)

    def _node_changed(self) -> None:
        self.node = self.feed.node_view(self._addresses)
        self.duties.node_changed()
        self._dirty.set()

    def look_again(self) -> None:
        """Have a reconcile: an address may be free."""
        self._dirty.set()

    async def reload(self) -> None:
        """Read the configuration and the manifests again; not any more when the end has begun."""
        if self.phase == "draining":
            return
        log.info("reloading")
        self.watchdog.reloading()
        self.access.reopen()
        logs.reopen()
        try:
            await self.observation.reload()
            await self.feed.rescan()
        finally:
            self.watchdog.reloaded()
            self._dirty.set()

    def set_anew(self, settings: Settings) -> None:
        """Put settings in force that differ only in what may change at run time."""
        self.settings = settings
        self.options = planning_options(self.settings, may_route=limits.can_route())
        self.reconciler.set_drain(settings.drain_timeout)
        self.observation.changed()
        self._dirty.set()

    # End

    def drain(self, seconds: float) -> float:
        """Stop after so many seconds at most, unless that was begun before. Returns how long it takes at most."""
        if not self._stop.is_set() or self.succession.due:
            self.stop_after(seconds)
        return self._drain

    def stop_after(self, drain: float) -> None:
        """Begin the end: relays have so many seconds. The second time: end at once."""
        # An end that is ordered while this program makes way for the next comes first.
        making_way, self.succession.due = self.succession.due, False
        if self._stop.is_set() and not making_way:
            log.warning("stopping at once")
            if hasattr(self, "supervisor"):
                self.supervisor.kill()
            if self.succession.workers is not None:
                self.succession.workers.kill()
            return
        log.info("stopping", drain_seconds=drain)
        self.watchdog.stopping(drain)
        self._drain = drain
        self.phase = "draining"
        self._stop.set()

    def make_way(self) -> None:
        """End serving in this program, in a moment: an answer under way is given."""
        self.watchdog.reloading()
        self._loop.call_later(_ANSWER_GIVEN_SECONDS, self._stop.set)

    async def _make_way(self) -> None:
        """Have the next program take over; where that fails, stop as if told to."""
        await self.duties.stop()
        admin = await self._answering.leave()
        await hold_signals()
        if self.succession.due:
            self._said.flush(everything=True)
            self.access.close()
            self.succession.hand_over(admin)
            self._fatal = "stopped: the next program could not be executed"
            self._drain = self.settings.drain_timeout
            self.watchdog.stopping(self._drain)
        handle_signals(self)
        self._answering.abandon(admin)

    def failed(self, error: BaseException) -> None:
        """A task ended that the daemon can't go on without."""
        self.give_up(f"stopped by an internal error: {error!r}")

    def give_up(self, why: str) -> None:
        """Stop at once, and fail with a line that says why."""
        self._fatal = why
        self.stop_after(0.0)

    async def _end(self) -> None:
        """Take back what was done to the node, also when the start failed half-way."""
        self.phase = "draining"
        if hasattr(self, "reconciler"):
            self.reconciler.close_listeners()
            await self.duties.stop()
            leaving = self.succession.workers
            await asyncio.gather(
                self.supervisor.stop(self._drain), *([leaving.stop(self._drain)] if leaving else ())
            )
            self.reconciler.remove_addresses()
        await self._answering.stop()
        self._said.flush(everything=True)

    def serving(self) -> int:
        """How many listeners serve."""
        return sum(status.state is ListenerState.SERVING for status in self.reconciler.statuses())
