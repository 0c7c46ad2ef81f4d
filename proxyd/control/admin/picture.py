"""Draws the picture of the daemon that the admin API shows."""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import TYPE_CHECKING

import msgspec

from proxyd import __version__
from proxyd.control.admin.schema import NOTHING_COUNTED, Counters, WorkerFacts, total
from proxyd.control.admin.views import Picture
from proxyd.control.workers.publication import Publication
from proxyd.relay.ipc.slots import ATTEMPTS, BYTES_IN, BYTES_OUT, CLOSED, CONNECT_US, FAILED, OPENED, REFUSED
from proxyd.state.spec import Endpoint, ServicePortName

if TYPE_CHECKING:
    from proxyd.control.daemon import Daemon


def draw(daemon: Daemon) -> Picture:
    """The daemon at this moment; of one that is still starting, what is known so far."""
    bare = Picture(version=__version__, pid=os.getpid(), phase=daemon.phase, started=daemon.started)
    if not hasattr(daemon, "feed"):
        return bare
    publication, reconciler, supervisor, feed = (
        daemon.publication,
        daemon.reconciler,
        daemon.supervisor,
        daemon.feed,
    )

    def counters(service_port: ServicePortName) -> Counters:
        keys = publication.balancer_keys(service_port)
        return total([_counters(publication, key) for key in keys])

    def endpoint_counters(service_port: ServicePortName, endpoint: Endpoint) -> Counters:
        keys = publication.balancer_keys(service_port)
        return total(_counters(publication, (key, endpoint)) for key in keys)

    return msgspec.structs.replace(
        bare,
        snapshot=daemon.snapshot,
        statuses=reconciler.statuses(),
        balancers=reconciler.desired.host.balancers,
        faces=daemon.faces,
        leaving=daemon.succession.workers.pids if daemon.succession.workers else (),
        problems=(*feed.problems, *daemon.duties.problems),
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
        sources=feed.facts,
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
