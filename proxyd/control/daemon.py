"""The control process from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import uvloop

from proxyd.control.accesslog import AccessLog
from proxyd.control.adminsocket import listen
from proxyd.control.collection import uncollected
from proxyd.control.configfile import Configuration
from proxyd.control.feed import Feed
from proxyd.control.health import BusyError
from proxyd.control.logs import Summariser, get_logger
from proxyd.control.notify import Notifier
from proxyd.control.observation import Observation
from proxyd.control.operations import Operations
from proxyd.control.picture import draw
from proxyd.control.publication import Publication
from proxyd.control.reconciler import Reconciler
from proxyd.control.settings import Settings
from proxyd.control.supervisor import Events, Supervisor, WorkerOptions
from proxyd.control.tasks import cancel, describe, spawn
from proxyd.control.views import Picture
from proxyd.control.watchdog import Watchdog
from proxyd.host import limits
from proxyd.host.addresses import AddressMonitor, node_addresses
from proxyd.host.claim import claim_addresses
from proxyd.host.guard import VipGuard
from proxyd.host.routes import VipRoutes
from proxyd.host.steering import Steering as SteeringRules
from proxyd.relay.messages import Connections
from proxyd.relay.slots import Slots
from proxyd.state.desired import Planner
from proxyd.state.snapshot import NodeView, Options, Snapshot, VipMode
from proxyd.state.spec import ListenerState

log = get_logger("proxyd")
# The admin API and health answer after so many seconds at the latest, also where a worker is slow to start.
ANSWER_SECONDS = 2.0

if TYPE_CHECKING:
    from proxyd.control.admin import AdminServer


class StartError(Exception):
    """The daemon can't start: one line for the user, and the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


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
    return uvloop.run(_run(settings, on_serving, configuration))


async def _run(
    settings: Settings,
    on_serving: Callable[[Picture], None] | None,
    configuration: Configuration | None,
) -> int:
    daemon = Daemon(settings, on_serving, configuration)
    return await daemon.run()


