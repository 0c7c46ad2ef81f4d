"""The manifests feed: files and standalone controllers in, snapshots out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime

from proxyd.api.decode import Rules
from proxyd.api.problems import Problem, Severity
from proxyd.control.logs import get_logger
from proxyd.control.settings import Settings
from proxyd.sources.manifests import ManifestSource
from proxyd.sources.standalone.assemble import Assembled, AssemblySettings, assemble
from proxyd.sources.statefile import load_allocations, save_allocations
from proxyd.sources.watch import watch
from proxyd.state.snapshot import Snapshot

log = get_logger("manifests")

# Problems of one scan that are logged one by one; `proxyd check` shows them all.
_MAX_LOGGED = 20


class Feed:
    """Follows manifests and hands on a snapshot whenever they change."""

    def __init__(self, settings: Settings, changed: Callable[[Snapshot], None]) -> None:
        self.problems: tuple[Problem, ...] = ()
        self.files = 0
        self.synced_at = 0.0  # Unix time of the last scan; 0: none yet
        self._settings = settings
        self._changed = changed
        rules = Rules(
            node_port_range=settings.service_node_port_range,
            service_cidrs=settings.service_cluster_ip_range,
            allow_loopback_endpoints=settings.allow_loopback_endpoints,
        )
        self._source = ManifestSource(settings.manifests, rules)
        self._assembly = AssemblySettings(
            cluster_cidrs=settings.service_cluster_ip_range,
            node_port_range=settings.service_node_port_range,
        )
        self._allocations, warning = load_allocations(settings.state_file)
        if warning:
            log.warning(warning)
        self._save_error = ""
        self._lock = asyncio.Lock()

    def first(self) -> tuple[Problem, ...]:
        """Read everything once and hand it on. Returns the problems."""
        self._take(self._read())
        return self.problems

    async def rescan(self) -> None:
        """Read again what changed, and hand on a snapshot if it differs."""
        async with self._lock:
            self._take(await asyncio.to_thread(self._read))

    async def follow(self) -> None:
        """Rescan whenever files change; does not return."""
        async for _ in watch(self._settings.manifests):
            await self.rescan()

    def _read(self) -> tuple[Assembled, int]:
        manifests = self._source.scan()
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        return assemble(manifests, self._allocations, self._assembly, now), manifests.files

    def _take(self, read: tuple[Assembled, int]) -> None:
        assembled, self.files = read
        if assembled.allocations != self._allocations:
            self._allocations = assembled.allocations
            error = save_allocations(self._settings.state_file, self._allocations) or ""
            if error and error != self._save_error:
                log.warning(error)
            self._save_error = error
        self._log(assembled.problems)
        self.problems = assembled.problems
        self.synced_at = time.time()
        self._changed(assembled.snapshot)

    def _log(self, problems: tuple[Problem, ...]) -> None:
        known = set(self.problems)
        new = [problem for problem in problems if problem not in known]
        for problem in new[:_MAX_LOGGED]:
            say = log.error if problem.severity is Severity.ERROR else log.warning
            say(str(problem))
        if len(new) > _MAX_LOGGED:
            log.warning("more problems; `proxyd check` shows them all", count=len(new) - _MAX_LOGGED)
        solved = len(known.difference(problems))
        if solved:
            log.info("problems solved", count=solved)
