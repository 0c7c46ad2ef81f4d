"""The control process: makes its parts, connects them, starts and ends them."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable

import uvloop

from proxyd.control.admin.history import History
from proxyd.control.admin.operations import Operations
from proxyd.control.admin.picture import Picture
from proxyd.control.config.file import Configuration
from proxyd.control.config.options import planning_options
from proxyd.control.config.reload import ConfigReload, Reloading
from proxyd.control.config.settings import Settings
from proxyd.control.kube import migration
from proxyd.control.kube.events import ServiceEvents
from proxyd.control.kube.health_check_ports import HealthCheckPorts
from proxyd.control.lifecycle import Lifecycle
from proxyd.control.loop import ReconcileLoop
from proxyd.control.observe.systemd import Notifier
from proxyd.control.observe.telemetry import Telemetry
from proxyd.control.observe.watchdog import Watchdog
from proxyd.control.runtime import logs
from proxyd.control.runtime.logs import Summariser, get_logger
from proxyd.control.runtime.tasks import cancel, spawn
from proxyd.control.servers import Servers
from proxyd.control.signals import handle_signals, hold_signals
from proxyd.control.startup import interruptible, make_core, make_feed, prepare_process, read_first
from proxyd.control.upgrade import Upgrade, admin_socket
from proxyd.control.workers.handover import Handover, answer, checking, take
from proxyd.control.workers.orphans import Orphans
from proxyd.control.workers.supervisor import Events
from proxyd.host import limits
from proxyd.relay import registry
from proxyd.state.desired import DesiredState

log = get_logger("proxyd")
# The admin API and health answer after so many seconds at the latest, even if a worker is slow to start.
_ANSWER_SECONDS = 2.0


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
        AdminError: its admin socket can't be opened.
    """
    if checking():
        sys.stdout.write(f"{answer()}\n")
        return 0
    return uvloop.run(_run(settings, on_serving, configuration, take() or Handover()))


async def _run(
    settings: Settings,
    on_serving: Callable[[Picture], None] | None,
    configuration: Configuration | None,
    left: Handover,
) -> int:
    with contextlib.ExitStack() as resources:
        return await Daemon(settings, on_serving, configuration, left, resources).run()


