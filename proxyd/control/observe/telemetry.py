"""How the daemon is observed and set anew: health, metrics, their servers, and the configuration read again."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from proxyd.control.config.file import Configuration, changes, effective, shown_field
from proxyd.control.config.settings import Settings, SettingsError
from proxyd.control.observe.health import Health
from proxyd.control.observe.metrics import Facts, Metrics, WorkerState
from proxyd.control.runtime import logs
from proxyd.control.runtime.logs import get_logger
from proxyd.control.runtime.tasks import cancel, spawn
from proxyd.sources.manifests.watch import watch
from proxyd.state.snapshot import Snapshot

if TYPE_CHECKING:
    from proxyd.control.daemon import Daemon
    from proxyd.control.observe.server import Observers

log = get_logger("config")


class Observation:
    """Takes note of what the daemon does, and answers for it.

    Args:
        daemon: whose health and metrics these are.
        configuration: where its settings came from; None: they never change.
    """

    def __init__(self, daemon: Daemon, configuration: Configuration | None = None) -> None:
        settings = daemon.settings
        self.health = Health(2 * settings.sync_period)
        self.metrics = Metrics()
        self._daemon = daemon
        self._configuration = configuration
        self._following: asyncio.Task[None] | None = None
        self._told: tuple[str, ...] = configuration.told if configuration else ()
        self.refused: tuple[str, ...] = ()  # what is wrong with the configuration; () = nothing
        self._observers: Observers | None = None

    async def start(self) -> None:
        """Open the servers, and follow the configuration file.

        Raises:
            BusyError: an address is taken, and that is to be an error.
        """
        if self._configuration is not None and self._configuration.path:
            self._following = spawn(self._follow(self._configuration.path), name="config")
        # Imported late: aiohttp takes a third of a second, which nobody who waits for a listener should wait for.
        from proxyd.control.observe.server import Observers  # noqa: PLC0415

        settings = self._daemon.settings
        self._observers = Observers(
            healthz=settings.healthz_address,
            metrics_at=settings.metrics_address,
            hard_fail=settings.bind_address_hard_fail,
            health=self.health,
            metrics=self.metrics,
            facts=self.facts,
            config=lambda: effective(self._daemon.settings),
            profiling=settings.profiling,
        )
        await self._observers.start()

    async def stop(self) -> None:
        """Close the servers. The data of metrics may go away afterwards."""
        if self._following is not None:
            await cancel(self._following)
        if self._observers is not None:
            await self._observers.stop()

    # What the daemon reports

    def changed(self, snapshot: Snapshot | None = None) -> None:
        """Something is to be carried out; where it was objects that changed, here they are."""
        self.health.queued()
        if snapshot is not None:
            self.metrics.changed(snapshot)

    def reconciled(self, seconds: float) -> None:
        """Everything was carried out, and the workers were told."""
        self.health.updated()
        self.metrics.reconciled(seconds, self._daemon.publication.generation)

    def reconcile_failed(self) -> None:
        """An internal error kept something from being carried out."""
        self.health.queued()
        self.metrics.reconcile_failed()

    def published(self) -> None:
        """The workers were told something; or a worker that begins anew is told everything."""
        self.health.published(self._daemon.publication.generation)
        self.acknowledged()

    def acknowledged(self) -> None:
        """A worker acknowledged something."""
        generation = self._daemon.supervisor.acknowledged()
        self.health.acknowledged(generation)
        self.metrics.programming.acknowledged(generation)

    # What is asked

    def facts(self) -> Facts:
        """The daemon at this moment, for metrics. Takes microseconds: the loop waits for it."""
        daemon = self._daemon
        healthy = self.health.look().healthy
        if not hasattr(daemon, "feed"):
            return Facts(phase=daemon.phase, healthy=healthy)
        supervisor, publication, access = daemon.supervisor, daemon.publication, daemon.access
        desired = daemon.reconciler.desired
        workers = []
        for index in range(max(supervisor.count, 1)):
            worker = supervisor.workers.get(index)
            workers.append(
                WorkerState(
                    index=index,
                    pid=worker.pid if worker else 0,
                    ready=bool(worker and worker.ready),
                    lag=publication.generation - (worker.acknowledged if worker else 0),
                    restarts=supervisor.restarts.get(index, 0),
                )
            )
        return Facts(
            phase=daemon.phase,
            healthy=healthy,
            endpoints=daemon.settings.metrics_endpoints,
            # Copies: the rest is done in a thread.
            balancers=tuple(desired.host.balancers.values()),
            unopened=tuple(desired.unopened),
            wanted=len(desired.host.listeners),
            failed=sum(key in desired.host.listeners for key in daemon.reconciler.failures),
            services=len(daemon.snapshot.services),
            publication=publication,
            generation=publication.generation,
            workers=tuple(workers),
            problems=Counter(str(problem.severity) for problem in daemon.feed.manifest_problems),
            synced_at=daemon.feed.synced_at,
            cluster=daemon.feed.cluster.facts_for_metrics() if daemon.feed.cluster else None,
            access_written=access.written,
            access_dropped=access.dropped,
            access_queued=access.queued,
        )

    # The configuration

    async def reload(self) -> None:
        """Read the configuration again, and put in force what can be. A wrong one changes nothing."""
        configuration, daemon = self._configuration, self._daemon
        if configuration is None or not configuration.path or not hasattr(daemon, "reconciler"):
            return
        try:
            wanted, warnings = await asyncio.to_thread(configuration.load)
        except SettingsError as error:
            self._refuse(error.problems)
            return
        self.metrics.config_read(valid=True)
        self.refused = ()
        lines = tuple(str(warning) for warning in warnings)
        if lines and self._told != lines:
            for line in lines:
                log.warning(line)
        now, later = changes(daemon.settings, wanted)
        if now:
            values = {field: getattr(wanted, field) for field in now}
            log.info("configuration changed", fields=sorted(map(shown_field, now)))
            self._apply(msgspec.structs.replace(daemon.settings, **values), now)
        restart = sorted(map(shown_field, later))
        if restart and self._told != (*lines, *restart):
            log.warning(f"restart needed for {', '.join(restart)}")  # noqa: G004 - the line is for people
        self._told = (*lines, *restart)

    def _refuse(self, problems: tuple[str, ...]) -> None:
        self.metrics.config_read(valid=False)
        self.refused = tuple(problems)
        if self._told != problems:
            for problem in problems:
                log.error(problem)
            log.error("the configuration is not valid: the earlier one stays in force")
        self._told = problems

    def _apply(self, settings: Settings, changed: frozenset[str]) -> None:
        if changed & {"verbosity", "log_format", "vmodule", "log_file"}:
            try:
                logs.configure(
                    settings.log_format,
                    settings.verbosity,
                    environ=os.environ,
                    rooms=settings.vmodule,
                    path=settings.log_file,
                )
            except OSError as error:
                log.error("the log file cannot be opened", path=settings.log_file, error=error.strerror)  # noqa: TRY400 - a trace says no more
        if "access_log" in changed:
            self._daemon.access.reopen(settings.access_log)
        self.health.timeout = 2 * settings.sync_period
        self._daemon.set_anew(settings)

    async def _follow(self, path: str) -> None:
        async with contextlib.aclosing(watch((path,))) as changes_seen:  # type: ignore[type-var]  # it is a generator
            async for _ in changes_seen:
                await self.reload()
