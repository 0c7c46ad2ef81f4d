"""The admin API: JSON over HTTP on a Unix socket; docs/admin-api.md describes it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from aiohttp import web

from proxyd.control.admin import description, views
from proxyd.control.admin.history import History
from proxyd.control.admin.picture import Picture
from proxyd.control.admin.requests import (
    MAX_BODY,
    answered,
    explained,
    parameters,
    refusal,
    seconds_of,
    selector_of,
    set_log_level,
    show_log_level,
    show_version,
    sign,
)
from proxyd.control.admin.schema import (
    ConnectionsView,
    DrainView,
    ReloadView,
    UpgradeView,
)
from proxyd.control.admin.selector import Selector
from proxyd.control.admin.unix_socket import BACKLOG, AdminError, listen
from proxyd.control.runtime import logs
from proxyd.control.runtime.garbage import paused
from proxyd.control.runtime.logs import get_logger
from proxyd.control.runtime.tasks import describe
from proxyd.control.workers.handover import UpgradeError
from proxyd.control.workers.live_connections import MAX_RECORDS

log = get_logger("admin")

MAX_CLIENTS = 64  # one more ends the oldest
MAX_UNSENT = 64 << 20  # bytes of answers that clients have not taken yet; a further answer is refused
SEND_SECONDS = 30.0  # that a client has to take an answer
MAX_WAIT = 60.0  # seconds that a client may wait for a change

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Operations(Protocol):
    """What the API shows and does."""

    history: History

    def picture(self) -> Picture:
        """The daemon at this moment; called once for each request."""

    async def connections(
        self, *, namespace: str, name: str, selector: Selector, limit: int
    ) -> ConnectionsView:
        """The connections that are alive."""

    async def reload(self) -> ReloadView:
        """Read everything again."""

    async def upgrade(self) -> UpgradeView:
        """Have the installed program take over."""

    def drain(self, seconds: float | None) -> DrainView:
        """Stop after so many seconds, or the daemon's own drain timeout."""


