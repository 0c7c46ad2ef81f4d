"""The manifests feed: makes snapshots of files, with the standalone controllers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime

from proxyd.api.decode import Rules
from proxyd.api.problems import Problem, Severity
from proxyd.control.config.settings import Settings
from proxyd.control.runtime.garbage import permanent_objects
from proxyd.control.runtime.logs import get_logger
from proxyd.control.runtime.tasks import in_thread, spawn
from proxyd.sources.manifests.locate import located
from proxyd.sources.manifests.source import ManifestSet, ManifestSource
from proxyd.sources.manifests.watch import Change, watch
from proxyd.sources.standalone.allocation import NOTHING_TAKEN, Taken
from proxyd.sources.standalone.assemble import Assembled, Assembler, AssemblySettings
from proxyd.sources.standalone.statefile import load_allocations, save_allocations
from proxyd.state.snapshot import Snapshot

log = get_logger("manifests")

# Problems of one scan that are logged one by one; `proxyd check` shows them all.
_MAX_LOGGED = 20
# The largest file that is read once more to find the line of a problem.
_LOCATED_BYTES = 64 << 10


class ManifestFeed:
    """Follows manifests and hands on a snapshot whenever they change.

    Attributes:
        problems: the problems of the moment.
        missing: configured paths that cannot be read at all.
        files: how many files there are.
        synced_at: Unix time of the last scan; 0: none yet.
    """

    def __init__(self, settings: Settings, changed: Callable[[Snapshot], None]) -> None:
        self.problems: tuple[Problem, ...] = ()
        self.missing: tuple[str, ...] = ()
        self.files = 0
        self.synced_at = 0.0
        self._settings = settings
        self._changed = changed
        rules = Rules(
            node_port_range=settings.service_node_port_range,
            service_cidrs=settings.service_cluster_ip_range,
            allow_loopback_endpoints=settings.allow_loopback_endpoints,
        )
        self._source = ManifestSource(settings.manifests, rules)
        self._assembler = Assembler(
            AssemblySettings(
                cluster_cidrs=settings.service_cluster_ip_range,
                node_port_range=settings.service_node_port_range,
            )
        )
        self._allocations, warning = load_allocations(settings.state_file)
        if warning:
            log.warning(warning)
        self._assembled: Assembled | None = None
        self._withheld = NOTHING_TAKEN  # addresses and nodePorts that a cluster's Services have
        self._around = NOTHING_TAKEN  # what is in use around the node
        self._waits_for_cluster = False  # it is not known yet what they have
        self._save_error = ""
        self._lock = asyncio.Lock()

    def first(self) -> tuple[Problem, ...]:
        """Read everything once and hand it on. Returns the problems."""
        with permanent_objects():
            self._take(*self._read(None))
        return self.problems

    def first_unallocated(self) -> tuple[Problem, ...]:
        """Like `first`, but allocate and hand on nothing before `withhold` is called."""
        self._waits_for_cluster = True
        with permanent_objects():
            manifests = self._source.scan()
        self.synced_at = time.time()
        self.files, self.missing = manifests.files, manifests.missing
        self._log(manifests.problems, self._new(manifests.problems))
        self.problems = manifests.problems
        return self.problems

    async def withhold(self, taken: Taken) -> None:
        """From now on allocate nothing that is taken by a cluster's Services."""
        waited, self._waits_for_cluster = self._waits_for_cluster, False
        self._withheld = taken
        await self.rescan(None if waited else frozenset())

    def keep_clear(self, taken: Taken) -> None:
        """From now on allocate nothing that is in use around the node. Allocations among it move soon."""
        if taken != self._around:
            self._around = taken
            if self._assembled is not None:
                spawn(self.rescan(frozenset()), name="source:manifests:allocations")

    async def rescan(self, change: Change | None = None) -> None:
        """Read again what changed, and hand on a snapshot if it differs.

        Args:
            change: what may have changed; None: anything.
        """
        if self._waits_for_cluster:
            return  # `withhold` reads everything
        async with self._lock:
            self._take(*await in_thread(self._read, change))

    async def follow(self) -> None:
        """Rescan whenever files change; does not return."""
        async for change in watch(self._settings.manifests, warn=log.warning):
            await self.rescan(change)

    def _read(self, change: Change | None) -> tuple[ManifestSet, Assembled, list[Problem]]:
        """The manifests as they are now, and the new problems that are to be logged."""
        manifests = self._source.scan(change)
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        taken = self._withheld | self._around
        assembled = self._assembler.assemble(manifests, self._allocations, now, taken)
        return manifests, assembled, self._new(assembled.problems)

    def _new(self, problems: tuple[Problem, ...]) -> list[Problem]:
        known = set(self.problems)
        new = [problem for problem in problems if problem not in known]
        return [*_placed(new[:_MAX_LOGGED]), *new[_MAX_LOGGED:]]

    def _take(self, manifests: ManifestSet, assembled: Assembled, new: list[Problem]) -> None:
        self.synced_at = time.time()
        self.files, self.missing = manifests.files, manifests.missing
        if assembled is self._assembled:
            return
        self._assembled = assembled
        if assembled.allocations is not self._allocations:
            self._allocations = assembled.allocations
            error = save_allocations(self._settings.state_file, self._allocations) or ""
            if error and error != self._save_error:
                log.warning(error)
            self._save_error = error
        self._log(assembled.problems, new)
        self.problems = assembled.problems
        self._changed(assembled.snapshot)

    def _log(self, problems: tuple[Problem, ...], new: list[Problem]) -> None:
        for problem in new[:_MAX_LOGGED]:
            say = log.error if problem.severity is Severity.ERROR else log.warning
            say(str(problem))
        if len(new) > _MAX_LOGGED:
            log.warning("more problems; `proxyd check` shows them all", count=len(new) - _MAX_LOGGED)
        solved = len(set(self.problems).difference(problems))
        if solved:
            log.info("problems solved", count=solved)


def _placed(problems: list[Problem]) -> list[Problem]:
    """The problems, with line and column if their file is small enough to be read again."""
    small = set()
    for path in {problem.file for problem in problems if problem.file and not problem.line}:
        with contextlib.suppress(OSError):
            if os.stat(path).st_size <= _LOCATED_BYTES:  # noqa: PTH116 - the path is a text everywhere here
                small.add(path)
    return located(problems, tuple(small)) if small else problems
