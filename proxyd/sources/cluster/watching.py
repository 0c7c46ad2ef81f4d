"""List and watch, as three nested generators with one duty each.

`Watcher.stream` is one HTTP watch: batches of events until it ends. `Watcher.list_and_watch` is one life of a resource:
all its pages, LISTED, then watches after watches, each from where the last one ended, until the server has forgotten
that place (410). `Watcher.forever` is life after life, with pauses that grow.

What a failure leads to:

- a watch that ends, is cut off (in the middle of a line too), hangs, or is refused with anything but 410: another watch
  from the same place. The first try after a cut is quick and silent; those that follow pause longer and are reported.
- 410 as status or as ERROR event, or a place that the server has not reached yet (it was restored from a backup): a new
  life. So does a place from which nothing but garbage comes.
- an expired continue token: the list from its beginning, the second time in one page.
- 404: the next of the resource's versions; of one that was served before only after several tries, because a server that
  is starting does not know all its versions.
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
_PAGE_BYTES = 4 << 20  # what the size of the next page aims at
_FEWEST, _MOST = 50, 5000  # objects in a page
_TRIES = 3  # of a 404 of what was served before, of garbage from one place
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
    """A stream that is not what it should be."""


class Watcher:
    """Follows one resource.

    Args:
        name: for messages: "services".
        resources: its versions, the best first.
        client: what to ask through.
        troubles: what is told when it fails, and works again.
        tuning: times.

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
        self._absent = 0  # 404s in a row of the version that was served
        self._version = ""  # the place a watch goes on from
        self._failing = ""  # "list" or "watch": what does not work
        self._events: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
        self._lists: msgspec.json.Decoder[_List] = msgspec.json.Decoder(_List)
        self._heads: msgspec.json.Decoder[_Head] = msgspec.json.Decoder(_Head)

    async def forever(self) -> AsyncGenerator[Step, None]:
        """Life after life; does not end."""
        while True:
            try:
                async with aclosing(self.list_and_watch()) as life:
                    async for step in life:
                        yield step
            except ApiError as error:
                yield Unavailable(error.code)
                await self._pause(error, "list")

    async def list_and_watch(self) -> AsyncGenerator[Step, None]:
        """One life: until the server no longer knows where we are.

        Raises:
            ApiError: the list failed.
        """
        async with aclosing(self._list()) as pages:
            async for step in pages:
                yield step
                del step  # a page is megabytes, and this lives as long as the watches after it
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
                    # The first time at once. A server that goes on so must not be asked for one list after another.
                    self._expired += 1
                    if self._expired > 1:
                        await self._pause(error, "watch")
                    return
                garbled = garbled + 1 if isinstance(error, _GarbledError) and self._version == before else 0
                await self._pause(error, "watch")
                if garbled >= _TRIES or (error.code == 0 and not await self._is_current()):
                    return

    async def stream(self) -> AsyncGenerator[Batch, None]:
        """One HTTP watch from the place where the last one ended.

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
                error = None  # raised, it refers to this frame: both would wait for the search for garbage
        if self._version == before and loop.time() - opened < min(1, seconds / 2):
            raise ApiError("the watch ended at once", dropped=True)
        self._works("watch")

    def _read(self, lines: Sequence[bytes]) -> tuple[list[Event], ApiError | None]:
        """The changes up to the first line that is none, and what that line means. Moves the place on."""
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
        """All pages, in the best version that is served."""
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
        first = ""  # the version of the first page: nothing that came after it may be missed
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
        """Whether the server has reached our place; one that cannot be asked has."""
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
        """Whether a better version than the one in use is served by now."""
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
        # That a list works says nothing of watches that do not.
        if not self._failing or self._failing == what:
            self._failing = ""
            self._backoff.reset()
            self._troubles.works(self.name)

    async def _pause(self, error: ApiError, what: str) -> None:
        """Waits before the next try.

        A restart of the server, or a token that was replaced just now, is not worth a word unless it lasts.
        """
        quick = not self._backoff.failures and (error.dropped or error.code == UNAUTHORIZED)
        wait = self._backoff.pause(error.retry_after)
        if not quick:
            self._failing = what
            self._troubles.failed(self.name, self._message(error))
        await asyncio.sleep(wait)

    def _message(self, error: ApiError) -> str:
        if error.code:
            # What was refused matters; what could not be reached does not depend on it.
            advice = {
                401: ": check the credentials in the kubeconfig",
                403: ": give this user the ClusterRole system:node-proxier",
            }.get(error.code, "")
            return f"{self.name}: {error}{advice}"
        return str(error)


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncGenerator[list[bytes], None]:
    """Complete lines, those that came in together in one list. What follows the last line feed is thrown away.

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
