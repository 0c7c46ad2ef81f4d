"""The health server (/healthz, /livez), and the metrics server (/metrics, /proxyMode, /configz, /debug/)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from proxyd import __version__
from proxyd.control.observe import health as healths
from proxyd.control.observe import profiling as profiles
from proxyd.control.observe.health import BusyError, Health
from proxyd.control.observe.metrics import CONTENT_TYPE, Facts, Metrics
from proxyd.control.runtime.logs import get_logger, silent
from proxyd.control.runtime.tasks import cancel, spawn
from proxyd.host.other_proxies import neighbour

log = get_logger("observers")

RETRY_SECONDS = 5.0  # as kube-proxy without --bind-address-hard-fail
MAX_CLIENTS = 200  # of one server; one more ends the oldest
_BACKLOG = 64
_GZIP_LEVEL = 1  # 8 times smaller, at 100 MB/s

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HealthAndMetrics:
    """The health server and the metrics server.

    Args:
        healthz: address and port of the health server; None: there is none.
        metrics_at: the same of the metrics server.
        hard_fail: an address that can't be opened ends the start; else it is tried again every 5 s.
        health: is asked for /healthz.
        metrics: renders /metrics.
        facts: gives the state of the daemon at this moment.
        config: gives the effective configuration at this moment, for /configz.
        profiling: serve /debug/ beside /metrics.
    """

    def __init__(
        self,
        *,
        healthz: tuple[str, int] | None,
        metrics_at: tuple[str, int] | None,
        hard_fail: bool,
        health: Health,
        metrics: Metrics,
        facts: Callable[[], Facts],
        config: Callable[[], Mapping[str, Any]],
        profiling: bool = False,
    ) -> None:
        self._health = health
        self._metrics = metrics
        self._facts = facts
        self._config = config
        self._rendering: asyncio.Task[list[bytes]] | None = None
        sites = (
            ("health", healthz, {"/healthz": self._healthz, "/livez": self._livez}),
            (
                "metrics",
                metrics_at,
                {
                    "/healthz": _ok,
                    "/metrics": self._text,
                    "/proxyMode": _proxy_mode,
                    "/configz": self._configz,
                    **(profiles.routes() if profiling else {}),
                },
            ),
        )
        self._sites = [
            _Site(name, address, routes, hard_fail=hard_fail) for name, address, routes in sites if address
        ]

    async def start(self) -> None:
        """Open both; what can't be opened is tried again and again.

        Raises:
            BusyError: an address can't be opened, and `hard_fail` is set.
        """
        for site in self._sites:
            await site.start()

    async def stop(self) -> None:
        """Close both, and wait until an answer under way is rendered."""
        for site in self._sites:
            await site.stop()
        if self._rendering is not None:
            await asyncio.gather(self._rendering, return_exceptions=True)

    async def _healthz(self, _request: web.Request) -> web.Response:
        return self._answer("/healthz", *healths.healthz(self._health.look()))

    async def _livez(self, _request: web.Request) -> web.Response:
        return self._answer("/livez", *healths.livez(self._health.look()))

    def _answer(self, path: str, code: int, body: bytes) -> web.Response:
        self._metrics.health(path, code)
        headers = {"X-Content-Type-Options": "nosniff"}
        return web.Response(status=code, body=body, content_type="application/json", headers=headers)

    async def _text(self, request: web.Request) -> web.Response:
        # Whoever asks while an answer is being rendered gets that one.
        if self._rendering is None or self._rendering.done():
            self._rendering = spawn(
                asyncio.to_thread(self._metrics.render, self._facts()), name="metrics:render"
            )
        rendering = self._rendering
        chunks = await asyncio.shield(rendering)
        if self._rendering is rendering:
            self._rendering = None  # it may hold many megabytes
        headers = {"Content-Type": CONTENT_TYPE, "Vary": "Accept-Encoding"}
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            headers["Content-Encoding"] = "gzip"
            return web.Response(body=await asyncio.to_thread(_gzip, chunks), headers=headers)
        return web.Response(body=b"".join(chunks), headers=headers)

    async def _configz(self, _request: web.Request) -> web.Response:
        body = msgspec.json.encode({"kubeproxy.config.k8s.io": self._config()})
        return web.Response(body=body, content_type="application/json")


def _gzip(chunks: list[bytes]) -> bytes:
    packer = zlib.compressobj(_GZIP_LEVEL, wbits=31)  # 31: with gzip's header
    return b"".join([*map(packer.compress, chunks), packer.flush()])


async def _ok(_request: web.Request) -> web.Response:
    return web.Response(text="ok")


async def _proxy_mode(_request: web.Request) -> web.Response:
    return web.Response(text="userspace")


class _Site:
    """One address and what is answered there."""

    def __init__(
        self, name: str, address: tuple[str, int], routes: Mapping[str, Handler], *, hard_fail: bool
    ) -> None:
        self._name = name
        self._address = address
        self._hard_fail = hard_fail
        app = web.Application()
        for path, handler in routes.items():
            app.router.add_get(path, handler)
        app.on_response_prepare.append(_sign)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=silent(),
            handle_signals=False,
            keepalive_timeout=30,
            shutdown_timeout=1.0,
        )
        self._server: asyncio.Server | None = None
        self._retrying: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen now, or as soon as possible."""
        await self._runner.setup()
        try:
            await self._listen()
        except OSError as error:
            if self._hard_fail:
                why = await asyncio.to_thread(_why, error, self._address)
                what = f"the {self._name} address {self._shown()} can't be opened"
                raise BusyError(f"{what}: {why} (--bind-address-hard-fail)") from None
            self._retrying = spawn(self._retry(error), name=f"{self._name}:retry")

    async def stop(self) -> None:
        """Close it."""
        if self._retrying is not None:
            await cancel(self._retrying)
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()

    async def _retry(self, error: OSError) -> None:
        log.warning(
            "an address of proxyd's own can't be opened: tried again every 5 s",
            what=self._name,
            address=self._shown(),
            error=await asyncio.to_thread(_why, error, self._address),
        )
        while self._server is None:
            await asyncio.sleep(RETRY_SECONDS)
            with contextlib.suppress(OSError):
                await self._listen()
                log.info(
                    "an address of proxyd's own was opened at last", what=self._name, address=self._shown()
                )

    async def _listen(self) -> None:
        sock = _bound(*self._address)
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self._protocol, sock=sock, backlog=_BACKLOG
            )
        except BaseException:
            sock.close()
            raise

    def _protocol(self) -> asyncio.BaseProtocol:
        server = self._runner.server
        assert server is not None
        if len(server.connections) >= MAX_CLIENTS:
            server.connections[0].force_close()
        return server()

    def _shown(self) -> str:
        host, port = self._address
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bound(host: str, port: int) -> socket.socket:
    """A bound TCP socket; one of all addresses, `0.0.0.0` or `::`, is of IPv4 and IPv6, as kube-proxy's is.

    Raises:
        OSError: the address can't be opened.
    """
    everywhere = host in ("0.0.0.0", "::")
    family = socket.AF_INET6 if everywhere or ":" in host else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    except OSError as error:
        if host != "0.0.0.0" or error.errno != errno.EAFNOSUPPORT:
            raise
        # Neither the kernel nor a sandbox has to have IPv6.
        family, everywhere = socket.AF_INET, False
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if everywhere:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::" if everywhere else host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _why(error: OSError, address: tuple[str, int]) -> str:
    """Why it failed, in one line. Asks who has the address, which may take some seconds."""
    if error.errno == errno.EADDRINUSE:
        who = neighbour(address)
        advice = "; stop it: two proxies on a node want the same addresses" if who and who.kind else ""
        return f"{who or 'another process'} has it{advice}"
    return os.strerror(error.errno) if error.errno else str(error)


async def _sign(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = f"proxyd/{__version__}"
