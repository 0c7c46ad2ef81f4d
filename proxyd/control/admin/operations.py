"""What the admin API shows of the running daemon, and what an operator orders through it."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Hashable, Iterable

from proxyd import __version__
from proxyd.api.meta import ObjectName
from proxyd.api.problems import Problem
from proxyd.control.admin import views
from proxyd.control.admin.history import History
from proxyd.control.admin.picture import Picture, ServiceViews
from proxyd.control.admin.schema import (
    NOTHING_COUNTED,
    ConnectionsView,
    ConnectionView,
    Counters,
    DrainView,
    ReloadView,
    UpgradeView,
    WorkerFacts,
    total,
)
from proxyd.control.admin.selector import Selector
from proxyd.control.core import Core
from proxyd.control.workers.live_connections import MAX_RECORDS
from proxyd.control.workers.publication import Publication
from proxyd.relay.ipc.messages import LiveConnection
from proxyd.relay.ipc.slots import ATTEMPTS, BYTES_IN, BYTES_OUT, CLOSED, CONNECT_US, FAILED, OPENED, REFUSED
from proxyd.state.spec import Endpoint, ServicePortName


class Operations:
    """Makes the picture of one daemon, and carries out orders.

    Args:
        core: the daemon's parts.
        history: what happened to Services.
        reload: reads the configuration and the manifests again.
        upgrade: has the installed program take over; raises UpgradeError.
        refused: gives what is wrong with the configuration that was read last.
        more_problems: gives the problems that are not of objects.
    """

    def __init__(
        self,
        core: Core,
        history: History,
        *,
        reload: Callable[[], Awaitable[None]],
        upgrade: Callable[[], Awaitable[None]],
        refused: Callable[[], tuple[str, ...]],
        more_problems: Callable[[], Iterable[Problem]],
    ) -> None:
        self.history = history
        self._core = core
        self._reload = reload
        self._upgrade = upgrade
        self._refused = refused
        self._more_problems = more_problems
        self._service_views = ServiceViews()

    def picture(self) -> Picture:
        """What the daemon is and does at this moment."""
        core = self._core
        publication, reconciler, supervisor = core.publication, core.reconciler, core.supervisor

        def counters(service_port: ServicePortName) -> Counters:
            keys = publication.balancer_keys(service_port)
            return total([_counters(publication, key) for key in keys])

        def endpoint_counters(service_port: ServicePortName, endpoint: Endpoint) -> Counters:
            keys = publication.balancer_keys(service_port)
            return total(_counters(publication, (key, endpoint)) for key in keys)

        return Picture(
            version=__version__,
            pid=os.getpid(),
            phase=core.lifecycle.phase,
            started=core.started,
            snapshot=core.snapshot,
            statuses=reconciler.statuses(),
            balancers=reconciler.desired.host.balancers,
            service_views=self._service_views,
            old_workers=core.old_workers.pids,
            vip_listen=core.vip_listen,
            problems=(*core.feed.problems, *self._more_problems()),
            counters=counters,
            endpoint_counters=endpoint_counters,
            generation=publication.generation,
            workers=tuple(
                WorkerFacts(
                    pid=worker.pid,
                    state="ready" if worker.ready else "starting",
                    generation=worker.acknowledged,
                    restarts=supervisor.restarts.get(worker.index, 0),
                )
                for worker in supervisor.workers.values()
            ),
            sources=core.feed.facts,
        )

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
        supervisor = self._core.supervisor
        pids = {index: worker.pid for index, worker in supervisor.workers.items()}
        pids |= {-pid: pid for pid in self._core.old_workers.pids}
        # Connections that the selector leaves out must not use up the limit.
        asked = MAX_RECORDS if selector else limit
        found = await supervisor.live_query.ask(namespace=namespace, name=name, limit=asked)
        items = [_view(record, pids.get(worker, 0)) for worker, record in found.records]
        if selector:
            chosen = views.chosen(self.picture(), selector)
            items = [item for item in items if ObjectName(item.namespace, item.name) in chosen]
        items.sort(key=lambda item: (item.namespace, item.name, item.port, -item.age))
        return ConnectionsView(
            items=tuple(items[:limit]),
            more=found.more + max(0, len(items) - limit),
            silent_workers=tuple(pids[worker] for worker in found.silent if worker in pids),
        )

    async def reload(self) -> ReloadView:
        """Read the configuration and the manifests again, as SIGHUP does, and wait until that is done."""
        await self._reload()
        feed = self._core.feed
        return ReloadView(
            files=feed.files,
            services=len(self._core.snapshot.services),
            problems=feed.problems,
            configuration=self._refused(),
        )

    async def upgrade(self) -> UpgradeView:
        """Have the program that is installed now take over.

        Raises:
            UpgradeError: it would not start, or this one can't be replaced now.
        """
        await self._upgrade()
        return UpgradeView(pid=os.getpid(), version=__version__, started=self._core.started)

    def drain(self, seconds: float | None) -> DrainView:
        """Stop accepting, let relays finish, then end. A daemon that is stopping already is not changed.

        Args:
            seconds: that relays have; None for the drain timeout of the settings.
        """
        before = views.status(self.picture(), now=0.0)
        wanted = self._core.settings.drain_timeout if seconds is None else seconds
        return DrainView(
            phase="draining",
            timeout_seconds=self._core.lifecycle.drain(wanted),
            connections=before.connections,
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


def _counters(publication: Publication, owner: Hashable) -> Counters:
    row = publication.row(owner)
    if not any(row):
        return NOTHING_COUNTED
    return Counters(
        opened=row[OPENED],
        closed=row[CLOSED],
        failed=row[FAILED],
        attempts=row[ATTEMPTS],
        bytes_in=row[BYTES_IN],
        bytes_out=row[BYTES_OUT],
        connect_us=row[CONNECT_US],
        refused=row[REFUSED],
    )
