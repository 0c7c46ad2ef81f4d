"""The API source: follows Services, their endpoints and this node, and reports when anything is different."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any

import msgspec

from proxyd.api.discovery import Endpoints, EndpointSlice
from proxyd.api.meta import ObjectName
from proxyd.api.problems import Problem, Severity
from proxyd.api.service import Service
from proxyd.sources.cluster.credentials import Credentials
from proxyd.sources.cluster.events import EventAbout, EventRecorder
from proxyd.sources.cluster.known import Known, Table
from proxyd.sources.cluster.kubeconfig import Access
from proxyd.sources.cluster.objects import Codec, Node, Refused
from proxyd.sources.cluster.stats import RequestStats
from proxyd.sources.cluster.steps import Batch, Event, Listing, Marker, Page, Resource, Tuning, Unavailable
from proxyd.sources.cluster.throttle import Throttle
from proxyd.sources.cluster.transport import FORBIDDEN, NOT_FOUND, ApiClient
from proxyd.sources.cluster.troubles import Troubles
from proxyd.sources.cluster.watching import Watcher

PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
HEADLESS_LABEL = "service.kubernetes.io/headless"

# By these answers the Node can't be had at all; by any other one it can't be had now.
_NO_NODE = (FORBIDDEN, NOT_FOUND)
# Seconds between two reports; the changes in between go into one.
_SPACING = 0.01

_KINDS: dict[str, type[Any]] = {
    "Service": Service,
    "EndpointSlice": EndpointSlice,
    "Endpoints": Endpoints,
    "Node": Node,
}


class ClusterState(msgspec.Struct, frozen=True, kw_only=True):
    """The API server's objects at one moment.

    Mappings and objects are never changed in place. What did not change is the same Python object as in the
    last state, so they can be compared by identity.
    """

    services: Mapping[ObjectName, Service] = {}
    slices: Mapping[ObjectName, tuple[EndpointSlice, ...]] = {}  # by Service
    node: Node | None = None  # None: the API server does not know it, or does not let it be read


class ClusterSource:
    """Follows the API server; see the package's contract.

    Args:
        access: as `load_access` returns it.
        node_name: the Node that this runs on; "": none is followed.
        on_change: called in the event loop with the state when everything has been listed, and then whenever
            something is different, at most every 10 ms.
        on_problem: called once for each problem.
        on_solved: called with one line when a problem is over.
        proxy_name: follow the Services with this service-proxy-name; "": those without one.
        kubeconfig: a path, which is read again when the credentials are refused; "" where there is none.
        master: as given to `load_access`.
        qps: requests a second on average; 0 or less: without limit.
        burst: requests at once.
        component: the name under which Events are sent.
        agent: the User-Agent.
        tuning: times, for tests.

    Attributes:
        stats: the requests so far.
        last_event_at: Unix time of the last list or change; 0: there was none.
        lists: how many full lists have been taken.
    """

    def __init__(
        self,
        access: Access,
        *,
        node_name: str,
        on_change: Callable[[ClusterState], None],
        on_problem: Callable[[Problem], None],
        on_solved: Callable[[str], None],
        proxy_name: str = "",
        kubeconfig: str = "",
        master: str = "",
        qps: float = 5,
        burst: int = 10,
        component: str = "proxyd",
        agent: str = "proxyd",
        tuning: Tuning | None = None,
    ) -> None:
        tuning = tuning or Tuning()
        self.stats = RequestStats()
        self.last_event_at = 0.0
        self.lists = 0
        self._on_change, self._on_problem = on_change, on_problem
        credentials = Credentials(access, kubeconfig=kubeconfig, master=master)
        self._client = ApiClient(credentials, Throttle(qps, burst), self.stats, agent=agent)
        self._troubles = Troubles(self._client.host, on_problem, on_solved)
        self._known = Known()
        self._events = EventRecorder(self._client, component, node_name, self._event_trouble)
        self._node_name = node_name
        self._watchers = [
            Watcher(name, resources, self._client, self._troubles, tuning)
            for name, resources in _resources(node_name, proxy_name).items()
        ]
        self._unlisted = {watcher.name for watcher in self._watchers}
        self._state: ClusterState | None = None
        self._flush_at = 0.0
        self._flush: asyncio.Handle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def server(self) -> str:
        """The API server's URL."""
        return self._client.credentials.access.server

    @property
    def synced(self) -> bool:
        """Whether everything has been listed once."""
        return not self._unlisted

    @property
    def services(self) -> Mapping[ObjectName, Service]:
        """The Services in force."""
        return self._known.services

    @property
    def slices(self) -> Mapping[ObjectName, tuple[EndpointSlice, ...]]:
        """The slices in force, by Service."""
        return self._known.slices

    @property
    def node(self) -> Node | None:
        """This node's Node."""
        return self._known.node

    @property
    def endpoints_api(self) -> str:
        """What endpoints are read from, such as "discovery.k8s.io/v1 EndpointSlice"; "": not known yet."""
        served = next(watcher for watcher in self._watchers if watcher.name == "endpoints").served
        if served is None:
            return ""
        group = served.path.removeprefix("/apis/").removeprefix("/api/").rpartition("/")[0]
        return f"{group} {served.kind}"

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The problems of now."""
        return self._troubles.current

    @property
    def events_dropped(self) -> int:
        """How many Events were not sent, as there were too many or the server refused them."""
        return self._events.dropped

    async def run(self) -> None:
        """Follows the API server until it is cancelled; then all connections are closed."""
        self._loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as tasks:
                for watcher in self._watchers:
                    tasks.create_task(self._follow(watcher), name=f"source:cluster:{watcher.name}")
                tasks.create_task(self._events.run(), name="source:cluster:events")
        finally:
            if self._flush is not None:
                self._flush.cancel()
            await self._client.close()

    def reread(self) -> None:
        """Read the kubeconfig and ask the credential plugin again, for the next requests."""
        self._client.credentials.reread()

    def post_event(self, about: EventAbout, type_: str, reason: str, message: str) -> None:
        """Queue an Event; nobody waits for it, and it may never arrive.

        Args:
            about: the object that it is about.
            type_: "Normal" or "Warning".
            reason: one word, such as PortConflict.
            message: a text for people.
        """
        self._events.post(about, type_, reason, message)

    async def _follow(self, watcher: Watcher) -> None:
        follower = _Follower(self._table(watcher.name), self._known, self._troubles)
        async with aclosing(watcher.forever()) as steps:
            async for listed in follower.feed(steps):
                self.last_event_at = time.time()
                if listed:
                    self.lists += 1
                    self._unlisted.discard(watcher.name)
                self._changed()

    def _table(self, name: str) -> Table[Any]:
        known = self._known
        tables: dict[str, Table[Any]] = {
            "services": known.service_table,
            "endpoints": known.backend_table,
            "node": known.node_table,
        }
        return tables[name]

    def _changed(self) -> None:
        """Report soon: at once, or 10 ms after the last report."""
        if self._flush is None and self.synced:
            assert self._loop is not None
            now = self._loop.time()
            if now >= self._flush_at:
                self._flush = self._loop.call_soon(self._report)
            else:
                self._flush = self._loop.call_at(self._flush_at, self._report)

    def _report(self) -> None:
        assert self._loop is not None
        self._flush = None
        if self._known.update() or self._state is None:
            known = self._known
            self._state = ClusterState(services=known.services, slices=known.slices, node=known.node)
            self._on_change(self._state)
            # From the end of the call on: a callee that takes long gets fewer and larger changes.
            self._flush_at = self._loop.time() + _SPACING

    def _event_trouble(self, message: str) -> None:
        self._on_problem(
            Problem(severity=Severity.WARNING, kind="API server", object=self._client.host, message=message)
        )


class _Follower:
    """Puts the objects that one watcher brings into a table."""

    def __init__(self, table: Table[Any], known: Known, troubles: Troubles) -> None:
        self._table, self._known, self._troubles = table, known, troubles
        self._optional = table is known.node_table
        self._kind = ""  # of the objects that were listed last
        self._codec: Codec[Any] = Codec(Service)
        self._listed: list[Any] = []
        self._refused: list[Refused] = []

    async def feed(self, steps: AsyncIterator[object]) -> AsyncIterator[bool]:
        """Yields after each step that may have changed something: whether everything is listed."""
        async for step in steps:
            match step:
                case Unavailable():
                    # Nobody should wait for ever for a Node that can't be had.
                    if self._optional and step.code in _NO_NODE:
                        yield True
                case Listing():
                    if self._kind not in {"", step.resource.kind}:  # another version of the API
                        self._troubles.only(self._kind, set())
                    self._kind = step.resource.kind
                    self._codec = Codec(_KINDS[self._kind], beta=step.resource.beta)
                    self._listed, self._refused = [], []
                case Page():
                    for item in step.items:
                        thing = self._codec.decode(item)
                        (self._refused if isinstance(thing, Refused) else self._listed).append(thing)
                    # Other tasks run between the pages, which come without a pause.
                    await asyncio.sleep(0)
                case Marker.LISTED:
                    self._take_list()
                    yield True
                case Batch():
                    if changed := {name for event in step.events if (name := self._apply(event))}:
                        self._known.touch(self._table, changed)
                    yield False

    def _take_list(self) -> None:
        things, refused, table = self._listed, self._refused, self._table
        self._listed, self._refused = [], []
        keep = {one.name for one in refused if one.name is not None}
        if len(keep) < len(refused):  # one has no name that can be read: it may be any
            keep.update(table.objects)
        self._known.touch(table, table.replace(things, keep))
        for one in refused:
            self._troubles.refused(self._kind, str(one.name or ""), one.problem)
        self._troubles.only(self._kind, {str(one.name or "") for one in refused})

    def _apply(self, event: Event) -> ObjectName | None:
        """Take an event. Returns the name of the object that it changed."""
        thing, kind = self._codec.decode(event.object), self._kind
        if isinstance(thing, Refused):
            if event.type == "DELETED" and thing.name is not None:
                self._troubles.accepted(kind, str(thing.name))
                return thing.name if self._table.remove(thing.name) else None
            self._troubles.refused(kind, str(thing.name or ""), thing.problem)
            return None
        name: ObjectName = thing.metadata.key
        self._troubles.accepted(kind, str(name))
        changed = self._table.remove(name) if event.type == "DELETED" else self._table.put(thing)
        return name if changed else None


def _resources(node_name: str, proxy_name: str) -> dict[str, tuple[Resource, ...]]:
    """What to follow. With a proxy name all slices are followed: not all of them have the label."""
    if proxy_name:
        services, backends = f"{PROXY_NAME_LABEL}={proxy_name},!{HEADLESS_LABEL}", f"!{HEADLESS_LABEL}"
    else:
        services = backends = f"!{PROXY_NAME_LABEL},!{HEADLESS_LABEL}"
    of_services, of_backends = (("labelSelector", services),), (("labelSelector", backends),)
    slices = "/apis/discovery.k8s.io/{}/endpointslices"
    followed = {
        "services": (Resource(path="/api/v1/services", kind="Service", selectors=of_services),),
        "endpoints": (
            Resource(path=slices.format("v1"), kind="EndpointSlice", selectors=of_backends),
            Resource(path=slices.format("v1beta1"), kind="EndpointSlice", beta=True, selectors=of_backends),
            Resource(path="/api/v1/endpoints", kind="Endpoints", selectors=of_backends),
        ),
    }
    if node_name:
        name = (("fieldSelector", f"metadata.name={node_name}"),)
        followed["node"] = (Resource(path="/api/v1/nodes", kind="Node", selectors=name),)
    return followed
