"""A test API server over the real wire format: lists in pages, watches, bookmarks, 410, and failures on demand.

In a test: `async with ApiServer(store) as server`. As a process, for others:

    python -m tests.support.api_server --port 8001 [--state FILE] [--services 1000 --endpoints 3000] [--kubeconfig FILE]

It prints "ready URL" when it listens. `kubectl --server URL` creates, changes and deletes objects (with --validate=false).
POST /_test/<operation> with a JSON object does what the methods of the same name do: bulk, storm, compact, fail, cut,
hang, restart. With --state everything survives a kill.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gc
import ipaddress
import json
import logging
import signal
import ssl
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

import uvloop
from aiohttp import web

from tests.support.api_store import KINDS, Change, Failure, Kind, Selector, Store, Stored, from_beta, selector

TRIGGER_TIME = "endpoints.kubernetes.io/last-change-trigger-time"
_TYPES = {"Content-Type": "application/json", "Cache-Control": "no-cache, private"}


@dataclass
class Fault:
    """What becomes of requests whose path and query contain `match`."""

    match: str = ""
    status: int = 0  # answered with this; 0: the connection is reset
    times: int = 1  # -1: until it is removed
    retry_after: int = 0
    body: str = ""  # sent instead, with status 200 where none is given
    hang: bool = False  # never answered
    answered: float = 0.0  # on the monotonic clock: the last time


@dataclass(eq=False)
class Watch:
    """An open watch, and what is to be done to it."""

    kind: Kind
    response: web.StreamResponse
    request: web.Request
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    hung: bool = False
    rv: int = 0  # what it has been told up to
    orders: list[bytes | str] = field(default_factory=list)  # bytes: sent as they are; "cut", "hang", "end"


class ApiServer:
    """Serves a store.

    Attributes:
        versions: of discovery.k8s.io.
        tokens: who may ask, by bearer token; None: everybody. `forbidden` users get 403.
        token_file: a file with the one token that counts; another from the moment that it is replaced.
        certificates: users known by the common name of their client certificate.
        largest_page: objects in a page, where the client asks for pages.
        bookmark_seconds: between two bookmarks of a watch that asked for them.
        requests: method and path with query of everything that was asked.
        faults: see `fail`.
    """

    def __init__(self, store: Store | None = None, *, tls: ssl.SSLContext | None = None) -> None:
        self.store = store or Store()
        self.tls = tls
        self.versions = {"v1", "v1beta1"}
        self.tokens: dict[str, str] | None = None
        self.token_file: Path | None = None
        self.certificates: set[str] = set()
        self.forbidden: set[str] = set()
        self.bookmark_seconds = 60.0
        self.largest_page = 1 << 30
        self.requests: list[str] = []
        self.users: list[str] = []
        self.faults: list[Fault] = []
        self.watches: set[Watch] = set()
        self.host = "127.0.0.1"
        self.port = 0
        self._snapshots: dict[int, dict[str, list[Stored]]] = {}
        self._runner: web.AppRunner | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        self.store.close()

    async def start(self) -> None:
        """Listens; on the same port as before where there was one."""
        app = web.Application(middlewares=[self._guard], client_max_size=64 << 20)
        app.router.add_post("/_test/{operation}", self._operate)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port, ssl_context=self.tls, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Closes the listener and cuts all connections, as a kill does."""
        for watch in tuple(self.watches):
            _abort(watch.request)
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def restart(self, seconds: float = 0.1) -> None:
        await self.stop()
        await asyncio.sleep(seconds)
        await self.start()

    def fail(self, match: str = "", **what: Any) -> Fault:
        fault = Fault(match, **what)
        self.faults.append(fault)
        return fault

    def order(self, what: bytes | str, plural: str = "") -> int:
        """Tells open watches: bytes are sent as they are; "cut" resets, "hang" falls silent, "end" ends in good order."""
        found = [watch for watch in self.watches if plural in ("", watch.kind.plural)]
        for watch in found:
            watch.orders.append(what)
            watch.wake.set()
        return len(found)

    def cut(self, plural: str = "") -> int:
        """Cuts open watches in the middle of a line."""
        self.order(b'{"type":"MODIFIED","object":{"kind":"Service","metadata":{"na', plural)
        return self.order("cut", plural)

    def hang(self, plural: str = "") -> int:
        return self.order("hang", plural)

    async def storm(self, rate: int, seconds: float, services: int) -> None:
        """Changes the first endpoint of bulk slices, so many a second; change n gives it the address 10.201.0.0 + n.

        Each says when it was made, as slices do.
        """
        loop = asyncio.get_running_loop()
        started, sent, total = loop.time(), 0, int(rate * seconds)
        while sent < total:
            due = min(total, int((loop.time() - started) * rate) + 1)
            for n in range(sent, due):
                i = n % services
                endpoint = {"addresses": [str(ipaddress.ip_address(0x0AC90000 + n))]}
                key = (f"ns-{i % 50}", f"bulk-{i}-abcde")
                made = {"annotations": {TRIGGER_TIME: datetime.now(UTC).isoformat()}}
                self.store.patch("endpointslices", key, {"metadata": made, "endpoints": [endpoint]})
            sent = due
            await asyncio.sleep(0.002)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path.startswith("/_test/"):
            return await handler(request)
        self.requests.append(f"{request.method} {unquote(request.path_qs)}")
        try:
            faulty = await self._faulty(request)
            if faulty is not None:
                return faulty
            self._authorize(request)
            return await handler(request)
        except Failure as failure:
            return _answer(failure.status(), failure.code)

    async def _faulty(self, request: web.Request) -> web.Response | None:
        for fault in self.faults:
            if fault.match not in unquote(request.path_qs):
                continue
            if fault.times > 0:
                fault.times -= 1
                if not fault.times:
                    self.faults.remove(fault)
            fault.answered = time.monotonic()
            if fault.hang:
                await asyncio.sleep(3600)
            if fault.body:
                return web.Response(body=fault.body.encode(), status=fault.status or 200, headers=_TYPES)
            if not fault.status:
                _abort(request)
                return web.Response()
            reason = {410: "Expired", 429: "TooManyRequests"}.get(fault.status, "InternalError")
            answer = _answer(Failure(fault.status, reason, "failing as told").status(), fault.status)
            if fault.retry_after:
                answer.headers["Retry-After"] = str(fault.retry_after)
            return answer
        return None

    def _authorize(self, request: web.Request) -> None:
        if self.token_file is not None:
            self.tokens = {self.token_file.read_text().strip(): "me"}
        user = ""
        if self.certificates:
            peer = request.transport.get_extra_info("peercert") if request.transport else None
            names = [
                value
                for part in (peer or {}).get("subject", ())
                for key, value in part
                if key == "commonName"
            ]
            user = next((name for name in names if name in self.certificates), "")
        if not user and self.tokens is not None:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            user = self.tokens.get(given, "")
        if not user and (self.tokens is not None or self.certificates):
            raise Failure(401, "Unauthorized", "Unauthorized")
        self.users.append(user)
        plural = request.path.rsplit("/", 1)[-1]
        if user in self.forbidden:
            message = f'{plural} is forbidden: User "{user}" cannot list resource "{plural}" in API group "" at the cluster scope'
            raise Failure(403, "Forbidden", message, {"kind": plural})

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        parts = request.match_info["path"].strip("/").split("/")
        if parts == ["version"]:
            return _answer({"major": "1", "minor": "19", "gitVersion": "v1.19.0"})
        if parts[0] in ("healthz", "livez", "readyz"):
            return web.Response(text="ok")
        discovery = self._discovery(parts)
        if discovery is not None:
            return _answer(discovery)
        kind, version, namespace, name = self._resolve(parts)
        if request.method == "GET" and not name:
            if request.query.get("watch") in ("1", "true"):
                return await self._watch(request, kind, version, namespace)
            return self._list(request, kind, version, namespace)
        return await self._one(request, kind, version, namespace, name)

    def _resolve(self, parts: list[str]) -> tuple[Kind, str, str, str]:
        missing = Failure(404, "NotFound", "the server could not find the requested resource", {})
        if parts[0] == "api" and len(parts) > 2:
            group, version, rest = "", parts[1], parts[2:]
        elif parts[0] == "apis" and len(parts) > 3:
            group, version, rest = parts[1], parts[2], parts[3:]
        else:
            raise missing
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        kind = KINDS.get(rest[0])
        if kind is None or kind.group != group or version not in kind.versions:
            raise missing
        if group and version not in self.versions:
            raise missing
        return kind, version, namespace, rest[1] if len(rest) > 1 else ""

    def _discovery(self, parts: list[str]) -> dict[str, Any] | None:
        group = "discovery.k8s.io"
        if parts == ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"]}
        if parts == ["apis"]:
            versions = [{"groupVersion": f"{group}/{v}", "version": v} for v in sorted(self.versions)]
            groups = (
                [{"name": group, "versions": versions, "preferredVersion": versions[0]}] if versions else []
            )
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        for version, prefix in [("v1", ["api", "v1"]), *((v, ["apis", group, v]) for v in self.versions)]:
            if parts == prefix:
                verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
                mine = [kind for kind in KINDS.values() if bool(kind.group) == (parts[0] == "apis")]
                resources = [
                    {
                        "name": kind.plural,
                        "singularName": kind.kind.lower(),
                        "namespaced": kind.namespaced,
                        "kind": kind.kind,
                        "verbs": verbs,
                        "shortNames": {"services": ["svc"], "endpoints": ["ep"]}.get(kind.plural, []),
                    }
                    for kind in mine
                ]
                name = version if parts[0] == "api" else f"{group}/{version}"
                return {"kind": "APIResourceList", "groupVersion": name, "resources": resources}
        return None

    def _list(self, request: web.Request, kind: Kind, version: str, namespace: str) -> web.Response:
        query = request.query
        wanted = _wanted(request, namespace)
        start: tuple[str, str] = ("", "")
        rv = self.store.rv
        if query.get("continue"):
            token = json.loads(base64.urlsafe_b64decode(query["continue"] + "=="))
            rv = token["rv"]
            head, _, tail = token["start"].rstrip("\0").rpartition("/")
            start = (head, tail)
            if rv < self.store.compacted or kind.plural not in self._snapshots.get(rv, {}):
                raise Failure(
                    410,
                    "Expired",
                    "The provided continue parameter is too old to display a consistent list result.",
                )
            everything = self._snapshots[rv][kind.plural]
        else:
            everything = [one for _, one in sorted(self.store.objects[kind.plural].items())]
        found = [one for one in everything if one.key > start and wanted(one)]
        meta: dict[str, Any] = {"resourceVersion": str(rv)}
        limit = int(query.get("limit") or 0)
        limit = min(limit, self.largest_page) if limit else 0
        if limit and len(found) > limit:
            self._snapshots.setdefault(rv, {})[kind.plural] = everything
            while len(self._snapshots) > 8:
                del self._snapshots[next(iter(self._snapshots))]
            last = found[limit - 1].key
            token = json.dumps(
                {"v": "meta.k8s.io/v1", "rv": rv, "start": "/".join(last) + "\0"}, separators=(",", ":")
            )
            meta["continue"] = base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")
            if not (query.get("labelSelector") or query.get("fieldSelector")):
                meta["remainingItemCount"] = len(found) - limit
            found = found[:limit]
        head = {"kind": f"{kind.kind}List", "apiVersion": kind.api_version(version), "metadata": meta}
        body = json.dumps(head).encode()[:-1] + b',"items":['
        body += b",".join(one.raw(version, typed=False) for one in found) + b"]}\n"
        return web.Response(body=body, headers=_TYPES)

    async def _one(
        self, request: web.Request, kind: Kind, version: str, namespace: str, name: str
    ) -> web.Response:
        store, plural = self.store, kind.plural
        key = (namespace, name)
        if request.method == "GET":
            return _raw(store.get(plural, key).raw(version, typed=True))
        if request.method == "DELETE":
            return _raw(store.delete(plural, key).raw(version, typed=True))
        body = await request.json()
        if version == "v1beta1" and "endpoints" in body:
            body = from_beta(body)
        if request.method == "PATCH":
            return _raw(store.patch(plural, key, body).raw(version, typed=True))
        if namespace:
            body["metadata"]["namespace"] = namespace
        if request.method == "PUT":
            return _raw(store.update(plural, body).raw(version, typed=True))
        return _raw(store.create(plural, body).raw(version, typed=True), 201)

    async def _watch(
        self, request: web.Request, kind: Kind, version: str, namespace: str
    ) -> web.StreamResponse:
        query = request.query
        wanted = _wanted(request, namespace)
        rv = int(query.get("resourceVersion") or 0)
        response = web.StreamResponse(headers=_TYPES)
        response.enable_chunked_encoding()
        await response.prepare(request)
        watch = Watch(kind, response, request)
        self.watches.add(watch)
        self.store.watchers.add(watch.wake.set)
        try:
            await self._feed(watch, version, wanted, rv)
        finally:
            self.watches.discard(watch)
            self.store.watchers.discard(watch.wake.set)
        return response

    async def _feed(self, watch: Watch, version: str, wanted: Selector, rv: int) -> None:
        query, loop = watch.request.query, asyncio.get_running_loop()
        end = loop.time() + float(query.get("timeoutSeconds") or 1800)
        bookmarks = query.get("allowWatchBookmarks") in ("1", "true")
        bookmark_at = loop.time() + self.bookmark_seconds
        plural, send = watch.kind.plural, watch.response.write
        if rv == 0:
            rv = self.store.rv
            present = [one for _, one in sorted(self.store.objects[plural].items()) if wanted(one)]
            await send(b"".join(_line("ADDED", one.raw(version, typed=True)) for one in present))
        while True:
            watch.wake.clear()
            try:
                changes = self.store.since(plural, rv) if rv <= self.store.rv else []
            except Failure as failure:
                await send(_line("ERROR", json.dumps(failure.status()).encode()))
                return
            lines = [line for change in changes if (line := _event(change, version, wanted))]
            rv = changes[-1].rv if changes else rv
            if lines:
                await send(b"".join(lines))
                watch.rv = rv
            for order in watch.orders:
                if isinstance(order, bytes):
                    await send(order)
                elif order == "cut":
                    _abort(watch.request)
                    return
                elif order == "hang":
                    watch.hung = True
                    await asyncio.sleep(3600)
                else:
                    return
            watch.orders.clear()
            now = loop.time()
            if bookmarks and now >= bookmark_at and rv <= self.store.rv:
                bookmark_at = now + self.bookmark_seconds
                rv = max(rv, self.store.rv)
                await send(_line("BOOKMARK", _bookmark(watch.kind, version, rv)))
                watch.rv = rv
            if now >= end:
                return
            try:
                async with asyncio.timeout(max(0, min(end, bookmark_at if bookmarks else end) - now)):
                    await watch.wake.wait()
            except TimeoutError:
                continue

    async def _operate(self, request: web.Request) -> web.Response:
        """Operations for tests that run this as a process."""
        given = await request.json() if request.can_read_body else {}
        operation = request.match_info["operation"]
        if operation in ("bulk", "compact"):
            getattr(self.store, operation)(**given)
        elif operation in ("fail", "cut", "hang"):
            getattr(self, operation)(**given)
        elif operation == "storm":
            await self.storm(**given)
        elif operation == "restart":
            # Not here: this request would be waited for.
            task = asyncio.get_running_loop().create_task(self.restart(**given))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            raise web.HTTPNotFound
        return _answer({"resourceVersion": str(self.store.rv), "watches": len(self.watches)})


