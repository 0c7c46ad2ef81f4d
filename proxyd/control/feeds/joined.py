"""Joins the sources, manifests, an API server or both, into one snapshot and the view of this node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from proxyd.api.meta import ObjectName
from proxyd.api.problems import Problem, Severity
from proxyd.control.config.settings import Settings
from proxyd.control.feeds.facts import SourceFacts
from proxyd.control.feeds.manifests import ManifestFeed
from proxyd.control.feeds.merge import SnapshotMerger, TakenByCluster
from proxyd.control.runtime.logs import get_logger
from proxyd.control.runtime.tasks import spawn
from proxyd.sources.manifests.watch import Change
from proxyd.sources.standalone.allocation import taken_around
from proxyd.state.occupied import Occupied
from proxyd.state.snapshot import NodeAddress, NodeView, Snapshot

if TYPE_CHECKING:
    from proxyd.control.feeds.cluster import ClusterFeed

log = get_logger("sources")

_MAX_LOGGED = 20  # Services that are hidden by the cluster's; `proxyd status` has them all


class FeedError(ValueError):
    """A source can't be used; the text is one line."""


class JoinedFeed:
    """Follows every source that the settings name, and hands on a snapshot whenever one of them changes.

    Nothing is handed on before every source has delivered its first full list. If there are both manifests
    and a cluster, manifests never get addresses or nodePorts of the cluster's Services, and of two Services
    with the same name the cluster's is served.

    Args:
        settings: name the sources.
        changed: takes each snapshot, in the event loop.
        node_changed: called when what is known of this node has changed.

    Raises:
        FeedError: the settings do not say where the API server is, or how to log in to it.

    Attributes:
        missing: configured paths that cannot be read at all.
        cluster: the feed of the API server; None if there is none.
    """

    def __init__(
        self,
        settings: Settings,
        changed: Callable[[Snapshot], None],
        node_changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._changed = changed
        self._node_changed = node_changed
        self._from_manifests: Snapshot | None = None
        self._merger = SnapshotMerger()
        self._taken = TakenByCluster()
        self._withholding: asyncio.Task[None] | None = None
        self._node: object = None
        self._eligible = True
        self._hidden: tuple[Problem, ...] = ()
        self.cluster: ClusterFeed | None = (
            _cluster(settings, self._cluster_changed) if settings.cluster else None
        )
        self._manifests = ManifestFeed(settings, self._manifests_changed) if settings.manifests else None

    @property
    def synced(self) -> bool:
        """Whether every source has delivered its first full list."""
        return (self._manifests is None or self._from_manifests is not None) and (
            self.cluster is None or self.cluster.synced
        )

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The problems of the moment."""
        return (*self.manifest_problems, *(self.cluster.problems if self.cluster else ()))

    @property
    def manifest_problems(self) -> tuple[Problem, ...]:
        """The problems of manifests, also Services that the cluster's of the same name hide."""
        return (*(self._manifests.problems if self._manifests else ()), *self._hidden)

    @property
    def missing(self) -> tuple[str, ...]:
        """Configured paths that cannot be read at all."""
        return self._manifests.missing if self._manifests else ()

    @property
    def files(self) -> int:
        """The number of manifest files."""
        return self._manifests.files if self._manifests else 0

    @property
    def synced_at(self) -> float:
        """Unix time of the last look at the manifests; 0: none yet, or there are none."""
        return self._manifests.synced_at if self._manifests else 0.0

    @property
    def facts(self) -> tuple[SourceFacts, ...]:
        """The state of each source."""
        at = self.synced_at
        manifests = [
            SourceFacts(name=f"manifests {path}", synced=at > 0, last_event=at)
            for path in self._settings.manifests
        ]
        return (*manifests, *([self.cluster.facts] if self.cluster else ()))

    @property
    def eligible(self) -> bool:
        """Whether load balancers should send this node traffic."""
        return self.cluster is None or self.cluster.eligible

    def node_view(self, addresses: tuple[NodeAddress, ...]) -> NodeView:
        """This node with these addresses; zone, Pod CIDRs and primary addresses are those of its Node."""
        node = self.cluster.node if self.cluster else None
        name = self._settings.node_name
        if node is None:
            return NodeView(name=name, addresses=addresses)
        wanted = set(node.host_ips)
        if any(address.ip in wanted for address in addresses):
            addresses = tuple(
                msgspec.structs.replace(address, primary=address.ip in wanted) for address in addresses
            )
        return NodeView(name=name, zone=node.zone, addresses=addresses, pod_cidrs=node.pod_cidrs)

    def keep_clear(self, occupied: Occupied) -> None:
        """Have manifests get no clusterIPs that are in use around this node."""
        if self._manifests is not None:
            self._manifests.keep_clear(taken_around(occupied, self._settings.service_cluster_ip_range))

    def post_event(self, service: ObjectName, kind: str, reason: str, message: str) -> None:
        """Post an Event about a Service to the API server, if there is one and it has the Service."""
        if self.cluster is not None:
            self.cluster.about_service(service, kind, reason, message)

    def first(self) -> tuple[Problem, ...]:
        """Read the manifests once, and hand them on unless there is an API server to wait for.

        Returns:
            The problems of the manifests.
        """
        if self._manifests is None:
            return ()
        return self._manifests.first() if self.cluster is None else self._manifests.first_unallocated()

    async def rescan(self, change: Change | None = None) -> None:
        """Read the manifests that changed (None: look for changes), and the kubeconfig again."""
        if self.cluster is not None:
            self.cluster.reread()
        if self._manifests is not None:
            await self._manifests.rescan(change)

    async def follow(self) -> None:
        """Hand on changes until cancelled; does not return."""
        async with asyncio.TaskGroup() as group:
            if self._manifests is not None:
                group.create_task(self._manifests.follow(), name="source:manifests")
            if self.cluster is not None:
                group.create_task(self.cluster.run(), name="source:cluster")

    def _manifests_changed(self, snapshot: Snapshot) -> None:
        self._from_manifests = snapshot
        self._hand_on()

    def _cluster_changed(self) -> None:
        cluster = self.cluster
        assert cluster is not None
        if self._node is not cluster.node or self._eligible != cluster.eligible:
            self._node, self._eligible = cluster.node, cluster.eligible
            self._node_changed()
        if self._manifests is not None and (
            self._taken.update(cluster.services) or self._from_manifests is None
        ):
            self._withhold()
        self._hand_on()

    def _withhold(self) -> None:
        """Have the manifests' allocations make room for the cluster's, one change after the other."""
        if self._withholding is None or self._withholding.done():
            self._withholding = spawn(self._withhold_until_done(), name="source:manifests:allocations")

    async def _withhold_until_done(self) -> None:
        assert self._manifests is not None
        withheld = None
        while withheld is not self._taken.now:
            withheld = self._taken.now
            await self._manifests.withhold(withheld)

    def _hand_on(self) -> None:
        if not self.synced:
            return
        if self.cluster is None:
            assert self._from_manifests is not None
            self._changed(self._from_manifests)
        elif self._from_manifests is None:
            self._changed(self.cluster.snapshot)
        else:
            before = self._merger.hidden
            snapshot = self._merger.merge(self._from_manifests, self.cluster.snapshot)
            if self._merger.hidden is not before:
                self._report_hidden()
            self._changed(snapshot)

    def _report_hidden(self) -> None:
        known, self._hidden = set(self._hidden), tuple(map(_hidden, self._merger.hidden))
        for problem in [problem for problem in self._hidden if problem not in known][:_MAX_LOGGED]:
            log.warning(str(problem))


def _hidden(name: ObjectName) -> Problem:
    return Problem(
        severity=Severity.WARNING,
        kind="Service",
        object=str(name),
        message="the cluster has a Service of this name, which is served: "
        "give the one in the manifests another name",
    )


def _cluster(settings: Settings, changed: Callable[[], None]) -> ClusterFeed:
    # Imported late: aiohttp takes a third of a second, which manifests need not wait for.
    from proxyd.control.feeds.cluster import ClusterFeed, KubeconfigError  # noqa: PLC0415

    try:
        return ClusterFeed(settings, changed)
    except KubeconfigError as error:
        raise FeedError(str(error)) from None
