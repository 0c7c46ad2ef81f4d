"""The admin API: JSON over HTTP on a Unix socket. It shows, and changes nothing."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from proxyd import __version__
from proxyd.control import views
from proxyd.control.adminsocket import BACKLOG, AdminError, listen
from proxyd.control.views import Picture

__all__ = ["AdminError", "AdminServer"]


class AdminServer:
    """Serves views of the current picture.

    Paths: /v1/services, /v1/endpoints, /v1/listeners (each `{"items": [...]}`, with `?namespace=` and `?name=`), and
    /v1/status.

    Args:
        path: of the Unix socket.
        picture: gives the picture at this moment; called once for each request.
    """

    def __init__(self, path: str, picture: Callable[[], Picture]) -> None:
        self.path = path
        self._picture = picture
        self._runner: web.AppRunner | None = None
        self._identity: tuple[int, int] | None = None  # device and inode of the socket file

    async def start(self) -> None:
        """Open the socket and answer.

        Raises:
            AdminError: another daemon answers there, or the path cannot be used.
        """
        listening = listen(self.path)
        about = os.stat(self.path)  # noqa: PTH116 - one call on a local path, before serving
        self._identity = (about.st_dev, about.st_ino)
        app = web.Application()
        app.on_response_prepare.append(_sign)
        app.router.add_get("/v1/services", self._services)
        app.router.add_get("/v1/endpoints", self._endpoints)
        app.router.add_get("/v1/listeners", self._listeners)
        app.router.add_get("/v1/status", self._status)
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, keepalive_timeout=15, shutdown_timeout=1.0
        )
        try:
            await self._runner.setup()
            await web.SockSite(self._runner, listening, backlog=BACKLOG).start()
        except BaseException:
            listening.close()
            raise

    async def stop(self) -> None:
        """Close the socket, and remove its file if it is still ours."""
        if self._runner is None:
            return
        runner, self._runner = self._runner, None
        with contextlib.suppress(OSError):
            about = os.stat(self.path)  # noqa: PTH116 - one call on a local path, at exit
            if (about.st_dev, about.st_ino) == self._identity:
                os.unlink(self.path)  # noqa: PTH108 - as above
        await runner.cleanup()

    async def _services(self, request: web.Request) -> web.Response:
        return _answer({"items": views.services(self._picture(), **_filters(request))})

    async def _endpoints(self, request: web.Request) -> web.Response:
        return _answer({"items": views.endpoints(self._picture(), **_filters(request))})

    async def _listeners(self, request: web.Request) -> web.Response:
        return _answer({"items": views.listeners(self._picture(), **_filters(request))})

    async def _status(self, _request: web.Request) -> web.Response:
        return _answer(views.status(self._picture(), now=time.time()))


def _filters(request: web.Request) -> dict[str, str]:
    return {key: request.query[key] for key in ("namespace", "name") if key in request.query}


def _answer(value: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


async def _sign(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = f"proxyd/{__version__}"
