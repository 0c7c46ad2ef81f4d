"""Requests to the API server, for an answer or a stream. Every failure is an ApiError of one line."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from proxyd.api.findings import clip
from proxyd.sources.cluster.credentials import Credentials
from proxyd.sources.cluster.kubeconfig import KubeconfigError
from proxyd.sources.cluster.stats import RequestStats
from proxyd.sources.cluster.throttle import Throttle
from proxyd.state.marks import OWN_PRIORITY

UNAUTHORIZED, FORBIDDEN, NOT_FOUND, GONE, TOO_MANY = 401, 403, 404, 410, 429

_CONNECT_SECONDS = 10.0
_ANSWER_SECONDS = 60.0  # for a request that is not a watch, from beginning to end
_SILENT_SECONDS = 30.0  # without a byte, within such an answer
_MAX_ANSWER = 512 << 20
_MAX_STATUS = 64 << 10
_READ_BUFFER = 256 << 10
_SHOWN = 300
# It takes some so many seconds to notice that the peer has vanished, also while a watch is silent.
_DEAD_SECONDS = 30


class ApiError(Exception):
    """A request that failed.

    Attributes:
        code: the HTTP status, or that of an ERROR event; 0: there was no answer, or it was cut off.
        dropped: the connection was cut after an answer had begun.
        retry_after: how many seconds the server asks to wait; 0: it does not say.
    """

    def __init__(self, message: str, *, code: int = 0, dropped: bool = False, retry_after: float = 0) -> None:
        super().__init__(message)
        self.code, self.dropped, self.retry_after = code, dropped, retry_after


class _Details(msgspec.Struct, rename="camel", kw_only=True):
    retry_after_seconds: int | None = None


class _Status(msgspec.Struct, kw_only=True):
    message: str | None = None
    reason: str | None = None
    code: int | None = None
    details: _Details | None = None


def status_error(body: bytes | msgspec.Raw, code: int = 0, retry_after: float = 0) -> ApiError:
    """The error that a Status object describes, or whatever came in its place."""
    status = _Status()
    with contextlib.suppress(msgspec.DecodeError, ValueError):
        status = msgspec.json.decode(body, type=_Status)
    code = status.code or code
    text = clip((status.message or status.reason or "").strip(), _SHOWN)
    if status.details and status.details.retry_after_seconds:
        retry_after = retry_after or float(status.details.retry_after_seconds)
    return ApiError(f"{code} {text}".strip(), code=code, retry_after=retry_after)


class ApiClient:
    """Sends requests with credentials, within the limits of a throttle, and counts them.

    Args:
        credentials: authenticate every request.
        throttle: every request waits for it.
        stats: count the requests.
        agent: the value of the User-Agent header.
    """

    def __init__(
        self, credentials: Credentials, throttle: Throttle, stats: RequestStats, *, agent: str
    ) -> None:
        self.credentials = credentials
        self._throttle, self._stats, self._agent = throttle, stats, agent
        self._session: aiohttp.ClientSession | None = None

    @property
    def host(self) -> str:
        """host:port of the API server."""
        return urlsplit(self.credentials.access.server).netloc

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def get(self, path: str, params: Mapping[str, str]) -> bytes:
        """The body of the answer to a GET.

        Raises:
            ApiError: there was no answer, or it says that the request failed.
        """
        return await self.send("GET", path, params)

    async def send(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        *,
        body: bytes | None = None,
        content_type: str = "application/json",
    ) -> bytes:
        """The body of the answer.

        Raises:
            ApiError: there was no answer, or it says that the request failed.
        """
        limits = aiohttp.ClientTimeout(
            total=_ANSWER_SECONDS, sock_connect=_CONNECT_SECONDS, sock_read=_SILENT_SECONDS
        )
        headers = {"Content-Type": content_type} if body is not None else {}
        async with self._ask(method, path, params or {}, limits, headers=headers, body=body) as response:
            parts, size = [], 0
            async for part in response.content.iter_any():
                size += len(part)
                if size > _MAX_ANSWER:
                    raise ApiError(f"the answer to {path} is over {_MAX_ANSWER >> 20} MiB")
                parts.append(part)
            return b"".join(parts)

    @contextlib.asynccontextmanager
    async def stream(
        self, path: str, params: Mapping[str, str], *, silent_seconds: float
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """The answer to a GET in pieces, as it arrives; for `async with`.

        Args:
            path: the path of the resource.
            params: the query.
            silent_seconds: a stream that brings no byte for so long is taken for hung.

        Raises:
            ApiError: the stream could not be opened, was cut off, or hung.
        """
        limits = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=silent_seconds)
        async with self._ask("GET", path, params, limits) as response:
            yield response.content.iter_any()

    @contextlib.asynccontextmanager
    async def _ask(
        self,
        method: str,
        path: str,
        params: Mapping[str, str],
        limits: aiohttp.ClientTimeout,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        await self._throttle.wait()
        started, code = time.monotonic(), ""
        try:
            options = await self._options()
            options["headers"].extend((headers or {}).items())
            url = self.credentials.access.server + path
            async with self._open_session().request(
                method, url, params=params, timeout=limits, data=body, allow_redirects=False, **options
            ) as response:
                code = str(response.status)
                self._stats.add(method, self.host, code, time.monotonic() - started)
                if not 200 <= response.status < 300:
                    raise await self._refusal(response)
                yield response
        except KubeconfigError as error:
            raise ApiError(str(error)) from None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            if not code:
                self._stats.add(method, self.host, "<error>", time.monotonic() - started)
            dropped = bool(code) and not isinstance(error, TimeoutError)
            raise ApiError(_described(error, answered=bool(code)), dropped=dropped) from None

    async def _options(self) -> dict[str, Any]:
        access = self.credentials.access
        options: dict[str, Any] = {
            "headers": [
                ("Accept", "application/json"),
                ("User-Agent", self._agent),
                ("Accept-Encoding", "gzip"),
            ]
        }
        options["headers"] += await self.credentials.headers()
        if access.server.startswith("https:"):
            options["ssl"] = await self.credentials.tls()
            if access.tls_server_name:
                options["server_hostname"] = access.tls_server_name
        if proxy := access.proxy_url or _environment_proxy(access.server):
            options["proxy"] = proxy
        return options

    async def _refusal(self, response: aiohttp.ClientResponse) -> ApiError:
        if response.status == UNAUTHORIZED:
            self.credentials.refused()
        body = await response.content.read(_MAX_STATUS)
        asked = response.headers.get("Retry-After", "")
        return status_error(body, response.status, float(asked) if asked.isascii() and asked.isdigit() else 0)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=16, socket_factory=_socket, keepalive_timeout=60)
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,  # aiohttp would also send passwords from a .netrc
                read_bufsize=_READ_BUFFER,
            )
        return self._session


def _socket(info: tuple[Any, ...]) -> socket.socket:
    family, kind, protocol = info[:3]
    made = socket.socket(family, kind, protocol)
    # The way to an API server at an address that a Service has does not lead through this proxy.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, OWN_PRIORITY)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _DEAD_SECONDS // 2)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_SECONDS * 1000)
    return made


def _environment_proxy(url: str) -> str:
    """The proxy that HTTPS_PROXY, HTTP_PROXY and NO_PROXY name for a URL, as in client-go; "" for none."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies_environment()
    if not proxies.get(parts.scheme) or urllib.request.proxy_bypass(parts.netloc):
        return ""
    return proxies[parts.scheme]


