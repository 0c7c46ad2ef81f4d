"""When the daemon begins to answer: the admin socket is open from the start, its server comes after the listeners."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import socket
from typing import TYPE_CHECKING

from proxyd.control.admin.unix_socket import listen
from proxyd.control.observe.health import BusyError
from proxyd.control.runtime.tasks import cancel, spawn

if TYPE_CHECKING:
    from proxyd.control.admin.server import AdminServer
    from proxyd.control.daemon import Daemon


def prepare() -> None:
    """Import what the servers need. It takes a third of a second, which nobody who waits for a listener should wait for."""
    importlib.import_module("proxyd.control.admin.server")
    importlib.import_module("proxyd.control.observe.server")


class Answering:
    """The servers of one daemon: the admin API, health and metrics.

    Args:
        daemon: that they answer for.

    Raises:
        AdminError: the admin socket can't be opened.

    Attributes:
        begun: whether they answer.
    """

    def __init__(self, daemon: Daemon) -> None:
        self.begun = False
        self._daemon = daemon
        self._path = daemon.settings.admin_socket
        left = daemon.succession.admin
        self._listening = socket.socket(fileno=left) if left >= 0 else listen(self._path)
        self._admin: AdminServer | None = None
        self._starting: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start the servers, once; who asked before has waited in the backlog."""
        if self._starting is None and not self._daemon.stopping:
            self._starting = spawn(self._start(), name="servers", on_failure=self._daemon.failed)

    def changed(self) -> None:
        """The state changed: who watches it is told."""
        if self._admin is not None:
            self._admin.changed()

    def look(self) -> None:
        """See whether the admin socket is still there, and open it again where it is not."""
        if self.begun and not os.path.lexists(self._path):
            spawn(self._look(), name="admin socket")

    async def _look(self) -> None:
        assert self._admin is not None
        self._listening = await self._admin.renew() or self._listening

    async def stop(self) -> None:
        """End the servers, and take the admin socket away."""
        if self._starting is not None:
            await cancel(self._starting)
        await self._daemon.observation.stop()
        if self._admin is not None:
            await self._admin.stop()
        else:
            self._listening.close()
            with contextlib.suppress(OSError):
                os.unlink(self._path)  # noqa: PTH108 - one call on a local path, at exit

    async def leave(self) -> int:
        """End the servers, but leave the admin socket for the next program. Returns its descriptor."""
        kept = os.dup(self._listening.fileno())
        if self._starting is not None:
            await cancel(self._starting)
        await self._daemon.observation.stop()
        if self._admin is not None:
            await self._admin.stop(leave=True)
        return kept

    def abandon(self, kept: int) -> None:
        """There is no next program: take away what `leave` left for it."""
        os.close(kept)
        with contextlib.suppress(OSError):
            os.unlink(self._path)  # noqa: PTH108 - as above

    async def _start(self) -> None:
        from proxyd.control.admin.server import AdminServer  # noqa: PLC0415 - see `prepare`

        daemon = self._daemon
        self._admin = AdminServer(self._path, daemon.picture, daemon.operations)
        await self._admin.start(self._listening)
        try:
            await daemon.observation.start()
        except BusyError as error:
            daemon.give_up(str(error))
            return
        self.begun = True
        daemon.acknowledged()
