"""Draws the picture of the daemon that the admin API shows."""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import TYPE_CHECKING

import msgspec

from proxyd import __version__
from proxyd.control.answers import Counters, SourceFacts, WorkerFacts
from proxyd.control.publication import Publication
from proxyd.control.views import Picture
from proxyd.relay.slots import ATTEMPTS, BYTES_IN, BYTES_OUT, CLOSED, CONNECT_US, FAILED, OPENED, REFUSED
from proxyd.state.spec import Endpoint, ServicePortName

if TYPE_CHECKING:
    from proxyd.control.daemon import Daemon

_FIELDS = (OPENED, CLOSED, FAILED, ATTEMPTS, BYTES_IN, BYTES_OUT, CONNECT_US, REFUSED)


def draw(daemon: Daemon) -> Picture:
    """The daemon at this moment; of one that is still starting, what is known so far."""
    bare = Picture(version=__version__, pid=os.getpid(), phase=daemon.phase, started=daemon.started)
    if daemon.phase == "starting":
        return bare
    publication, reconciler, supervisor, feed = (
        daemon.publication,
        daemon.reconciler,
        daemon.supervisor,
        daemon.feed,
    )

    def counters(service_port: ServicePortName) -> Counters:
        keys = publication.balancer_keys(service_port)
        return sum((_counters(publication, key) for key in keys), start=Counters())

    def endpoint_counters(service_port: ServicePortName, endpoint: Endpoint) -> Counters:
        keys = publication.balancer_keys(service_port)
        return sum((_counters(publication, (key, endpoint)) for key in keys), start=Counters())

    return msgspec.structs.replace(
        bare,
        snapshot=daemon.snapshot,
        statuses=reconciler.statuses(),
        balancers=reconciler.desired.host.balancers,
        problems=feed.problems,
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
        sources=tuple(
            SourceFacts(name=f"manifests {path}", synced=feed.synced_at > 0, last_event=feed.synced_at)
            for path in daemon.settings.manifests
        ),
    )


def _counters(publication: Publication, owner: Hashable) -> Counters:
    opened, closed, failed, attempts, bytes_in, bytes_out, connect_us, refused = publication.counters(
        owner, _FIELDS
    )
    return Counters(
        opened=opened,
        closed=closed,
        failed=failed,
        attempts=attempts,
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        connect_us=connect_us,
        refused=refused,
    )
