"""The cluster feed: follows the API server that the settings name, and logs what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from proxyd import __version__
from proxyd.api.meta import ObjectName
from proxyd.api.problems import Problem, Severity
from proxyd.api.service import Service
from proxyd.control.config.settings import Settings
from proxyd.control.feeds.facts import ClusterFacts, SourceFacts
from proxyd.control.runtime.logs import get_logger
from proxyd.sources.cluster import (
    DURATION_BOUNDS,
    ClusterSource,
    ClusterState,
    EventAbout,
    KubeconfigError,
    Node,
    load_access,
)
from proxyd.state.snapshot import Snapshot

__all__ = ["ClusterFeed", "KubeconfigError"]

log = get_logger("cluster")

_AGENT = f"proxyd/{__version__}"


class ClusterFeed:
    """Follows the API server, and posts Events to it.

    Args:
        settings: where the API server is, and the name of this node.
        changed: called in the event loop when everything has been listed, and then after every change.

    Raises:
        KubeconfigError: the settings do not say where the API server is, or how to log in to it.

    Attributes:
        snapshot: Services and slices, the same object as long as nothing changes.
        node: this node's Node; None: it is unknown.
        eligible: whether load balancers should send this node traffic; not if its Node is gone.
    """

    def __init__(self, settings: Settings, changed: Callable[[], None]) -> None:
        self.snapshot = Snapshot()
        self.node: Node | None = None
        self.eligible = True
        self._changed = changed
        self._node_name = settings.node_name
        self._source = ClusterSource(
            load_access(settings.kubeconfig, settings.master),
            node_name=settings.node_name,
            proxy_name=settings.service_proxy_name,
            kubeconfig=settings.kubeconfig,
            master=settings.master,
            qps=settings.kube_api_qps,
            burst=settings.kube_api_burst,
            agent=_AGENT,
            on_change=self._take,
            on_problem=_log_problem,
            on_solved=log.info,
        )
        self._synced = False

    @property
    def synced(self) -> bool:
        """Whether everything has been listed and handed on."""
        return self._synced

    @property
    def services(self) -> Mapping[ObjectName, Service]:
        """The cluster's Services."""
        return self.snapshot.services

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The problems of the moment."""
        return self._source.problems

    @property
    def facts(self) -> SourceFacts:
        """The state of this source, for `proxyd status`."""
        source = self._source
        return SourceFacts(name=f"kube {source.server}", synced=self._synced, last_event=source.last_event_at)

    def facts_for_metrics(self) -> ClusterFacts:
        """The counts so far, copied for metrics."""
        stats = self._source.stats
        return ClusterFacts(
            requests=dict(stats.requests),
            durations={key: (tuple(one.buckets), one.total) for key, one in stats.durations.items()},
            bounds=DURATION_BOUNDS,
            events_dropped=self._source.events_dropped,
            lists=self._source.lists,
            problems=len(self._source.problems),
            synced=self._synced,
            last_event=self._source.last_event_at,
        )

    async def run(self) -> None:
        """Follow the API server until cancelled; then all connections are closed."""
        log.info("following the API server", server=self._source.server, node=self._node_name)
        if self._node_name:
            self.about_node("Normal", "Starting", "proxyd serves this node's Services")
        await self._source.run()

    def reread(self) -> None:
        """Read the kubeconfig again for the next request."""
        self._source.reread()

    def about_node(self, type_: str, reason: str, message: str) -> None:
        """Post an Event about this node, without waiting for it."""
        name = self._node_name
        # The uid is the name, as in kubernetes cmd/kube-proxy/app/server.go: tools that show a node's Events
        # ask for that.
        self._source.post_event(EventAbout(kind="Node", name=name, uid=name), type_, reason, message)

    def about_service(self, name: ObjectName, type_: str, reason: str, message: str) -> bool:
        """Post an Event about a Service. Returns whether the cluster has it."""
        service = self.snapshot.services.get(name)
        if service is None:
            return False
        about = EventAbout(kind="Service", name=name.name, namespace=name.namespace, uid=service.metadata.uid)
        self._source.post_event(about, type_, reason, message)
        return True

    def _take(self, state: ClusterState) -> None:
        seen, self.node = self.node, state.node
        if state.node is not None or seen is not None:
            self.eligible = state.node is not None and state.node.eligible
        if state.services is not self.snapshot.services or state.slices is not self.snapshot.slices:
            self.snapshot = Snapshot(services=state.services, slices=state.slices)
        if not self._synced:
            self._synced = True
            log.info(
                "the API server's objects are known",
                server=self._source.server,
                services=len(state.services),
                endpoints=self._source.endpoints_api,
            )
        self._changed()


def _log_problem(problem: Problem) -> None:
    say = log.error if problem.severity is Severity.ERROR else log.warning
    say(str(problem))