def _described(error: Exception, *, answered: bool) -> str:
    """What went wrong with a connection, in one line."""
    match error:
        case aiohttp.ClientConnectorDNSError():
            return f"{error.host}: the name cannot be resolved: {_os_text(error.os_error)}"
        case aiohttp.ClientConnectorCertificateError():
            why = error.certificate_error
            text = why.verify_message if isinstance(why, ssl.SSLCertVerificationError) else str(why)
            return f"the server's certificate is not trusted: {clip(text, _SHOWN)}"
        case aiohttp.ClientSSLError() | ssl.SSLError():
            reason = getattr(getattr(error, "os_error", error), "reason", None) or str(error)
            return f"TLS: {clip(str(reason).replace('_', ' ').lower(), _SHOWN)}"
        case aiohttp.ClientConnectorError():
            return f"cannot connect: {_os_text(error.os_error)}"
        case TimeoutError():
            return "nothing came for too long: the connection hangs" if answered else "no answer in time"
        case aiohttp.ServerDisconnectedError() | ConnectionError() | aiohttp.ClientPayloadError():
            return "the connection was cut off"
        case aiohttp.ClientOSError():
            return f"the connection broke: {_os_text(error)}"
    return clip(f"{type(error).__name__}: {error}".rstrip(": "), _SHOWN)


def _os_text(error: OSError) -> str:
    if error.errno is not None and error.errno > 0 and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno).lower()
    return clip(str(error.strerror or error), _SHOWN).lower()