def _wanted(request: web.Request, namespace: str) -> Selector:
    chosen = selector(request.query.get("labelSelector", ""), request.query.get("fieldSelector", ""))
    return (lambda one: one.key[0] == namespace and chosen(one)) if namespace else chosen


def _event(change: Change, version: str, wanted: Selector) -> bytes:
    was = change.old is not None and wanted(change.old)
    if change.new is not None and wanted(change.new):
        return _line("MODIFIED" if was else "ADDED", change.new.raw(version, typed=True))
    if not was:
        return b""
    old = change.old
    assert old is not None
    # It shows the last state that the selector matched, with the version of the change.
    body = {**old.body, "metadata": {**old.body["metadata"], "resourceVersion": str(change.rv)}}
    return _line("DELETED", Stored(old.kind, body, change.rv).raw(version, typed=True))


def _line(what: str, raw: bytes) -> bytes:
    return b'{"type":"%s","object":%s}\n' % (what.encode(), raw)


def _bookmark(kind: Kind, version: str, rv: int) -> bytes:
    meta = {"resourceVersion": str(rv), "creationTimestamp": None}
    more: dict[str, Any] = {
        "Service": {"spec": {}, "status": {"loadBalancer": {}}},
        "EndpointSlice": {"addressType": "", "endpoints": None, "ports": None},
    }.get(kind.kind, {})
    return json.dumps(
        {"kind": kind.kind, "apiVersion": kind.api_version(version), "metadata": meta, **more}
    ).encode()


