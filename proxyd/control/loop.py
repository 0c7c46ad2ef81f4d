"""The reconcile loop: after every change the desired state is planned and carried out."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

from proxyd.api.problems import Problem, Severity
from proxyd.control.config.options import in_use_around
from proxyd.control.core import Core
from proxyd.control.observe.telemetry import Telemetry
from proxyd.control.reconcile.repairs import Repairs
from proxyd.control.runtime.garbage import permanent_objects
from proxyd.control.runtime.logs import Summariser, get_logger
from proxyd.control.runtime.tasks import describe
from proxyd.control.workers.publication import Update
from proxyd.host.addresses import node_addresses
from proxyd.host.monitor import NodeMonitor
from proxyd.state.desired import DesiredState, Planner
from proxyd.state.occupied import Occupied, overlaps
from proxyd.state.snapshot import Snapshot
from proxyd.state.spec import ListenerKey, ServicePortName

log = get_logger("proxyd")

Stopped = asyncio.Task[Literal[True]]

_RETRY_SECONDS = 1.0  # after a reconcile that ended in an internal error
_ADDRESSES_SECONDS = 0.02  # from the first news of changed addresses to the look at them


class ReconcileLoop:
    """Waits for changes, and reconciles. One reconcile takes all changes that have come.

    Args:
        core: what is planned, and the parts that carry it out.
        telemetry: takes note of what is queued, published and carried out.
        summariser: logs what may happen over and over.
        held: who held each address in the program before this one.
        reconciled: called after each reconcile with the state that was desired.
        resynced: called with each look at the node, every --iptables-sync-period.
    """

    def __init__(
        self,
        core: Core,
        telemetry: Telemetry,
        summariser: Summariser,
        *,
        held: Mapping[ListenerKey, ServicePortName],
        reconciled: Callable[[DesiredState], None],
        resynced: Callable[[], None],
    ) -> None:
        self._core = core
        self._telemetry = telemetry
        self._summariser = summariser
        self._on_reconciled = reconciled
        self._resynced = resynced
        self._changed = asyncio.Event()
        self._reconciled = False  # the last reconcile went through
        self._planner = Planner()
        self._held = held
        options = core.options
        self._monitor = NodeMonitor(tables=options.vip_mode.route or options.steer_external_ips)
        self._addresses = node_addresses()
        self._occupied = Occupied()
        self._overlaps: tuple[str, ...] = ()  # what of the service range is in use
        self._addresses_due: asyncio.TimerHandle | None = None
        self._repairs = Repairs(core.reconciler.observe, self.look_again, time.monotonic)

    def close(self) -> None:
        """Stop watching the node."""
        self._repairs.close()
        self._monitor.close()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What is wrong with the node."""
        fights = (
            f"somebody removes again and again what proxyd has made ({kind}): see the log"
            for kind in self._repairs.fights
        )
        ranges = (f"--service-cluster-ip-range: {line}: no VIPs of it" for line in self._overlaps)
        return tuple(Problem(severity=Severity.WARNING, message=text) for text in (*fights, *ranges))

    def is_due(self) -> bool:
        """Whether there is something to do."""
        return self._changed.is_set()

    @property
    def settled(self) -> bool:
        """Whether all changes that have come were carried out, as far as possible."""
        return self._reconciled and not self.is_due()

    # What changes

    def snapshot_changed(self, snapshot: Snapshot) -> None:
        """The sources have other objects."""
        self._core.snapshot = snapshot
        self._telemetry.queued(snapshot)
        self.look_again()

    def node_changed(self) -> None:
        """What is known of this node has changed."""
        view = self._core.feed.node_view(self._addresses)
        self._core.node = msgspec.structs.replace(view, occupied=self._occupied)
        self.look_again()

    def look_around(self) -> bool:
        """Look at what is in use around the node. Returns whether that has changed."""
        core, before = self._core, self._occupied
        if core.options.vip_mode.route:
            try:
                self._occupied = in_use_around(core.settings, self._addresses)
            except OSError as error:
                log.warning("the node's networks can't be read", error=str(error))
        if self._occupied == before:
            return False
        told, self._overlaps = self._overlaps, tuple(overlaps(core.options.vip_ranges, self._occupied))
        for line in self._overlaps:
            if line not in told:
                log.warning("part of --service-cluster-ip-range is in use: no VIPs of it", what=line)
        core.feed.keep_clear(self._occupied)
        return True

    def settings_changed(self) -> None:
        """Other settings are in force."""
        self._telemetry.queued()
        self.look_again()

    def look_again(self) -> None:
        """Reconcile soon, for example because an address may be free."""
        self._changed.set()

    def in_force(self) -> None:
        """Every worker of this program has everything: those of earlier programs accept no more."""
        self._core.old_workers.retire()
        if self._core.reconciler.park_inherited():
            self.look_again()

    def drained(self, worker: int, listeners: list[int]) -> None:
        """The last relays of closed listeners, by number, have ended in a worker."""
        if self._core.reconciler.drained(worker, listeners):
            self.look_again()

    def worker_died(self, worker: int) -> None:
        """A worker has died with its relays."""
        self._telemetry.published()
        if self._core.reconciler.worker_died(worker):
            self.look_again()

    def _heard(self) -> None:
        """Somebody has changed something on the node."""
        news = self._monitor.drain()
        if news.addresses and self._addresses_due is None:
            # They come in bursts, as interfaces do.
            self._addresses_due = asyncio.get_running_loop().call_later(
                _ADDRESSES_SECONDS, self._addresses_changed
            )
        routes, rules = news.routes or news.overflow, news.rules or news.overflow
        self._repairs.suspect([*news.tables, *["routes"] * routes, *["rules"] * rules])

    def _addresses_changed(self) -> None:
        self._addresses_due = None
        before, self._addresses = self._addresses, node_addresses()
        gone = {address.ip for address in before} - {address.ip for address in self._addresses}
        self._repairs.found(self._core.reconciler.addresses_changed(gone))
        self._telemetry.queued()
        self.look_around()
        self.node_changed()

    # What is done

    async def run(self) -> None:
        """Reconcile until the daemon is told to stop.

        Nothing is opened or closed before every source has delivered its first full list.
        """
        loop = asyncio.get_running_loop()
        for descriptor in self._monitor.descriptors:
            loop.add_reader(descriptor, self._heard)
        stopped = asyncio.ensure_future(self._core.lifecycle.stop.wait())
        try:
            while not (self._core.feed.synced or self._core.lifecycle.stopping):
                self._changed.clear()
                await self._wait(stopped, None)
            if not self._core.lifecycle.stopping:
                self._core.lifecycle.phase = "serving"
                await self._turn_until(stopped)
        finally:
            stopped.cancel()
            self._repairs.close()
            if self._addresses_due is not None:
                self._addresses_due.cancel()
            for descriptor in self._monitor.descriptors:
                loop.remove_reader(descriptor)

    async def _turn_until(self, stopped: Stopped) -> None:
        core = self._core
        resync = time.monotonic() + core.settings.sync_period
        renewal = time.monotonic() + core.settings.config_sync_period
        while not core.lifecycle.stopping:
            began = time.monotonic()
            core.turns += 1
            self._changed.clear()
            self._try_to_reconcile()
            retry = core.reconciler.next_retry()
            due = min(resync, renewal) if retry is None else min(retry, resync, renewal)
            await self._wait(stopped, max(0.0, due - time.monotonic()))
            if (pause := began + core.settings.min_sync_period - time.monotonic()) > 0:
                await asyncio.wait({stopped}, timeout=pause)
            if time.monotonic() >= renewal:
                # A safety net: whatever is remembered of earlier plans is forgotten.
                log.debug("planning everything anew")
                self._planner = Planner()
                gc.collect()
                renewal = time.monotonic() + core.settings.config_sync_period
            if time.monotonic() >= resync:
                self._repairs.found(core.reconciler.observe())
                if self.look_around():
                    self.node_changed()
                self._resynced()
                resync = time.monotonic() + core.settings.sync_period

    async def _wait(self, stopped: Stopped, seconds: float | None) -> None:
        """Wait for a change or the order to stop, at most so many seconds (None: without a limit)."""
        changed = asyncio.ensure_future(self._changed.wait())
        await asyncio.wait({stopped, changed}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        changed.cancel()

    def _try_to_reconcile(self) -> None:
        try:
            self._reconciled = False
            with permanent_objects() if self._core.turns == 1 else contextlib.nullcontext():
                self._reconcile()
        except Exception as error:  # noqa: BLE001 - serving goes on; the next plan knows what was done
            self._summariser.error("reconcile", "reconcile failed: tried again in 1 s", error=describe(error))
            self._telemetry.reconcile_failed()
            asyncio.get_running_loop().call_later(_RETRY_SECONDS, self.look_again)

    def _reconcile(self) -> None:
        core = self._core
        began = time.perf_counter()
        desired = self._planner.desired(core.snapshot, core.node, core.options, self._held)
        self._held = self._planner.holders
        core.reconciler.reconcile(desired, core.supervisor.workers, self._publish)
        self._reconciled = True
        self._telemetry.reconciled(time.perf_counter() - began)
        self._on_reconciled(desired)

    def _publish(self, update: Update) -> None:
        self._core.supervisor.publish(update)
        self._telemetry.published()
