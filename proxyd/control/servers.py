"""The servers of the daemon: the admin API, health and metrics. They begin when the listeners are open."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from proxyd.control.config.file import effective
from proxyd.control.core import Core
from proxyd.control.observe.health import BusyError
from proxyd.control.runtime.tasks import cancel, spawn

if TYPE_CHECKING:
    from proxyd.control.admin.operations import Operations
    from proxyd.control.admin.server import AdminServer
    from proxyd.control.observe.server import HealthAndMetrics
    from proxyd.control.observe.telemetry import Telemetry


class Servers:
    """The admin API, health and metrics of one daemon.

    Args:
        core: the daemon's parts.
        listening: the admin socket, open from the start: who asks before the servers answer waits in its
            backlog.
        operations: what the admin API shows and does.
        telemetry: what health and metrics are answered from.
        answering: called when the servers answer.

    Attributes:
        begun: whether they answer.
    """

    def __init__(
        self,
        core: Core,
        listening: socket.socket,
        operations: Operations,
        telemetry: Telemetry,
        answering: Callable[[], None],
    ) -> None:
        self.begun = False
        self._core = core
        self._path = core.settings.admin_socket
        self._listening = listening
        self._operations = operations
        self._telemetry = telemetry
        self._answering = answering
        self._admin: AdminServer | None = None
        self._health_and_metrics: HealthAndMetrics | None = None
        self._starting: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start the servers, once."""
        if self._starting is None and not self._core.lifecycle.stopping:
            self._starting = spawn(self._start(), name="servers", on_failure=self._core.lifecycle.failed)

    def changed(self) -> None:
        """The state has changed: clients that watch it through the admin API are answered."""
        if self._admin is not None:
            self._admin.changed()

    def check_admin_socket(self) -> None:
        """Open the admin socket again if its file is gone."""
        if self.begun and not os.path.lexists(self._path):
            spawn(self._renew(), name="admin socket")

    async def stop(self) -> None:
        """End the servers, and remove the admin socket."""
        await self._stop_health_and_metrics()
        if self._admin is not None:
            await self._admin.stop()
        else:
            self._listening.close()
            self._unlink()

    async def leave(self) -> int:
        """End the servers, but leave the admin socket for the next program. Returns its descriptor."""
        kept = os.dup(self._listening.fileno())
        await self._stop_health_and_metrics()
        if self._admin is not None:
            await self._admin.stop(leave=True)
        return kept

    def abandon(self, kept: int) -> None:
        """There is no next program: remove what `leave` kept for it."""
        os.close(kept)
        self._unlink()

    def _unlink(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._path)  # noqa: PTH108 - one call on a local path, at exit

    async def _renew(self) -> None:
        assert self._admin is not None
        self._listening = await self._admin.renew() or self._listening

    async def _stop_health_and_metrics(self) -> None:
        """End these two. The data of metrics may go away afterwards."""
        if self._starting is not None:
            await cancel(self._starting)
        if self._health_and_metrics is not None:
            await self._health_and_metrics.stop()

    async def _start(self) -> None:
        # The imports take a third of a second, which nobody who waits for a listener should wait for.
        from proxyd.control.admin.server import AdminServer  # noqa: PLC0415
        from proxyd.control.observe.server import HealthAndMetrics  # noqa: PLC0415

        core, telemetry = self._core, self._telemetry
        self._admin = AdminServer(self._path, self._operations)
        await self._admin.start(self._listening)
        settings = core.settings
        self._health_and_metrics = HealthAndMetrics(
            healthz=settings.healthz_address,
            metrics_at=settings.metrics_address,
            hard_fail=settings.bind_address_hard_fail,
            health=telemetry.health,
            metrics=telemetry.metrics,
            facts=telemetry.facts,
            config=lambda: effective(core.settings),
            profiling=settings.profiling,
        )
        try:
            await self._health_and_metrics.start()
        except BusyError as error:
            core.lifecycle.give_up(str(error))
            return
        self.begun = True
        self._answering()
