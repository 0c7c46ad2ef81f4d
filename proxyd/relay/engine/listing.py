"""Tells control which relays are alive: a few hundred in a turn of the loop, when control has room."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from time import monotonic
from typing import Protocol

from proxyd.relay.ipc.channel import Channel
from proxyd.relay.ipc.messages import ListConnections, LiveConnection, LiveConnections

# Relays that are looked at in one turn; describing all of them takes about 0.3 ms.
LOOKED_AT_ONCE = 200
# Requests that wait or are worked on; further ones get an empty answer at once.
MAX_REQUESTS = 4
_RETRY_SECONDS = 0.01


class Listed(Protocol):
    """A relay that can say what it is and does."""

    @property
    def service(self) -> str:
        """Name of its service port, namespace/name:port."""

    def live(self, now: float) -> LiveConnection | None:
        """What it is and does at this moment; None where it has ended."""


class Listings:
    """Answers `ListConnections`, in order, without holding up the relays.

    Args:
        loop: for the next turn.
        channel: to control.
        relays: of the worker; iterated when a request's turn comes.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, channel: Channel, relays: Iterable[Listed]) -> None:
        self._loop = loop
        self._channel = channel
        self._relays = relays
        self._requests: deque[ListConnections] = deque()
        self._working: _Listing | None = None
        self._timer: asyncio.Handle | None = None
        self._stopped = False

    def ask(self, request: ListConnections) -> None:
        """Begin to answer."""
        if len(self._requests) >= MAX_REQUESTS or self._stopped:
            self._send(LiveConnections(request.request, [], last=True))
            return
        self._requests.append(request)
        if self._timer is None:
            self._timer = self._loop.call_soon(self._step)

    def stop(self) -> None:
        """Answer nothing any more."""
        self._stopped = True
        self._requests.clear()
        self._working = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _step(self) -> None:
        self._timer = None
        if self._working is None:
            self._working = _Listing(self._requests[0], deque(self._relays))
        listing = self._working
        if listing.message is None:
            listing.look(monotonic())
        if listing.message is not None:
            sent = self._send(listing.message)
            if self._stopped:
                return
            if not sent:
                self._timer = self._loop.call_later(_RETRY_SECONDS, self._step)
                return
            if listing.message.last:
                self._working = None
                self._requests.popleft()
            listing.message = None
        if self._requests:
            # Not by call_soon: before a timer is due the loop looks at its sockets.
            self._timer = self._loop.call_later(0.001, self._step)

    def _send(self, message: LiveConnections) -> bool:
        try:
            return self._channel.send(message)
        except OSError:
            # Control is gone. The worker's reader of the channel sees that too.
            self.stop()
            return False


class _Listing:
    """One answer under way. `message` is the part to be sent next."""

    def __init__(self, request: ListConnections, relays: deque[Listed]) -> None:
        self.message: LiveConnections | None = None
        self._request = request
        self._relays = relays
        self._left = request.limit
        self._more = 0

    def look(self, now: float) -> None:
        """Look at some more relays, and make the next part of the answer."""
        request = self._request
        prefix = f"{request.namespace}/" if request.namespace else ""
        name = request.name
        records = []
        for _ in range(min(LOOKED_AT_ONCE, len(self._relays))):
            relay = self._relays.popleft()
            service = relay.service
            if prefix and not service.startswith(prefix):
                continue
            if name and service.partition("/")[2].partition(":")[0] != name:
                continue
            record = relay.live(now)
            if record is None:
                continue
            if self._left:
                self._left -= 1
                records.append(record)
            else:
                self._more += 1
        last = not self._relays
        if records or last:
            self.message = LiveConnections(
                request.request, records, last=last, more=self._more if last else 0
            )
