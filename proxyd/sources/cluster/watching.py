"""Lists and watches a resource, in three nested generators with one duty each.

`Watcher.stream` is one HTTP watch: it yields batches of events until the watch ends. `Watcher.list_and_watch`
yields all pages of a list, LISTED, and the batches of one watch after another, each from the resourceVersion
at which the last one ended, until the server has forgotten that version (410). `Watcher.forever` does this
again and again, with pauses that grow.

This is how failures are handled:

- A watch ends, is cut off (also within a line), hangs, or is refused with anything but 410: another watch
  begins at the same resourceVersion. The first try after a cut is quick and silent; further ones wait longer,
  and are reported.
- The server answers 410, or sends it as an ERROR event, or has not reached the resourceVersion yet (it was
  restored from a backup), or sends nothing but garbage from it: everything is listed anew.
- A continue token has expired: the list begins anew, the second time in one page.
- The server answers 404: the next version of the API is tried. If this one was served before, that is done
  after several tries, because a server that is starting does not know all its versions.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

import msgspec

from proxyd.api.findings import clip
from proxyd.sources.cluster.backoff import Backoff
from proxyd.sources.cluster.steps import (
    Batch,
    Event,
    Listing,
    Marker,
    Page,
    Resource,
    Step,
    Tuning,
    Unavailable,
)
from proxyd.sources.cluster.transport import GONE, NOT_FOUND, UNAUTHORIZED, ApiClient, ApiError, status_error
from proxyd.sources.cluster.troubles import Troubles

_MAX_LINE = 32 << 20
_PAGE_BYTES = 4 << 20  # the number of objects in the next page aims at this size
_FEWEST, _MOST = 50, 5000  # objects in a page
_TRIES = 3  # with a 404 for a version that was served, or with garbage from one resourceVersion
_SHOWN = 80


class _ListMeta(msgspec.Struct, rename="camel", kw_only=True):
    resource_version: str = ""
    next: str = msgspec.field(default="", name="continue")


class _List(msgspec.Struct, kw_only=True):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


class _Meta(msgspec.Struct, rename="camel", kw_only=True):
    resource_version: str = ""


class _Head(msgspec.Struct, kw_only=True):
    metadata: _Meta


class _GarbledError(ApiError):
    """A stream has something else in it than watch events."""


class Watcher:
    """Follows one resource.

    Args:
        name: what messages call it, such as "services".
        resources: its versions, the best one first.
        client: sends the requests.
        troubles: is told when it fails, and when it works again.
        tuning: the times.

    Attributes:
        served: the version in use; None before the first answer.
    """

    def __init__(
        self,
        name: str,
        resources: Sequence[Resource],
        client: ApiClient,
        troubles: Troubles,
        tuning: Tuning,
    ) -> None:
        self.name = name
        self.served: Resource | None = None
        self._resources = tuple(resources)
        self._client, self._troubles, self._tuning = client, troubles, tuning
        self._backoff = Backoff(tuning.first_pause, tuning.longest_pause)
        self._expired = 0  # 410s in a row
        self._absent = 0  # 404s in a row for the version that was served
        self._version = ""  # the resourceVersion from which a watch goes on
        self._failing = ""  # what does not work: "list" or "watch"
        self._events: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
        self._lists: msgspec.json.Decoder[_List] = msgspec.json.Decoder(_List)
        self._heads: msgspec.json.Decoder[_Head] = msgspec.json.Decoder(_Head)

    async def forever(self) -> AsyncGenerator[Step, None]:
        """List and watch again and again; it does not end."""
        while True:
            try:
                async with aclosing(self.list_and_watch()) as life:
                    async for step in life:
                        yield step
            except ApiError as error:
                yield Unavailable(error.code)
                await self._pause(error, "list")

    async def list_and_watch(self) -> AsyncGenerator[Step, None]:
        """List, then watch until the server has forgotten the resourceVersion that was reached.

        Raises:
            ApiError: the list failed.
        """
        async with aclosing(self._list()) as pages:
            async for step in pages:
                yield step
                del step  # a page has megabytes, which the frame would keep during all watches
        self._absent = 0
        self._works("list")
        yield Marker.LISTED
        garbled = 0
        while True:
            before = self._version
            try:
                async with aclosing(self.stream()) as batches:
                    async for batch in batches:
                        yield batch
                if self._version == before and not await self._is_current():
                    return
                if await self._is_outdated():
                    return
            except ApiError as error:
                if error.code in (GONE, NOT_FOUND):
                    # The first time it is listed at once. A server that goes on so is not asked list after
                    # list.
                    self._expired += 1
                    if self._expired > 1:
                        await self._pause(error, "watch")
                    return
                garbled = garbled + 1 if isinstance(error, _GarbledError) and self._version == before else 0
                await self._pause(error, "watch")
                if garbled >= _TRIES or (error.code == 0 and not await self._is_current()):
                    return

    async def stream(self) -> AsyncGenerator[Batch, None]:
        """One HTTP watch from the resourceVersion at which the last one ended.

        Raises:
            ApiError: it was refused or cut off, hung, sent garbage or an ERROR event, or ended at once.
        """
        assert self.served is not None
        loop = asyncio.get_running_loop()
        seconds = random.randint(*self._tuning.watch_seconds)  # noqa: S311  not a secret
        params = {
            **dict(self.served.selectors),
            "watch": "1",
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(seconds),
        }
        silent = seconds + self._tuning.slack_seconds
        async with self._client.stream(self.served.path, params, silent_seconds=silent) as pieces:
            opened, before = loop.time(), self._version
            steady = loop.call_later(self._tuning.steady_seconds, self._works, "watch")
            error: ApiError | None = None
            try:
                async with aclosing(_lines(pieces)) as batches:
                    async for lines in batches:
                        events, error = self._read(lines)
                        if events:
                            yield Batch(events)
                        if error is not None:
                            raise error
            finally:
                steady.cancel()
                error = None  # else frame and error would refer to each other
        if self._version == before and loop.time() - opened < min(1, seconds / 2):
            raise ApiError("the watch ended at once", dropped=True)
        self._works("watch")

    def _read(self, lines: Sequence[bytes]) -> tuple[list[Event], ApiError | None]:
        """The changes up to the first line that is none, and its error. Moves the resourceVersion on."""
        events: list[Event] = []
        version, error = self._version, None
        for line in lines:
            try:
                event = self._events.decode(line)
                if event.type == "ERROR":
                    error = status_error(event.object)
                    break
                version = self._heads.decode(event.object).metadata.resource_version or version
            except (msgspec.DecodeError, ValueError):
                error = _GarbledError(
                    f"the watch sent garbage: {clip(line.decode(errors='replace'), _SHOWN)}"
                )
                break
            if event.type in ("ADDED", "MODIFIED", "DELETED"):
                events.append(event)
        self._version = version
        return events, error

    async def _list(self) -> AsyncGenerator[Step, None]:
        """Yields all pages of a list, in the best version that is served."""
        for i, resource in enumerate(self._resources):
            try:
                async with aclosing(self._pages(resource)) as pages:
                    async for step in pages:
                        yield step
                return
            except ApiError as error:
                if error.code != NOT_FOUND or i + 1 == len(self._resources):
                    raise
                if resource is self.served:
                    self._absent += 1
                    if self._absent < _TRIES:
                        raise

    async def _pages(self, resource: Resource) -> AsyncGenerator[Step, None]:
        expired = 0
        limit, token = self._tuning.page, ""
        first = ""  # the resourceVersion of the first page: the watch begins there, and misses nothing
        started = False
        while True:
            params = dict(resource.selectors)
            if expired < 2:
                params["limit"] = str(limit)
            if token:
                params["continue"] = token
            try:
                body = await self._client.get(resource.path, params)
            except ApiError as error:
                if error.code != GONE or not token:
                    raise
                expired, token, first, started = expired + 1, "", "", False
                continue
            if not started:
                started = True
                self.served = resource
                yield Listing(resource)
            try:
                page = self._lists.decode(body)
            except (msgspec.DecodeError, ValueError) as error:
                text = clip(str(error), _SHOWN)
                raise ApiError(f"the list of {self.name} is garbage: {text}") from None
            size = len(body)
            del body
            items = page.items or []
            first = first or page.metadata.resource_version
            token = page.metadata.next
            if items:
                limit = max(_FEWEST, min(_MOST, _PAGE_BYTES * len(items) // size))
                yield Page(items)
            if not token:
                self._version = first
                return

    async def _is_current(self) -> bool:
        """Whether the server has reached the resourceVersion of the watch; also True if it can't be asked."""
        version = await self._newest()
        if not (version.isdecimal() and self._version.isdecimal()):
            return True
        return int(version) >= int(self._version)

    async def _newest(self) -> str:
        assert self.served is not None
        try:
            body = await self._client.get(self.served.path, {**dict(self.served.selectors), "limit": "1"})
            return self._lists.decode(body).metadata.resource_version
        except (ApiError, msgspec.DecodeError, ValueError):
            return ""

    async def _is_outdated(self) -> bool:
        """Whether the server now has a better version than the one in use."""
        best = self._resources[0]
        if self.served is best:
            return False
        try:
            await self._client.get(best.path, {**dict(best.selectors), "limit": "1"})
        except ApiError:
            return False
        return True

    def _works(self, what: str) -> None:
        if what == "watch":
            self._expired = 0
        # After watches failed, a list that works does not mean that they do.
        if not self._failing or self._failing == what:
            self._failing = ""
            self._backoff.reset()
            self._troubles.works(self.name)

    async def _pause(self, error: ApiError, what: str) -> None:
        """Wait before the next try, and report the error.

        A cut connection or a refused token is reported the second time only: the server restarts, or the
        token has just been replaced.
        """
        quick = not self._backoff.failures and (error.dropped or error.code == UNAUTHORIZED)
        wait = self._backoff.pause(error.retry_after)
        if not quick:
            self._failing = what
            self._troubles.failed(self.name, self._message(error))
        await asyncio.sleep(wait)

    def _message(self, error: ApiError) -> str:
        if error.code:
            # Which resource was asked for matters where the server refuses it, not where there is no answer.
            advice = {
                401: ": check the credentials in the kubeconfig",
                403: ": give this user the ClusterRole system:node-proxier",
            }.get(error.code, "")
            return f"{self.name}: {error}{advice}"
        return str(error)


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncGenerator[list[bytes], None]:
    """Yields complete lines, in lists of those that arrived together. A last incomplete line is dropped.

    Raises:
        ApiError: a line is too long.
    """
    rest = bytearray()
    async for piece in pieces:
        rest += piece
        end = rest.rfind(b"\n", len(rest) - len(piece))
        if end < 0:
            if len(rest) > _MAX_LINE:
                raise _GarbledError(f"the watch sent a line of over {_MAX_LINE >> 20} MiB")
            continue
        lines = bytes(rest[:end]).split(b"\n")
        del rest[: end + 1]
        yield [line for line in lines if line.strip()]