class Daemon:
    """The composition root: it makes the parts and connects them. Only `proxyd run` imports it.

    Args:
        settings: what to do.
        on_serving, configuration: as of `run`.
        left: what the program before this one handed over.
        resources: closes what is to be closed at the end.

    Raises:
        StartError: it can't start.
        AdminError: its admin socket can't be opened.
    """

    def __init__(
        self,
        settings: Settings,
        on_serving: Callable[[Picture], None] | None,
        configuration: Configuration | None,
        left: Handover,
        resources: contextlib.ExitStack,
    ) -> None:
        # Before anything else, while every child of this process is of the program before.
        Orphans({worker.pid for worker in left.workers}).watch()
        prepare_process(settings)
        self._on_serving = on_serving
        self._summariser = Summariser(log)
        self._history = History()
        self._lifecycle = Lifecycle(
            on_stop=lambda drain: self._watchdog.stopping(drain),  # noqa: PLW0108 - it is made below
            on_stop_again=self._kill_workers,
        )
        self._reloading = Reloading(self._reload)
        self._handle_signals()
        notifier = Notifier.here()
        core = self._core = make_core(
            settings,
            self._lifecycle,
            left,
            resources,
            summariser=self._summariser,
            note=self._history.note,
            look_again=lambda: self._loop.look_again(),  # noqa: PLW0108 - as above
            notifier=notifier,
        )
        telemetry = self._telemetry = Telemetry(core, self._summariser)
        self._loop = ReconcileLoop(
            core,
            telemetry,
            self._summariser,
            held={key: one.holder for one in left.listeners if one.holder for key in one.keys},
            reconciled=self._reconciled,
            resynced=lambda: self._servers.check_admin_socket(),  # noqa: PLW0108 - as above
        )
        resources.callback(self._loop.close)
        watchdog = Watchdog(core, notifier, due=self._loop.is_due)
        self._watchdog = resources.enter_context(contextlib.closing(watchdog))
        self._config = ConfigReload(
            configuration, lambda: core.settings, self._apply, telemetry.metrics.config_read
        )
        self._upgrade = Upgrade(core, left, configuration is not None, watchdog.reloading)
        self._service_events = ServiceEvents(core)
        self._health_ports = HealthCheckPorts(telemetry.healthy, self._service_events.health_port_failed)
        self._operations = Operations(
            core,
            self._history,
            reload=self._reload,
            upgrade=self._upgrade.upgrade,
            refused=lambda: self._config.refused,
            more_problems=lambda: (
                *self._health_ports.problems,
                *core.reconciler.problems,
                *self._loop.problems,
            ),
        )
        listening = admin_socket(left, settings.admin_socket)
        self._servers = Servers(core, listening, self._operations, telemetry, self._acknowledged)

    async def run(self) -> int:
        """Start, serve until the order to stop, undo what was done to the node. Returns the exit code."""
        core = self._core
        try:
            # The workers come up while manifests are read.
            core.supervisor.start(
                Events(
                    acknowledged=self._acknowledged,
                    drained=self._loop.drained,
                    died=self._loop.worker_died,
                    connections=core.access.write,
                    trouble=self._telemetry.trouble,
                    failures=self._history.failed,
                )
            )
            for note in registry.find().notes:
                log.info(note)
            self._upgrade.begin()
            await self._start_feed()
            await self._serve()
            if self._lifecycle.making_way:
                await self._make_way()
        finally:
            await self._end()
        if self._lifecycle.fatal:
            log.error(self._lifecycle.fatal)
            return 1
        return 0

    # Start and end

    def _handle_signals(self) -> None:
        handle_signals(
            self._lifecycle,
            drain_timeout=lambda: self._core.settings.drain_timeout,
            reload=self._reloading.ask,
            upgrade=lambda: self._upgrade.ask(),  # noqa: PLW0108 - it is made later
        )

    async def _start_feed(self) -> None:
        core, settings = self._core, self._core.settings
        migrating = spawn(migration.migrate(settings), name="migration")
        core.feed = make_feed(settings, self._loop.snapshot_changed, self._node_changed)
        self._loop.look_around()
        self._loop.node_changed()
        # After an upgrade a signal must not end the program at once: clients are connected, and their relays
        # drain.
        with contextlib.nullcontext() if self._upgrade.goes_on else interruptible():
            read_first(core.feed)
        await migrating

    async def _serve(self) -> None:
        self._watchdog.start()
        self._config.follow()
        asyncio.get_running_loop().call_later(_ANSWER_SECONDS, self._servers.begin)
        summing_up = spawn(self._summariser.flush_every(5.0), name="logs:summary")
        following = spawn(self._core.feed.follow(), name="sources", on_failure=self._lifecycle.failed)
        try:
            await self._loop.run()
        finally:
            await cancel(following, summing_up)

    async def _make_way(self) -> None:
        """Have the next program take over. If that fails, stop as after an order."""
        core = self._core
        await self._health_ports.stop()
        await self._config.stop()
        listening = await self._servers.leave()
        await hold_signals()
        if self._lifecycle.making_way:  # nobody has ordered the end meanwhile
            self._summariser.flush(everything=True)
            core.access.close()
            self._upgrade.hand_over(listening)
            self._lifecycle.no_successor(core.settings.drain_timeout)
        self._handle_signals()
        self._servers.abandon(listening)

    async def _end(self) -> None:
        """Undo what was done to the node, even if the start failed half-way."""
        core, drain = self._core, self._lifecycle.drain_seconds
        self._lifecycle.phase = "draining"
        core.reconciler.close_listeners()
        await self._health_ports.stop()
        await asyncio.gather(core.supervisor.stop(drain), core.old_workers.stop(drain))
        core.reconciler.remove_addresses()
        await self._config.stop()
        await self._servers.stop()
        self._summariser.flush(everything=True)

    def _kill_workers(self) -> None:
        self._core.supervisor.kill()
        self._core.old_workers.kill()

    # What the parts report

    def _node_changed(self) -> None:
        self._telemetry.health.eligible = self._core.feed.eligible
        self._loop.node_changed()

    def _reconciled(self, desired: DesiredState) -> None:
        core = self._core
        self._acknowledged()
        self._history.unopened(desired.unopened)
        self._service_events.reconciled(desired)
        self._health_ports.update(core.snapshot, core.node, core.options)
        self._servers.changed()

    def _acknowledged(self) -> None:
        """A worker has acknowledged something, or the servers answer: maybe everything is in force now."""
        self._telemetry.acknowledged()
        if not self._loop.settled:
            return
        if not self._core.supervisor.telling():
            # The servers' imports take place while the workers carry out what they were sent.
            self._servers.begin()
        if not self._servers.begun or self._core.supervisor.lagging():
            return
        self._watchdog.in_force()
        self._loop.in_force()
        if self._on_serving is not None:
            on_serving, self._on_serving = self._on_serving, None
            on_serving(self._operations.picture())

    # What is ordered

    async def _reload(self) -> None:
        """Read the configuration and the manifests again, unless the end has begun."""
        if self._lifecycle.phase == "draining":
            return
        log.info("reloading")
        self._watchdog.reloading()
        self._core.access.reopen()
        logs.reopen()
        try:
            await self._config.reload()
            await self._core.feed.rescan()
        finally:
            self._watchdog.reloaded()
            self._loop.look_again()

    def _apply(self, settings: Settings) -> None:
        """Put settings in force that differ only in what may change at run time."""
        self._core.settings = settings
        self._core.options = planning_options(settings, may_route=limits.can_route())
        self._core.reconciler.set_drain(settings.drain_timeout)
        self._telemetry.settings_changed()
        self._loop.settings_changed()
