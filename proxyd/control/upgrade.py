"""The upgrade of the running daemon: its end in this program, and its beginning in the next."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable

from proxyd import __version__
from proxyd.control.admin.unix_socket import listen
from proxyd.control.core import Core
from proxyd.control.runtime.logs import get_logger
from proxyd.control.runtime.tasks import spawn
from proxyd.control.workers import handover
from proxyd.control.workers.handover import DrainingWorker, Handover, ListeningSocket, UpgradeError
from proxyd.control.workers.old_workers import MAX_WORKERS

log = get_logger("upgrade")

# An answer that is under way is given before the next program begins.
_ANSWER_GIVEN_SECONDS = 0.05


def admin_socket(left: Handover, path: str) -> socket.socket:
    """The listening admin socket: that of the program before if it has the same path, or a new one.

    An inherited socket with another path is closed and removed, as nobody would answer there.

    Raises:
        AdminError: another daemon answers there, or the path cannot be used.
    """
    if left.admin < 0:
        return listen(path)
    if left.admin_path == path:
        return socket.socket(fileno=left.admin)
    listening = listen(path)
    os.close(left.admin)
    with contextlib.suppress(OSError):
        os.unlink(left.admin_path)  # noqa: PTH108 - one call on a local path, once
    return listening


class Upgrade:
    """What one daemon takes over from the program before it, and hands over to the next.

    Args:
        core: the parts of this program.
        left: what the program before this one handed over.
        replaceable: whether the next program can be started as this one was.
        begun: called when the upgrade begins.
    """

    def __init__(self, core: Core, left: Handover, replaceable: bool, begun: Callable[[], None]) -> None:
        self._core = core
        self._left = left
        self._replaceable = replaceable
        self._begun = begun
        self._checking = False

    @property
    def goes_on(self) -> bool:
        """Whether this program goes on from an earlier one, whose clients are still connected."""
        return bool(self._left.program)

    def begin(self) -> None:
        """Take over, before the first reconcile: sockets and the addresses that old workers need."""
        self._core.reconciler.inherit(self._left.listeners, self._core.old_workers)
        if self._left.program:
            log.info(
                "goes on from an earlier program",
                version=__version__,
                earlier=self._left.program,
                listeners=len(self._left.listeners),
                workers=len(self._core.old_workers),
            )

    async def upgrade(self) -> None:
        """Have the installed program take over, soon after this returns.

        Raises:
            UpgradeError: it can't, and nothing was changed.
        """
        lifecycle = self._core.lifecycle
        if not self._replaceable:
            raise UpgradeError("this daemon can't be upgraded: it was not started by `proxyd run`")
        if self._core.settings.workers == 0:
            raise UpgradeError("this daemon can't be upgraded: with --workers=0 its connections would end")
        if lifecycle.phase != "serving" or self._checking or lifecycle.making_way:
            raise UpgradeError("the daemon is starting, stopping or being upgraded")
        self._checking = True
        try:
            await handover.check(self._version)
        finally:
            self._checking = False
        if lifecycle.stopping:
            raise UpgradeError("the daemon is stopping")
        self._begun()
        lifecycle.make_way(_ANSWER_GIVEN_SECONDS)

    @property
    def _version(self) -> int:
        """Of the handover: an older program knows nothing of parked listeners."""
        return 2 if self._core.reconciler.vip_lookup else 1

    def ask(self) -> None:
        """Upgrade soon; does not wait. Errors go to the log."""
        spawn(self._try_to_upgrade(), name="upgrade")

    def hand_over(self, admin: int) -> None:
        """Become the next program. Returns only if that fails; then nothing has changed.

        Args:
            admin: descriptor of the listening admin socket.
        """
        core = self._core
        own, earlier = self._own_workers(), core.old_workers.hand_over()
        # This program's own workers all go on, however many they are.
        surplus = max(0, len(earlier) + len(own) - max(MAX_WORKERS, len(own)))
        for worker in earlier[:surplus]:
            log.warning(
                "a worker of an earlier program ends with its connections: there are too many", pid=worker.pid
            )
            core.old_workers.end(worker.pid)
        left = Handover(
            version=self._version,
            vip_lookup=core.reconciler.vip_lookup,
            program=__version__,
            admin_path=core.settings.admin_socket,
            admin=admin,
            listeners=[
                ListeningSocket(
                    *held.spec.key,
                    held.spec.steered,
                    held.socket.fileno(),
                    [key.ip for key in held.specs if key != held.spec.key],
                    held.spec.service_port,
                )
                for held in dict.fromkeys(core.publication.held.values())
            ],
            workers=[*earlier[surplus:], *own],
        )
        log.info("the next program takes over", listeners=len(left.listeners), workers=len(left.workers))
        try:
            handover.replace_program(left)
        except OSError as error:
            log.error("the next program can't be executed", error=str(error))  # noqa: TRY400 - one line

    def _own_workers(self) -> list[DrainingWorker]:
        core = self._core
        closed = core.reconciler.relayed()
        found = []
        for index, worker in core.supervisor.workers.items():
            listeners = [
                (held.id, *key) for key, held in core.publication.held.items() if held.owner in (None, index)
            ]
            listeners += [
                (number, *key)
                for number, (keys, workers) in closed.items()
                if index in workers
                for key in keys
            ]
            found.append(DrainingWorker(worker.pid, worker.channel.fileno(), listeners))
        return found

    async def _try_to_upgrade(self) -> None:
        try:
            await self.upgrade()
        except UpgradeError as error:
            log.error("no upgrade", error=str(error))  # noqa: TRY400 - one line is what an operator needs
