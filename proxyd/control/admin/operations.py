"""What an operator orders and asks of the running daemon through the admin API."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from proxyd import __version__
from proxyd.api.meta import ObjectName
from proxyd.control.admin import views
from proxyd.control.admin.history import History
from proxyd.control.admin.schema import ConnectionsView, ConnectionView, DrainView, ReloadView, UpgradeView
from proxyd.control.admin.selector import Selector
from proxyd.control.workers.live_connections import MAX_RECORDS
from proxyd.relay.ipc.messages import LiveConnection

if TYPE_CHECKING:
    from proxyd.control.daemon import Daemon


class Operations:
    """Carries out orders.

    Args:
        daemon: that is ordered.
    """

    def __init__(self, daemon: Daemon) -> None:
        self.history = History()
        self._daemon = daemon

    async def connections(
        self, *, namespace: str = "", name: str = "", selector: Selector, limit: int = MAX_RECORDS
    ) -> ConnectionsView:
        """The connections that are alive, in order of service port and age.

        Args:
            namespace: "" for all.
            name: of Services; "" for all.
            selector: of their labels.
            limit: of items. With a selector, `more` may count connections of other Services.
        """
        supervisor = self._daemon.supervisor
        pids = {index: worker.pid for index, worker in supervisor.workers.items()}
        if (leaving := self._daemon.succession.workers) is not None:
            pids |= {-pid: pid for pid in leaving.pids}
        # What a selector leaves out must not use up the limit.
        asked = MAX_RECORDS if selector else limit
        found = await supervisor.roundups.ask(namespace=namespace, name=name, limit=asked)
        items = [_view(record, pids.get(worker, 0)) for worker, record in found.records]
        if selector:
            chosen = views.chosen(self._daemon.picture(), selector)
            items = [item for item in items if ObjectName(item.namespace, item.name) in chosen]
        items.sort(key=lambda item: (item.namespace, item.name, item.port, -item.age))
        return ConnectionsView(
            items=tuple(items[:limit]),
            more=found.more + max(0, len(items) - limit),
            silent_workers=tuple(pids[worker] for worker in found.silent if worker in pids),
        )

    async def reload(self) -> ReloadView:
        """Read the configuration and the manifests again, as SIGHUP does, and wait until that is done."""
        daemon = self._daemon
        await daemon.reload()
        return ReloadView(
            files=daemon.feed.files,
            services=len(daemon.snapshot.services),
            problems=daemon.feed.problems,
            configuration=daemon.observation.refused,
        )

    async def upgrade(self) -> UpgradeView:
        """Have the program that is installed now take over.

        Raises:
            UpgradeError: it would not start, or this one can't be replaced now.
        """
        daemon = self._daemon
        await daemon.succession.upgrade()
        return UpgradeView(pid=os.getpid(), version=__version__, started=daemon.started)

    def drain(self, seconds: float | None) -> DrainView:
        """Stop accepting, let relays finish for so long, exit. A daemon that is stopping keeps to what it was told."""
        daemon = self._daemon
        before = views.status(daemon.picture(), now=0.0)
        wanted = daemon.settings.drain_timeout if seconds is None else seconds
        return DrainView(
            phase="draining", timeout_seconds=daemon.drain(wanted), connections=before.connections
        )


def _view(record: LiveConnection, pid: int) -> ConnectionView:
    namespace, _, rest = record.service.partition("/")
    name, _, port = rest.partition(":")
    return ConnectionView(
        namespace=namespace,
        name=name,
        port=port,
        protocol=record.protocol,
        client=record.client,
        frontend=record.frontend,
        endpoint=record.endpoint,
        state=record.state,
        age=record.seconds,
        bytes_in=record.bytes_in,
        bytes_out=record.bytes_out,
        streams_in=record.streams[0],
        streams_out=record.streams[1],
        client_path=record.paths[0],
        endpoint_path=record.paths[1],
        worker=pid,
    )
