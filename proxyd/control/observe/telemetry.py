"""What the daemon shows of itself: its health, and the facts that metrics are made of."""

from __future__ import annotations

from collections import Counter

from proxyd.control.core import Core
from proxyd.control.observe.health import Health
from proxyd.control.observe.metrics import Facts, Metrics, WorkerState
from proxyd.control.runtime.logs import Summariser
from proxyd.relay.ipc.messages import Trouble
from proxyd.state.snapshot import Snapshot


class Telemetry:
    """Takes note of what the daemon does.

    Args:
        core: the daemon's parts.
        summariser: logs what happens often.
    """

    def __init__(self, core: Core, summariser: Summariser) -> None:
        self.health = Health(2 * core.settings.sync_period)
        self.metrics = Metrics()
        self._core = core
        self._summariser = summariser

    # What the daemon reports

    def settings_changed(self) -> None:
        """Other settings are in force."""
        self.health.timeout = 2 * self._core.settings.sync_period

    def queued(self, snapshot: Snapshot | None = None) -> None:
        """A change is to be carried out. `snapshot`: the objects, if it was they that changed."""
        self.health.queued()
        if snapshot is not None:
            self.metrics.changed(snapshot)

    def reconciled(self, seconds: float) -> None:
        """Everything was carried out in so many seconds, and sent to the workers."""
        self.health.updated()
        self.metrics.reconciled(seconds, self._core.publication.generation)

    def reconcile_failed(self) -> None:
        """An internal error prevented a reconcile."""
        self.health.queued()
        self.metrics.reconcile_failed()

    def published(self) -> None:
        """The workers were sent an update; or a worker that was started again is sent everything."""
        self.health.published(self._core.publication.generation)
        self.acknowledged()

    def acknowledged(self) -> None:
        """A worker acknowledged something."""
        generation = self._core.supervisor.acknowledged()
        self.health.acknowledged(generation)
        self.metrics.programming.acknowledged(generation)

    def trouble(self, worker: int, message: Trouble) -> None:
        """A worker met with trouble. The number of an old worker is negative."""
        for text, count in message.counts.items():
            # One line for each kind: for a Service and a reason, however many endpoints it has.
            kind = message.kinds.get(text, text)
            self._summariser.warning(kind, text, count=count, worker=abs(worker))
            self.metrics.trouble(text, count)

    # What is asked

    def healthy(self) -> bool:
        """Whether /livez would be 200."""
        return self.health.look().healthy

    def facts(self) -> Facts:
        """The daemon at this moment, for metrics. The loop waits for it: it takes microseconds."""
        core = self._core
        supervisor, publication, access = core.supervisor, core.publication, core.access
        desired = core.reconciler.desired
        workers = []
        for index in range(max(supervisor.count, 1)):
            worker = supervisor.workers.get(index)
            workers.append(
                WorkerState(
                    index=index,
                    pid=worker.pid if worker else 0,
                    ready=bool(worker and worker.ready),
                    lag=publication.generation - (worker.acknowledged if worker else 0),
                    restarts=supervisor.restarts.get(index, 0),
                )
            )
        return Facts(
            phase=core.lifecycle.phase,
            healthy=self.healthy(),
            endpoints=core.settings.metrics_endpoints,
            # Copies: the rest is done in a thread.
            balancers=tuple(desired.host.balancers.values()),
            unopened=tuple(desired.unopened),
            wanted=len(desired.host.listeners),
            failed=sum(key in desired.host.listeners for key in core.reconciler.failures),
            services=len(core.snapshot.services),
            publication=publication,
            generation=publication.generation,
            workers=tuple(workers),
            problems=Counter(str(problem.severity) for problem in core.feed.manifest_problems),
            synced_at=core.feed.synced_at,
            cluster=core.feed.cluster.facts_for_metrics() if core.feed.cluster else None,
            access_written=access.written,
            access_dropped=access.dropped,
            access_queued=access.queued,
        )