def _answer(body: dict[str, Any], status: int = 200) -> web.Response:
    return _raw(json.dumps(body).encode(), status)


def _raw(body: bytes, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, headers=_TYPES)


def _abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


async def _main(args: argparse.Namespace) -> None:
    store = Store(args.state)
    tls = None
    if args.certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(args.certificate, args.key)
    server = ApiServer(store, tls=tls)
    server.token_file = Path(args.token_file) if args.token_file else None
    server.host, server.port = args.host, args.port
    server.versions = set(filter(None, args.versions.split(",")))
    if args.services and not store.objects["services"]:
        store.bulk(args.services, args.endpoints)
    # A search through so many objects takes 0.2 s, in which nobody is answered.
    gc.freeze()
    await server.start()
    if args.kubeconfig:
        Path(args.kubeconfig).write_text(kubeconfig(server.url))  # noqa: ASYNC240  nobody waits for it
    sys.stdout.write(f"ready {server.url}\n")
    sys.stdout.flush()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await server.stop()
    store.close()


def kubeconfig(url: str, *, user: dict[str, Any] | None = None, cluster: dict[str, Any] | None = None) -> str:
    """A kubeconfig (JSON is YAML) with one context."""
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": url, **(cluster or {})}}],
            "users": [{"name": "me", "user": user or {}}],
            "contexts": [{"name": "here", "context": {"cluster": "test", "user": "me"}}],
            "current-context": "here",
        }
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument(
        "--versions", default="v1,v1beta1", help='of discovery.k8s.io; "": endpoints are core Endpoints alone'
    )
    parser.add_argument("--state", default="", help="log to write through and to start from")
    parser.add_argument("--services", type=int, default=0)
    parser.add_argument("--endpoints", type=int, default=0)
    parser.add_argument("--kubeconfig", default="", help="write one to this file")
    parser.add_argument("--certificate", default="", help="serve by TLS, with this certificate and --key")
    parser.add_argument("--key", default="")
    parser.add_argument("--token-file", default="", help="serve only who has the token in this file")
    logging.basicConfig(level=logging.WARNING)
    uvloop.run(_main(parser.parse_args()))
