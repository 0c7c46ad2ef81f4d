"""Sends Events (core/v1) about this node and its Services: best effort, and nobody waits for them."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from urllib.parse import quote

import msgspec

from proxyd.sources.cluster.transport import FORBIDDEN, NOT_FOUND, ApiClient, ApiError

_MAX_QUEUED = 100
_MAX_KNOWN = 1000  # a repetition of one of so many Events raises its count
_MAX_MESSAGE = 1024
# An object may have so many Events of one reason at once, then one in so many seconds (as in client-go).
_BURST, _REFILL_SECONDS = 25, 300.0


class EventAbout(msgspec.Struct, frozen=True, kw_only=True):
    """The object that an Event is about; a Node has no namespace."""

    kind: str
    name: str
    namespace: str = ""
    uid: str = ""
    api_version: str = "v1"


class _Key(msgspec.Struct, frozen=True):
    about: EventAbout
    type: str
    reason: str
    message: str


class _Sent(msgspec.Struct):
    name: str
    count: int


class EventRecorder:
    """Sends Events; one that is sent again raises the count of the first.

    Args:
        client: sends the requests.
        component: the name of the reporter.
        host: this node's name.
        on_trouble: called once, with the reason why Events do not arrive.

    Attributes:
        dropped: how many Events were not sent.
    """

    def __init__(
        self, client: ApiClient, component: str, host: str, on_trouble: Callable[[str], None]
    ) -> None:
        self.dropped = 0
        self._client, self._component, self._host = client, component, host
        self._on_trouble = on_trouble
        self._queue: OrderedDict[_Key, int] = OrderedDict()  # how often each was posted and not sent
        self._sent: OrderedDict[_Key, _Sent] = OrderedDict()
        self._budgets: OrderedDict[tuple[EventAbout, str], tuple[float, float]] = OrderedDict()
        self._ready = asyncio.Event()
        self._said: set[str] = set()

    def post(self, about: EventAbout, type_: str, reason: str, message: str) -> None:
        """Queue an Event. One too many is counted in `dropped` instead."""
        key = _Key(about, type_, reason, message[:_MAX_MESSAGE])
        if key not in self._queue and (len(self._queue) >= _MAX_QUEUED or not self._allowed(about, reason)):
            self.dropped += 1
            return
        self._queue[key] = self._queue.get(key, 0) + 1
        self._ready.set()

    async def run(self) -> None:
        """Send what is queued, until cancelled; does not return."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            while self._queue:
                key, times = self._queue.popitem(last=False)
                try:
                    await self._send(key, times)
                except ApiError as error:
                    self.dropped += 1
                    # One refused Event, as for a conflict, is not worth a line; it is if none gets through.
                    text = str(error)
                    if error.code in (0, 401, FORBIDDEN) and not self._said:
                        self._said.add(text)
                        self._on_trouble(f"events are not sent: {text}")

    def _allowed(self, about: EventAbout, reason: str) -> bool:
        key, now = (about, reason), time.monotonic()
        left, at = self._budgets.pop(key, (float(_BURST), now))
        left = min(_BURST, left + (now - at) / _REFILL_SECONDS)
        self._budgets[key] = (left - 1, now) if left >= 1 else (left, now)
        if len(self._budgets) > _MAX_KNOWN:
            self._budgets.popitem(last=False)
        return left >= 1

    async def _send(self, key: _Key, times: int) -> None:
        known = self._sent.get(key)
        namespace = key.about.namespace or "default"
        path = f"/api/v1/namespaces/{quote(namespace)}/events"
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if known is not None:
            try:
                patch = {"count": known.count + times, "lastTimestamp": now}
                await self._client.send(
                    "PATCH",
                    f"{path}/{quote(known.name)}",
                    body=msgspec.json.encode(patch),
                    content_type="application/strategic-merge-patch+json",
                )
            except ApiError as error:
                if error.code != NOT_FOUND:
                    raise
                del self._sent[key]  # it has expired: Events live for an hour
            else:
                known.count += times
                self._sent.move_to_end(key)
                return
        name = f"{key.about.name[:200]}.{time.time_ns():x}"
        await self._client.send(
            "POST", path, body=msgspec.json.encode(self._event(key, name, namespace, now, times))
        )
        self._sent[key] = _Sent(name, times)
        if len(self._sent) > _MAX_KNOWN:
            self._sent.popitem(last=False)

    def _event(self, key: _Key, name: str, namespace: str, now: str, times: int) -> dict[str, object]:
        about = key.about
        involved = {
            "kind": about.kind,
            "apiVersion": about.api_version,
            "namespace": about.namespace,
            "name": about.name,
            "uid": about.uid,
        }
        return {
            "kind": "Event",
            "apiVersion": "v1",
            "metadata": {"name": name, "namespace": namespace},
            "involvedObject": {field: value for field, value in involved.items() if value},
            "type": key.type,
            "reason": key.reason,
            "message": key.message,
            "source": {"component": self._component, "host": self._host},
            "reportingComponent": self._component,
            "reportingInstance": self._host,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": times,
        }
