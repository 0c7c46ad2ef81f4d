"""The recent history of each Service: failures by kind, and what became of its listeners. It is bounded."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

from proxyd.control.admin.schema import EventView, FailureView
from proxyd.relay.ipc.messages import Failure
from proxyd.state.spec import ListenerKey, ListenerStatus, ServicePortName

# Services with a history; the one that was quiet for the longest time is forgotten first.
MAX_SERVICES = 10_000
# Of one Service.
MAX_FAILURES = 20  # kinds of failure: service port, endpoint and reason
MAX_EVENTS = 20


class History:
    """Remembers failures and events of Services.

    Args:
        clock: gives Unix time.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, OrderedDict[tuple[str, str, str], FailureView]] = OrderedDict()
        self._events: OrderedDict[str, deque[tuple[float, str]]] = OrderedDict()
        self._unopened: dict[tuple[ListenerKey, ServicePortName], str] = {}
        self._seen: tuple[ListenerStatus, ...] = ()

    def failed(self, failures: Iterable[Failure]) -> None:
        """Remember failures that a worker reported."""
        now = self._clock()
        for failure in failures:
            service, _, port = failure.service.partition(":")
            kinds = self._failures.setdefault(service, OrderedDict())
            self._failures.move_to_end(service)
            kind = (port, failure.endpoint, failure.why)
            before = kinds.pop(kind, None)
            kinds[kind] = FailureView(
                time=now,
                first=before.first if before else now,
                port=port,
                endpoint=failure.endpoint,
                why=failure.why,
                count=failure.count + (before.count if before else 0),
            )
            if len(kinds) > MAX_FAILURES:
                kinds.popitem(last=False)
            if len(self._failures) > MAX_SERVICES:
                self._failures.popitem(last=False)

    def note(self, service_port: ServicePortName, what: str) -> None:
        """Remember what became of a service port's listener."""
        service = f"{service_port.namespace}/{service_port.name}"
        events = self._events.get(service)
        if events is None:
            events = self._events[service] = deque(maxlen=MAX_EVENTS)
            if len(self._events) > MAX_SERVICES:
                self._events.popitem(last=False)
        else:
            self._events.move_to_end(service)
        events.append((self._clock(), what))

    def unopened(self, statuses: tuple[ListenerStatus, ...]) -> None:
        """Remember which listeners are not to be opened, and why; those that were not known are events."""
        if statuses is self._seen:
            return
        self._seen = statuses
        before, self._unopened = self._unopened, {}
        for status in statuses:
            key = (status.key, status.service_port)
            why = f": {status.detail}" if status.detail else ""
            text = self._unopened[key] = f"{status.state} {status.key}{why}"
            if before.get(key) != text:
                self.note(status.service_port, text)

    def failures(self, namespace: str, name: str) -> tuple[FailureView, ...]:
        """Failures of a Service, the latest first."""
        return tuple(reversed(self._failures.get(f"{namespace}/{name}", OrderedDict()).values()))

    def events(self, namespace: str, name: str) -> tuple[EventView, ...]:
        """What became of a Service's listeners, the latest first."""
        events = self._events.get(f"{namespace}/{name}", ())
        return tuple(EventView(time=when, what=what) for when, what in reversed(events))
