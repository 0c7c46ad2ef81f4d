"""healthCheckNodePorts: there load balancers ask whether this node has endpoints of a Service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec

from proxyd.api.meta import ObjectName
from proxyd.api.problems import Problem, Severity
from proxyd.api.service import Protocol, Service, ServiceType, TrafficPolicy
from proxyd.control.runtime.logs import get_logger, silent
from proxyd.control.runtime.tasks import cancel, spawn
from proxyd.host.sockets import BindFailed, open_listener
from proxyd.state.changes import touched
from proxyd.state.snapshot import NodeView, Options, Snapshot
from proxyd.state.spec import BalancerKey, ListenerKey, ListenerSpec, Role, ServicePortName
from proxyd.state.wishes import nodeport_addresses

if TYPE_CHECKING:
    from aiohttp import web

log = get_logger("healthports")

RETRY_SECONDS = 5.0
# Of all these ports together; one more ends the oldest.
MAX_CLIENTS = 500
_BACKLOG = 64

Place = tuple[str, int]  # address and port


class HealthCheckPorts:
    """Answers at the healthCheckNodePort of each LoadBalancer Service with externalTrafficPolicy Local.

    Any path is answered with the number of this node's ready endpoints: 200 where there are some and this
    proxy is healthy, else 503 (kubernetes pkg/proxy/healthcheck/service_health.go). The ports are open on the
    addresses that NodePorts are open on. Of two Services that want the same port the one that has it keeps
    it; if neither has it, the first by name gets it.

    Args:
        healthy: says whether this proxy is healthy.
        failed: called when a port can't be opened, with the Service, the port and why.
    """

    def __init__(self, healthy: Callable[[], bool], failed: Callable[[ObjectName, int, str], None]) -> None:
        self._healthy = healthy
        self._failed = failed
        self._snapshot = Snapshot()
        self._node = ""
        self._counts: dict[
            ObjectName, int
        ] = {}  # ready endpoints on this node, of each Service that is asked about
        self._owners: dict[int, ObjectName] = {}  # by port
        self._losers: dict[ObjectName, str] = {}
        self._wanted: dict[Place, ObjectName] = {}
        self._addresses: tuple[str, ...] = ()
        self._open: dict[Place, asyncio.Server] = {}
        self._failures: dict[Place, str] = {}
        self._server: web.Server | None = None
        self._opening: asyncio.Task[None] | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._stopped = False

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Why ports are not open, for the Services whose port should be."""
        failed = {
            owner: f"healthCheckNodePort {place[1]}: {why}"
            for place, why in self._failures.items()
            if (owner := self._wanted.get(place)) is not None
        }
        return tuple(
            Problem(severity=Severity.WARNING, kind="Service", object=str(name), message=why)
            for name, why in sorted({**self._losers, **failed}.items())
        )

    def update(self, snapshot: Snapshot, node: NodeView, options: Options) -> None:
        """Take a new state: count the endpoints of what changed, and have ports opened and closed soon."""
        before = self._snapshot if node.name == self._node else Snapshot()
        self._snapshot, self._node = snapshot, node.name
        names = touched(before.services, snapshot.services) | touched(before.slices, snapshot.slices)
        moved = False
        for name in names:
            service = snapshot.services.get(name)
            if service is not None and _asked(service):
                moved |= name not in self._counts or _port(before.services.get(name)) != _port(service)
                self._counts[name] = _local(snapshot, name, node.name)
            elif self._counts.pop(name, None) is not None:
                moved = True
        if not self._counts and not self._wanted:
            return
        addresses = nodeport_addresses(node, options)
        if moved or addresses != self._addresses:
            self._addresses = addresses
            self._want()

    async def stop(self) -> None:
        """Close every port."""
        self._stopped = True
        if self._retry is not None:
            self._retry.cancel()
        if self._opening is not None:
            await cancel(self._opening)
        for server in self._open.values():
            server.close()
        self._open.clear()
        if self._server is not None:
            await self._server.shutdown(1.0)

    def _want(self) -> None:
        before, self._owners = self._owners, {}
        losers = {}
        for name in sorted(
            self._counts, key=lambda n: (before.get(_port(self._snapshot.services[n])) != n, n)
        ):
            port = _port(self._snapshot.services[name])
            owner = self._owners.setdefault(port, name)
            if owner is not name:
                losers[name] = f"healthCheckNodePort {port}: {owner} has it"
                if name not in self._losers:
                    self._failed(name, port, f"{owner} has it")
        self._losers = losers
        self._wanted = {(ip, port): owner for port, owner in self._owners.items() for ip in self._addresses}
        self._begin()

    def _begin(self) -> None:
        if not self._stopped and (self._opening is None or self._opening.done()):
            self._opening = spawn(self._open_and_close(), name="healthports")

    async def _open_and_close(self) -> None:
        """Open and close ports until they are as wanted, even if that changes meanwhile."""
        tried: set[Place] = set()
        while True:
            for place in [place for place in self._open if place not in self._wanted]:
                self._open.pop(place).close()
            self._failures = {place: why for place, why in self._failures.items() if place in self._wanted}
            due = [place for place in self._wanted if place not in self._open and place not in tried]
            if not due:
                break
            for place in due:
                tried.add(place)
                if place in self._wanted:
                    await self._open_one(place)
        if self._failures:
            if self._retry is not None:
                self._retry.cancel()
            self._retry = asyncio.get_running_loop().call_later(RETRY_SECONDS, self._begin)

    async def _open_one(self, place: Place) -> None:
        owner = self._wanted[place]
        try:
            sock = open_listener(_spec(place, owner), backlog=_BACKLOG)
        except BindFailed as error:
            if self._failures.get(place) != str(error):
                self._failures[place] = str(error)
                log.warning(
                    "healthCheckNodePort can't be opened: tried again every 5 s",
                    service=str(owner),
                    address=str(_spec(place, owner).key),
                    error=str(error),
                )
                self._failed(owner, place[1], str(error))
            return
        try:
            server = await asyncio.get_running_loop().create_server(
                self._protocol, sock=sock, backlog=_BACKLOG
            )
        except BaseException:
            sock.close()
            raise
        if self._failures.pop(place, None) is not None:
            log.info("healthCheckNodePort opened at last", service=str(owner), port=place[1])
        self._open[place] = server

    def _protocol(self) -> asyncio.BaseProtocol:
        if self._server is None:
            # Imported late: aiohttp takes a third of a second, and few nodes need it here.
            from aiohttp import web  # noqa: PLC0415

            self._server = web.Server(self._answer, access_log=None, logger=silent(), keepalive_timeout=30)
        if len(self._server.connections) >= MAX_CLIENTS:
            self._server.connections[0].force_close()
        return self._server()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        from aiohttp import web  # noqa: PLC0415 - as above

        sockname = request.transport.get_extra_info("sockname") if request.transport else None
        owner = self._owners.get(sockname[1]) if sockname else None
        if owner is None:  # closed just now
            return web.Response(status=404)
        count, healthy = self._counts.get(owner, 0), self._healthy()
        body = {
            "service": {"namespace": owner.namespace, "name": owner.name},
            "localEndpoints": count,
            "serviceProxyHealthy": healthy,
        }
        return web.Response(
            status=200 if count and healthy else 503,
            body=msgspec.json.encode(body),
            headers={
                "Content-Type": "application/json",
                "X-Content-Type-Options": "nosniff",
                "X-Load-Balancing-Endpoint-Weight": str(count),
            },
        )