class Daemon:
    """Joins the feed, the planner, the reconciler, the workers and the admin API."""

    def __init__(
        self,
        settings: Settings,
        on_serving: Callable[[Picture], None] | None = None,
        configuration: Configuration | None = None,
    ) -> None:
        self.settings = settings
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
        self._node = NodeView(name=settings.hostname_override)
        self._planner = Planner()
        self.observation = Observation(self, configuration)
        self.operations = Operations(self)
        self._admin: AdminServer | None = None
        self._starting: asyncio.Task[None] | None = None
        self._answering = False
        self._reload_asked = False
        self._reloading: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Start, serve until told to stop, take everything back."""
        with self._resources:
            self._loop = asyncio.get_running_loop()
            limits.raise_nofile()
            self.watchdog = Watchdog(self, Notifier.here())
            self._resources.callback(self.watchdog.close)
            self._options = self._decide_vip_mode()
            self._claim_addresses()
            self._listening = listen(self.settings.admin_socket)
            try:
                self._start_data_plane()
                # They come up while manifests are read.
                self.supervisor.start()
                self._start_feed()
                await self._serve()
            finally:
                await self._end()
        if self._fatal:
            log.error(self._fatal)
            return 1
        return 0

    def picture(self) -> Picture:
        """What the daemon is and does at this moment."""
        return draw(self)

    def turn_is_due(self) -> bool:
        """Whether the reconcile loop has something to do."""
        return self._dirty.is_set()

    # Start

    def _decide_vip_mode(self) -> Options:
        mode = self.settings.vip_mode
        may_route = limits.can_route()
        if mode == "route" and not may_route:
            raise StartError("--vip-mode=route needs CAP_NET_ADMIN; run as root, or use --vip-mode=loopback")
        route = mode == "route" or (mode == "auto" and may_route)
        return Options(
            vip_mode=VipMode(route=route, loopback=mode == "loopback", serve=mode != "none"),
            nodeport_addresses=self.settings.nodeport_addresses,
            bind_addresses=()
            if self.settings.bind_address in ("0.0.0.0", "::", "")
            else (self.settings.bind_address,),
            steer_external_ips=may_route
            and mode in ("auto", "route", "none")
            and self.settings.external_ip_mode == "steer",
            protocols=self.settings.protocols,
        )

    def _claim_addresses(self) -> None:
        """One daemon at most may manage routes and rules in a network namespace."""
        if not (self._options.vip_mode.route or self._options.steer_external_ips):
            return
        claim = claim_addresses()
        if claim is None:
            raise StartError(
                "another proxyd manages VIPs on this node: stop it first, or use --vip-mode=bind for this one"
            )
        self._resources.enter_context(claim)

    async def _start_servers(self) -> None:
        """Answer on the admin socket, and for health and metrics; who asked before has waited in the backlog."""
        # Imported late: aiohttp takes a third of a second, which nobody who waits for a listener should wait for.
        from proxyd.control.admin import AdminServer  # noqa: PLC0415

        self._admin = AdminServer(self.settings.admin_socket, self.picture, self.operations)
        await self._admin.start(self._listening)
        try:
            await self.observation.start()
        except BusyError as error:
            self._fatal = str(error)
            self._stop_after(0.0)
            return
        self._answering = True
        self._acknowledged()

    def _answer(self) -> None:
        """Start the servers, once: when the workers have everything, or are slow to take it."""
        if self._starting is None and not self._stop.is_set():
            self._starting = spawn(self._start_servers(), name="servers", on_failure=self._failed)

    def _start_data_plane(self) -> None:
        settings, options = self.settings, self._options
        slots = Slots.create()
        self._resources.callback(slots.close)
        self.publication = Publication(slots, settings.workers)
        routes = VipRoutes() if options.vip_mode.route else None
        rules = SteeringRules() if options.steer_external_ips else None
        guard = None
        if options.vip_mode.route:
            guard = VipGuard()
            if reason := guard.available():
                log.warning("no VIP guard: other ports of VIPs reach this node's own daemons", reason=reason)
                guard = None
        self.reconciler = Reconciler(
            self.publication,
            routes=routes,
            rules=rules,
            guard=guard,
            drain_seconds=settings.drain_timeout,
            note=self.operations.history.note,
        )
        self.access = AccessLog(settings.access_log)
        self._resources.callback(self.access.close)
        self.supervisor = Supervisor(
            settings.workers,
            slots,
            self.publication,
            WorkerOptions(settings.tcp_idle_timeout, settings.udp_timeout, records=bool(settings.access_log)),
            Events(
                acknowledged=self._acknowledged,
                drained=self._drained,
                died=self._died,
                connections=self._connections,
                trouble=self._trouble,
                failures=lambda message: self.operations.history.failed(message.records),
            ),
        )

    def _start_feed(self) -> None:
        self._monitor = AddressMonitor()
        self._resources.callback(self._monitor.close)
        self._read_addresses()
        self.feed = Feed(self.settings, self._snapshot_changed)
        problems = self.feed.first()
        if self.feed.missing:
            path = self.feed.missing[0]
            why = next((problem.message for problem in problems if problem.file == path), "cannot be read")
            raise StartError(f"{path}: {why} (--manifests)", 3)

    # Serve

    async def _serve(self) -> None:
        loop = self._loop
        loop.add_signal_handler(signal.SIGTERM, lambda: self._stop_after(self.settings.drain_timeout))
        loop.add_signal_handler(signal.SIGINT, self._stop_after, 0.0)
        loop.add_signal_handler(signal.SIGHUP, self._hung_up if _has_terminal() else self._reload)
        loop.add_reader(self._monitor.fileno(), self._addresses_changed)
        self.phase = "serving"
        self.watchdog.start()
        loop.call_later(ANSWER_SECONDS, self._answer)
        following = spawn(self.feed.follow(), name="manifests", on_failure=self._failed)
        try:
            await self._reconcile_forever()
        finally:
            following.cancel()
            loop.remove_reader(self._monitor.fileno())

    async def _reconcile_forever(self) -> None:
        stopped = asyncio.ensure_future(self._stop.wait())
        resync = time.monotonic() + self.settings.sync_period
        try:
            while not self._stop.is_set():
                self.turns += 1
                self._dirty.clear()
                self._reconcile_or_say_why()
                changed = asyncio.ensure_future(self._dirty.wait())
                retry = self.reconciler.next_retry()
                due = resync if retry is None else min(retry, resync)
                timeout = max(0.0, due - time.monotonic())
                await asyncio.wait({stopped, changed}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                if time.monotonic() >= resync:
                    self.reconciler.observe()
                    self._said.flush()
                    resync = time.monotonic() + self.settings.sync_period
        finally:
            stopped.cancel()

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
        desired = self._planner.desired(self.snapshot, self._node, self._options)
        update = self.reconciler.reconcile(desired, self.supervisor.workers)
        if update:
            self.supervisor.publish(update)
            self.observation.published()
        self.observation.reconciled(time.perf_counter() - began)
        self._reconciled = True
        self._acknowledged()
        self.operations.history.unopened(desired.unopened)
        if self._admin is not None:
            self._admin.changed()

    def _acknowledged(self) -> None:
        self.observation.acknowledged()
        if not self._reconciled or self._dirty.is_set() or self.supervisor.lagging():
            return
        if not self._answering:
            self._answer()
            return
        self.watchdog.in_force()
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
        self._node = NodeView(name=self.settings.node_name, addresses=node_addresses())

    def _drained(self, worker: int, numbers: list[int]) -> None:
        if self.reconciler.drained(worker, numbers):
            self._dirty.set()

    def _died(self, worker: int) -> None:
        self.observation.published()
        if self.reconciler.worker_died(worker):
            self._dirty.set()

    def _connections(self, message: Connections) -> None:
        self.access.write(message.records, message.dropped)

    def _trouble(self, worker: int, counts: dict[str, int]) -> None:
        for text, count in counts.items():
            # One line for each Service and reason, however many endpoints it has.
            kind = re.sub(r"^endpoint \S+ of ", "", text)
            self._said.warning(kind, text, count=count, worker=worker)
            self.observation.metrics.trouble(text, count)

    def _hung_up(self) -> None:
        """A hang-up: of the terminal that it was started from, or else an order to reload."""
        if _has_terminal():
            self._reload()
        else:
            self._stop_after(0.0)

    def _reload(self) -> None:
        # Signals that come while it is read again ask for one more reading, not for one each.
        self._reload_asked = True
        if self._reloading is None or self._reloading.done():
            self._reloading = spawn(self._reload_as_asked(), name="reload")

    async def _reload_as_asked(self) -> None:
        while self._reload_asked:
            self._reload_asked = False
            await self.reload()

    async def reload(self) -> None:
        """Read the configuration and the manifests again."""
        log.info("reloading")
        self.watchdog.reloading()
        self.access.reopen()
        try:
            await self.observation.reload()
            await self.feed.rescan()
        finally:
            self.watchdog.reloaded()
            self._dirty.set()

    def set_anew(self, settings: Settings) -> None:
        """Put settings in force that differ only in what may change at run time."""
        self.settings = settings
        self._options = self._decide_vip_mode()
        self.reconciler.set_drain(settings.drain_timeout)
        self.observation.changed()
        self._dirty.set()

    # End

    def drain(self, seconds: float) -> float:
        """Stop after so many seconds at most, unless that was begun before. Returns how long it takes at most."""
        if not self._stop.is_set():
            self._stop_after(seconds)
        return self._drain

    def _stop_after(self, drain: float) -> None:
        if self._stop.is_set():
            log.warning("stopping at once")
            self.supervisor.kill()
            return
        log.info("stopping", drain_seconds=drain)
        self.watchdog.stopping(drain)
        self._drain = drain
        self.phase = "draining"
        self._stop.set()

    def _failed(self, error: BaseException) -> None:
        self._fatal = f"stopped by an internal error: {error!r}"
        self._stop_after(0.0)

    async def _end(self) -> None:
        """Take back what was done to the node, also when the start failed half-way."""
        if hasattr(self, "reconciler"):
            self.reconciler.close_listeners()
            await self.supervisor.stop(self._drain)
            self.reconciler.remove_addresses()
        if self._starting is not None:
            await cancel(self._starting)
        await self.observation.stop()
        if self._admin is not None:
            await self._admin.stop()
        else:
            self._listening.close()
            with contextlib.suppress(OSError):
                os.unlink(self.settings.admin_socket)  # noqa: PTH108 - one call on a local path, at exit

    def serving(self) -> int:
        """How many listeners serve."""
        return sum(status.state is ListenerState.SERVING for status in self.reconciler.statuses())


def _has_terminal() -> bool:
    """Whether this process has a terminal that lives."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
