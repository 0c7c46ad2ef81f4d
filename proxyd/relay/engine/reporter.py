"""What a worker tells control: gathered, sent without waiting, and bounded while control is slow to read."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from itertools import islice

from proxyd.relay.ipc.channel import Channel
from proxyd.relay.ipc.messages import (
    Acknowledged,
    Connection,
    Connections,
    Drained,
    Failure,
    Failures,
    Ready,
    Trouble,
)

MAX_RECORDS = 1000  # that are kept for control; further ones are counted as dropped
RECORDS_SECONDS = 0.1
TROUBLE_SECONDS = 1.0
MAX_TEXTS = 100  # of trouble, that are kept for control
MAX_TEXT = 300  # characters, of a text and of its kind
MAX_FAILURES = 200  # kinds of failure in one message: service port, endpoint and reason
OTHER_TROUBLE = "other trouble: too many different kinds to list"

# In one message; a record has well below 600 bytes.
_RECORDS_AT_ONCE = 200
_DRAINED_AT_ONCE = 5000
# Of trouble, in one message: each text comes twice, with its kind, and a character has up to 4 bytes.
_TEXTS_AT_ONCE = 30
# Control sends an update only a few times a second: if more answers than these wait, it is stuck.
_MAX_ANSWERS = 10_000


class Reporter:
    """Gathers messages to control and sends them without blocking.

    Args:
        loop: for timers and for waiting until control has read.
        channel: to control.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, channel: Channel) -> None:
        self._loop = loop
        self._channel = channel
        self._answers: deque[Ready | Acknowledged] = deque(maxlen=_MAX_ANSWERS)
        self._drained: list[int] = []
        self._records: list[Connection] = []
        self._dropped = 0
        self._trouble: dict[str, int] = {}
        self._kinds: dict[str, str] = {}  # of texts in `_trouble`
        self._failures: dict[tuple[str, str, str], int] = {}
        self._failures_dropped = 0
        self._due: set[Callable[[], None]] = set()
        self._trouble_ripe = False
        self._blocked = False
        self._gone = False

    def answer(self, message: Ready | Acknowledged) -> None:
        """Send at once."""
        self._answers.append(message)
        self._send()

    def drained(self, listener: int) -> None:
        """Report, at the end of this turn, that a closed listener has no relays left."""
        self._drained.append(listener)
        self._schedule(0.0, self._send)

    def record(self, connection: Connection) -> None:
        """Report a relay that ended, soon."""
        if len(self._records) >= MAX_RECORDS:
            self._dropped += 1
            return
        self._records.append(connection)
        self._schedule(RECORDS_SECONDS, self._send)

    def trouble(self, text: str, kind: str = "") -> None:
        """Report trouble, at most once a second. Texts of one `kind` are summed up; "": a kind of its own."""
        text = text[:MAX_TEXT]
        if text not in self._trouble and len(self._trouble) >= MAX_TEXTS:
            text, kind = OTHER_TROUBLE, ""
        self._trouble[text] = self._trouble.get(text, 0) + 1
        if kind:
            self._kinds[text] = kind[:MAX_TEXT]
        self._schedule(TROUBLE_SECONDS, self._ripen)

    def endpoint_trouble(self, service: str, endpoint: str, why: str) -> None:
        """Report trouble at an endpoint; the same at other endpoints of the service port is of its kind."""
        self.trouble(f"endpoint {endpoint} of {service}: {why}", f"{service}: {why}")

    def failure(self, service: str, endpoint: str, why: str) -> None:
        """Report a failure of a service port, at most once a second; `endpoint` "": of none alone."""
        kind = (service, endpoint, why[:MAX_TEXT])
        count = self._failures.get(kind, 0)
        if not count and len(self._failures) >= MAX_FAILURES:
            self._failures_dropped += 1
            return
        self._failures[kind] = count + 1
        if not count:
            self._schedule(TROUBLE_SECONDS, self._ripen)

    def flush(self) -> None:
        """Send now, before the end, what control has room for."""
        self._ripen()

    def stop(self) -> None:
        """Send nothing any more."""
        if self._blocked:
            self._loop.remove_writer(self._channel.fileno())
        self._gone = True

    def _schedule(self, delay: float, what: Callable[[], None]) -> None:
        if what in self._due:
            return
        self._due.add(what)

        def fire() -> None:
            self._due.discard(what)
            what()

        if delay:
            self._loop.call_later(delay, fire)
        else:
            self._loop.call_soon(fire)

    def _ripen(self) -> None:
        self._trouble_ripe = True
        self._send()

    def _send(self) -> None:
        """Send the messages that wait, the most important first, until control has no more room."""
        blocked = False
        while not self._gone and not blocked and self._waiting():
            blocked = not self._send_one()
        if self._gone:
            return
        if blocked and not self._blocked:
            self._loop.add_writer(self._channel.fileno(), self._send)
        elif self._blocked and not blocked:
            self._loop.remove_writer(self._channel.fileno())
        self._blocked = blocked

    def _waiting(self) -> bool:
        ripe = self._trouble_ripe and bool(self._trouble or self._failures)
        return ripe or bool(self._answers or self._drained or self._records)

    def _send_one(self) -> bool:
        """Send one message, if there is one; False when there is no room for it."""
        try:
            if self._answers:
                if not self._channel.send(self._answers[0]):
                    return False
                self._answers.popleft()
            elif self._drained:
                some = self._drained[:_DRAINED_AT_ONCE]
                if not self._channel.send(Drained(some)):
                    return False
                del self._drained[: len(some)]
            elif self._records:
                records = self._records[:_RECORDS_AT_ONCE]
                if not self._channel.send(Connections(records, self._dropped)):
                    return False
                del self._records[: len(records)]
                self._dropped = 0
            elif self._trouble_ripe and self._failures:
                some_failures = [Failure(*kind, count) for kind, count in self._failures.items()]
                if not self._channel.send(Failures(some_failures, self._failures_dropped)):
                    return False
                self._failures = {}
                self._failures_dropped = 0
                self._trouble_ripe = bool(self._trouble)
            elif self._trouble_ripe and self._trouble:
                counts = dict(islice(self._trouble.items(), _TEXTS_AT_ONCE))
                kinds = {text: self._kinds[text] for text in counts if text in self._kinds}
                if not self._channel.send(Trouble(counts, kinds)):
                    return False
                for text in counts:
                    del self._trouble[text]
                    self._kinds.pop(text, None)
                self._trouble_ripe = bool(self._trouble)
        except OSError:
            # Control is gone; the worker's own reader of the channel sees that too.
            self._gone = True
        return True