class AdminServer:
    """Serves views of the current picture, and carries out what an operator orders.

    Args:
        path: of the Unix socket.
        operations: what it shows and does.
    """

    def __init__(self, path: str, operations: Operations) -> None:
        self.path = path
        self._operations = operations
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        self._identity: tuple[int, int] | None = None  # device and inode of the socket file
        self._changes = 0
        self._began = time.time_ns()
        self._changed = asyncio.Event()
        self._unsent = 0

    async def start(self, listening: socket.socket | None = None) -> None:
        """Open the socket and answer.

        Args:
            listening: the socket, where it was opened before by `unix_socket.listen`.

        Raises:
            AdminError: another daemon answers there, or the path cannot be used.
        """
        listening = listening or listen(self.path)
        with contextlib.suppress(FileNotFoundError):  # of a socket taken over: `renew` makes it anew
            about = os.stat(self.path)  # noqa: PTH116 - one call on a local path, before serving
            self._identity = (about.st_dev, about.st_ino)
        self._runner = web.AppRunner(
            self._application(),
            access_log=None,
            logger=logs.silent(),
            handle_signals=False,
            keepalive_timeout=15,
            shutdown_timeout=1.0,
        )
        try:
            await self._runner.setup()
            self._server = await asyncio.get_running_loop().create_unix_server(
                self._protocol, sock=listening, backlog=BACKLOG
            )
        except BaseException:
            listening.close()
            raise

    async def stop(self, *, leave: bool = False) -> None:
        """Close the socket, and remove its file if it is still ours.

        Args:
            leave: keep the file, as another descriptor of the socket stays open.
        """
        if self._runner is None:
            return
        runner, self._runner = self._runner, None
        with contextlib.suppress(OSError):
            about = os.stat(self.path)  # noqa: PTH116 - one call on a local path, at exit
            if not leave and (about.st_dev, about.st_ino) == self._identity:
                os.unlink(self.path)  # noqa: PTH108 - as above
        if self._server is not None:
            self._server.close()
        self._changed.set()  # nobody waits for a change any more
        await runner.cleanup()

    async def renew(self) -> socket.socket | None:
        """Open the socket anew, where somebody removed its file.

        Returns:
            The new one; None where nothing was to be done, or could be.
        """
        if self._runner is None:
            return None
        try:
            listening = listen(self.path)
        except AdminError as error:
            log.warning("the admin socket was removed, and can't be opened again", error=str(error))
            return None
        log.warning("the admin socket was removed: it is opened again", path=self.path)
        about = os.stat(self.path)  # noqa: PTH116 - one call on a local path, once in a long while
        self._identity = (about.st_dev, about.st_ino)
        before = self._server
        self._server = await asyncio.get_running_loop().create_unix_server(
            self._protocol, sock=listening, backlog=BACKLOG
        )
        if before is not None:
            before.close()
        return listening

    def changed(self) -> None:
        """Answer the clients that wait for a change: what is shown may have changed."""
        self._changes += 1
        self._changed.set()
        self._changed = asyncio.Event()

    # -- the server ------------------------------------------------------------------------------------------

    def _application(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY)
        app.on_response_prepare.append(sign)
        routes: tuple[tuple[str, str, Handler], ...] = (
            ("GET", "/v1/services", self._items(views.services)),
            ("GET", "/v1/services/{namespace}/{name}", self._description),
            ("GET", "/v1/endpoints", self._items(views.endpoints)),
            ("GET", "/v1/listeners", self._items(views.listeners)),
            ("GET", "/v1/connections", self._connections),
            ("GET", "/v1/status", self._status),
            ("GET", "/v1/version", show_version),
            ("POST", "/v1/reload", self._reload),
            ("POST", "/v1/drain", self._drain),
            ("POST", "/v1/upgrade", self._upgrade),
            ("GET", "/v1/log-level", show_log_level),
            ("PUT", "/v1/log-level", set_log_level),
        )
        for method, path, handler in routes:
            app.router.add_route(method, path, handler)
        return app

    def _protocol(self) -> asyncio.BaseProtocol:
        assert self._runner is not None
        server = self._runner.server
        assert server is not None
        if len(server.connections) >= MAX_CLIENTS:
            server.connections[0].force_close()
        return server()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turn errors into JSON, and bound the memory and time of answers that clients do not take."""
        try:
            response = await handler(request)
        except web.HTTPException as error:
            response = explained(request, error)
        except Exception as error:  # noqa: BLE001 - the daemon goes on, and the client is told
            why = describe(error)
            path = request.path[:200]  # the line below is enough, without a traceback
            log.error("request failed", method=request.method, path=path, error=why)  # noqa: TRY400
            response = refusal(500, f"internal error: {why}")
        assert isinstance(response, web.Response)
        size = len(response.body) if isinstance(response.body, bytes) else 0
        if self._unsent + size > MAX_UNSENT and self._unsent:
            response = refusal(503, "other clients are slow to take their answers; try again")
            size = 0
        self._unsent += size
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        except ConnectionError:
            pass  # the client is gone
        finally:
            self._unsent -= size
        return response

    # -- what is shown ---------------------------------------------------------------------------------------

    def _items(self, view: Callable[..., list[Any]]) -> Handler:
        async def answer(request: web.Request) -> web.Response:
            query = parameters(request, "namespace", "name", "labelSelector", "revision", "wait")
            selector = selector_of(query)
            if "revision" in query:
                await self._wait(query["revision"], seconds_of(query, "wait", 0.0))
                if query["revision"] == self.revision:
                    return web.Response(status=304)
            with paused():
                items = view(
                    self._operations.picture(),
                    namespace=query.get("namespace", ""),
                    name=query.get("name", ""),
                    selector=selector,
                )
                return answered({"revision": self.revision, "items": items})

        return answer

    async def _wait(self, revision: str, seconds: float) -> None:
        """Wait until what is shown differs from a revision, at most so many seconds."""
        if revision != self.revision or seconds <= 0:
            return
        changed = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, MAX_WAIT)):
                await changed.wait()
        if self._runner is None:
            raise web.HTTPServiceUnavailable(text="the daemon is stopping")

    @property
    def revision(self) -> str:
        """Differs from the revision of every other state, of other daemons too."""
        # The pid alone does not tell: it stays the same at an upgrade.
        return f"{os.getpid():x}-{self._began:x}-{self._changes:x}"

    async def _description(self, request: web.Request) -> web.Response:
        parameters(request)
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        found = description.describe(self._operations.picture(), self._operations.history, namespace, name)
        if found is None:
            raise web.HTTPNotFound(text=f"service {namespace}/{name} not found")
        return answered(found)

    async def _connections(self, request: web.Request) -> web.Response:
        query = parameters(request, "namespace", "name", "labelSelector", "limit")
        limit = query.get("limit", str(MAX_RECORDS))
        if not limit.isascii() or not limit.isdecimal() or not 0 < int(limit[:9]) <= MAX_RECORDS:
            raise web.HTTPBadRequest(text=f'limit: expected a number from 1 to {MAX_RECORDS}, got "{limit}"')
        found = await self._able().connections(
            namespace=query.get("namespace", ""),
            name=query.get("name", ""),
            selector=selector_of(query),
            limit=int(limit),
        )
        return answered(found)

    async def _status(self, request: web.Request) -> web.Response:
        parameters(request)
        return answered(views.status(self._operations.picture(), now=time.time()))

    # -- what is ordered -------------------------------------------------------------------------------------

    async def _reload(self, request: web.Request) -> web.Response:
        parameters(request)
        return answered(await self._able().reload())

    async def _drain(self, request: web.Request) -> web.Response:
        query = parameters(request, "timeout")
        seconds = seconds_of(query, "timeout", 0.0) if "timeout" in query else None
        return answered(self._able().drain(seconds), status=202)

    async def _upgrade(self, request: web.Request) -> web.Response:
        parameters(request)
        try:
            return answered(await self._able().upgrade(), status=202)
        except UpgradeError as error:
            raise web.HTTPConflict(text=str(error)) from None

    def _able(self) -> Operations:
        if self._operations.picture().phase == "starting":
            raise web.HTTPServiceUnavailable(text="the daemon is starting; try again")
        return self._operations
