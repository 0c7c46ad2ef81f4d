"""The upgrade of the running daemon: its end in this program, and its beginning in the next."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

from proxyd import __version__
from proxyd.control.runtime.logs import get_logger
from proxyd.control.runtime.tasks import spawn
from proxyd.control.workers import handover
from proxyd.control.workers.handover import Handover, Leaving, ListeningSocket, UpgradeError
from proxyd.control.workers.old_workers import MAX_WORKERS, LeavingWorkers
from proxyd.control.workers.orphans import Strays

if TYPE_CHECKING:
    from proxyd.control.daemon import Daemon

log = get_logger("upgrade")


class Succession:
    """What one daemon takes over, and hands over.

    Args:
        daemon: of this program.
        left: what the program before it left; None where there was none.
    """

    def __init__(self, daemon: Daemon, left: Handover | None) -> None:
        self._daemon = daemon
        self._left = left or Handover()
        self._strays = Strays({worker.pid for worker in self._left.workers})
        self._began = time.monotonic()
        self._checking = False
        self.due = False  # the next program is to begin
        self.workers: LeavingWorkers | None = None

    @property
    def admin(self) -> int:
        """The listening admin socket that was left for the path in use; -1 where there is none."""
        return self._left.admin if self._left.admin_path == self._daemon.settings.admin_socket else -1

    @property
    def goes_on(self) -> bool:
        """Whether there was a program before this one, with clients that are still served."""
        return bool(self._left.program)

    def begin(self) -> None:
        """Take over. Before the first reconcile, in the event loop."""
        daemon = self._daemon
        self._strays.watch()
        if self.admin < 0 <= self._left.admin:  # the path was changed: nobody would answer at the old one
            os.close(self._left.admin)
            with contextlib.suppress(OSError):
                os.unlink(self._left.admin_path)  # noqa: PTH108 - one call on a local path, once
        self.workers = LeavingWorkers(
            self._left.workers,
            daemon.supervisor.heard,
            daemon.look_again,
            daemon.supervisor.roundups.gone,
        )
        daemon.reconciler.inherit(self._left.listeners, self.workers)
        daemon.supervisor.roundups.also(self.workers.tell)
        if self._left.program:
            log.info(
                "goes on from an earlier program",
                version=__version__,
                earlier=self._left.program,
                listeners=len(self._left.listeners),
                workers=len(self.workers),
            )

    def in_force(self) -> None:
        """This program's own workers have everything: those of earlier ones accept no more."""
        if self.workers is not None:
            self.workers.retire()

    def probe(self) -> None:
        """See whether the workers of earlier programs answer."""
        if self.workers is not None:
            self.workers.probe()

    async def upgrade(self) -> None:
        """Have the program that is installed now take over, soon after this returns.

        Raises:
            UpgradeError: nothing was changed, and why.
        """
        daemon = self._daemon
        if not daemon.replaceable:
            raise UpgradeError("this daemon can't be upgraded: it was not started by `proxyd run`")
        if daemon.settings.workers == 0:
            raise UpgradeError("this daemon can't be upgraded: with --workers=0 its connections would end")
        if daemon.phase != "serving" or self._checking or self.due:
            raise UpgradeError("the daemon is starting, stopping or being upgraded")
        self._checking = True
        try:
            await handover.check()
        finally:
            self._checking = False
        if daemon.stopping:
            raise UpgradeError("the daemon is stopping")
        self.due = True
        daemon.make_way()

    def ask(self) -> None:
        """Upgrade; what is wrong goes to the log."""
        spawn(self._upgrade_or_say_why(), name="upgrade")

    def hand_over(self, admin: int) -> None:
        """Become the next program. Returns where that fails: everything is as it was.

        Args:
            admin: the listening admin socket.
        """
        daemon = self._daemon
        assert self.workers is not None
        own, earlier = self._own_workers(), self.workers.hand_over()
        # Those of this program all go on, however many.
        surplus = max(0, len(earlier) + len(own) - max(MAX_WORKERS, len(own)))
        for worker in earlier[:surplus]:
            log.warning(
                "a worker of an earlier program ends with its connections: there are too many", pid=worker.pid
            )
            self.workers.end(worker.pid)
        left = Handover(
            program=__version__,
            admin_path=daemon.settings.admin_socket,
            admin=admin,
            listeners=[
                ListeningSocket(
                    *held.spec.key,
                    held.spec.steered,
                    held.socket.fileno(),
                    [key.ip for key in held.specs if key != held.spec.key],
                )
                for held in dict.fromkeys(daemon.publication.held.values())
            ],
            workers=[*earlier[surplus:], *own],
        )
        log.info("the next program takes over", listeners=len(left.listeners), workers=len(left.workers))
        try:
            handover.replace_program(left)
        except OSError as error:
            log.error("the next program can't be executed", error=str(error))  # noqa: TRY400 - one line is what an operator needs

    def _own_workers(self) -> list[Leaving]:
        daemon = self._daemon
        closed = daemon.reconciler.relayed()
        found = []
        for index, worker in daemon.supervisor.workers.items():
            listeners = [
                (held.id, *key)
                for key, held in daemon.publication.held.items()
                if held.owner in (None, index)
            ]
            listeners += [
                (number, *key)
                for number, (keys, workers) in closed.items()
                if index in workers
                for key in keys
            ]
            found.append(Leaving(worker.pid, worker.channel.fileno(), listeners))
        return found

    async def _upgrade_or_say_why(self) -> None:
        try:
            await self.upgrade()
        except UpgradeError as error:
            log.error("no upgrade", error=str(error))  # noqa: TRY400 - one line is what an operator needs