def _asked(service: Service) -> bool:
    spec = service.spec
    return (
        spec.type is ServiceType.LOAD_BALANCER
        and spec.external_traffic_policy is TrafficPolicy.LOCAL
        and spec.health_check_node_port > 0
    )


def _port(service: Service | None) -> int:
    return service.spec.health_check_node_port if service is not None and _asked(service) else 0


def _local(snapshot: Snapshot, name: ObjectName, node: str) -> int:
    """How many addresses on this node are ready. Those that only serve while they terminate do not count."""
    return len(set(_ready_here(snapshot, name, node)))


def _ready_here(snapshot: Snapshot, name: ObjectName, node: str) -> Iterable[str]:
    for one in snapshot.slices.get(name, ()):
        for endpoint in one.endpoints:
            if endpoint.addresses and endpoint.node_name == node and endpoint.conditions.ready is not False:
                yield endpoint.addresses[0]


def _spec(place: Place, owner: ObjectName) -> ListenerSpec:
    """The listener spec that its socket is opened for."""
    ip, port = place
    name = ServicePortName(owner.namespace, owner.name, "", Protocol.TCP)
    return ListenerSpec(
        key=ListenerKey(ip, port, Protocol.TCP),
        balancer=BalancerKey(name, TrafficPolicy.LOCAL, 6 if ":" in ip else 4),
        role=Role.NODE_PORT,
    )
